"""Peak memory of a training on one device, from the model's config alone. No torch.

What lives all the time, and on top of it the larger of learning and sampling; or loading. Constants are counted from
what the code keeps, not fitted; docs/memory.md has the formulas, what is not counted, and measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from trainer.config.recipe import Recipe, RolloutSettings
from trainer.config.shape import TrainingShape
from trainer.planning.activations import Pass
from trainer.planning.longest_pack import longest_pack
from trainer.planning.model_facts import ModelFacts

GIB: Final = 2**30
PROCESS_GIB: Final = {"cpu": 0.5, "cuda": 1.2}
"""Libraries of a process; context and workspaces of a GPU."""
FRAGMENTATION_FRAC: Final = 0.1
KERNELS_GIB: Final = 0.094
"""Of a CPU in bfloat16: oneDNN keeps a kernel of 0.75 MiB (measured) for each shape, 128 at most in a worker."""
NF4_BYTES: Final = 0.5 + 4 / 64
"""Of a weight in 4 bits, with a float32 scale for each 64."""
FUSED_FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Models that the sampler decodes by joined products on a CPU; the same as in `trainer.sampling.fused`."""
FIRST_ROOM: Final = 64
"""Tokens that a row of the KV cache has room for at first, then doubled; the same as in `trainer.model.kv_cache`."""


@final
@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one device by what holds them."""

    parts: Mapping[str, float]
    """At the peak: what lives always and the larger of learning and sampling, or loading where that is more."""
    available_gib: float
    phases: Mapping[str, float]
    """What learning and sampling need on top of what lives always, and what loading needs before."""
    weights_gib: float
    """Of the model and adapter."""
    state_gib: float
    """Of masters, gradients, optimizer and reference."""
    other_gib: float
    """Of copies, kernels, fragmentation and the process."""
    host_gib: float
    """Copies in the host's memory beside the device's."""

    @property
    def total_gib(self) -> float:
        """Peak, allowance for fragmentation included."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.total_gib <= self.available_gib


def estimate_memory(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> MemoryEstimate:
    """Peak memory of one device while training."""
    weights, state = _weights(recipe, shape, facts), _trained_state(recipe, shape, facts)
    always = weights | state
    copies = _checkpoint_copies(recipe, shape, facts)
    is_cpu = shape.device == "cpu"
    if is_cpu:
        always |= {"copies for checkpoints": copies} if copies else {}
        always |= _sampler_copies(recipe, facts)
    phases = {"learning": _learning(recipe, shape, facts)}
    if recipe.rollout is not None and recipe.rollout.sampler == "local":
        phases["sampling"] = _sampling(recipe, recipe.rollout, shape, facts)
    sizes = {name: sum(parts.values()) / GIB for name, parts in phases.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    process = {"process": PROCESS_GIB[shape.device]}
    parts = {name: size / GIB for name, size in (always | phases[largest]).items()}
    parts["fragmentation"] = FRAGMENTATION_FRAC * sum(parts.values())
    parts |= {"kernels": KERNELS_GIB} if is_cpu and compute_bytes_of(recipe) == 2 else {}
    parts |= process
    loading = _loading(recipe, facts) | process if is_cpu else process
    return MemoryEstimate(
        parts=max(parts, loading, key=lambda each: sum(each.values())),
        available_gib=shape.gpu_memory_gib,
        phases=sizes | {"loading": sum(loading.values()) - PROCESS_GIB[shape.device]},
        weights_gib=sum(weights.values()) / GIB,
        state_gib=sum(state.values()) / GIB,
        other_gib=sum(parts.values()) - sum((weights | state).values()) / GIB - sizes[largest],
        host_gib=0.0 if is_cpu else copies / GIB,
    )


def _loading(recipe: Recipe, facts: ModelFacts) -> dict[str, float]:
    """Before all else: the files' pages and the cast weights; without a cast the pages are the weights."""
    c = compute_bytes_of(recipe)
    is_cast = facts.stored_bytes != c or recipe.model.quantization is not None
    stored = facts.params * facts.stored_bytes if is_cast else 0
    return {"base weights": base_bytes(recipe, facts) / GIB, "weights as stored": stored / GIB}


def compute_bytes_of(recipe: Recipe) -> int:
    """Of a weight or activation."""
    return 2 if recipe.model.compute_dtype == "bfloat16" else 4


def _shards(shape: TrainingShape) -> int:
    return shape.num_ranks if shape.sharding == "full" else 1


def _num_trained(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> float:
    """Trained parameters that this device holds; adapters are whole on every rank."""
    return facts.lora_params(recipe.lora) if recipe.lora is not None else facts.params / _shards(shape)


def _weights(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    c, shards = compute_bytes_of(recipe), _shards(shape)
    # with full parameters the shards are the float32 masters, which are counted there
    is_master = shards > 1 and recipe.lora is None and c < 4
    parts = {"base weights": 0.0 if is_master else base_bytes(recipe, facts) / shards}
    if recipe.lora is not None:
        parts["adapter"] = facts.lora_params(recipe.lora) * c
    if shards > 1:
        parts["gathered block"] = 2 * facts.block_params / facts.layers * c
        parts["gathered embedding and head"] = facts.embedding_params * c
        if recipe.lora is None:
            parts["gradients before the scatter"] = (facts.block_params / facts.layers + facts.embedding_params) * 4
    return parts


def base_bytes(recipe: Recipe, facts: ModelFacts) -> float:
    """Of the base model as it is kept."""
    c = compute_bytes_of(recipe)
    if recipe.model.quantization is None:
        return float(facts.params * c)
    return facts.quantizable_params * NF4_BYTES + (facts.params - facts.quantizable_params) * c


def _trained_state(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    """Masters (the parameters themselves where they are float32), gradient sums, both moments; the reference."""
    c, trained = compute_bytes_of(recipe), _num_trained(recipe, shape, facts)
    parts = {"masters": trained * 4} if c < 4 else {}
    parts |= {"gradients": trained * 4, "optimizer": trained * 8}
    if recipe.method == "rft":
        is_kept = recipe.lora is None or (recipe.lora.warm_start is not None and _reference(recipe) == "initial")
        parts |= {"reference": trained * c} if is_kept else {}
    return parts


def _reference(recipe: Recipe) -> str:
    return recipe.algorithm.reference if recipe.algorithm is not None else "initial"


def _checkpoint_copies(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> float:
    """Masters and moments, which a thread writes while training goes on."""
    return _num_trained(recipe, shape, facts) * 12 if recipe.dcp_save_interval else 0.0


def _sampler_copies(recipe: Recipe, facts: ModelFacts) -> dict[str, float]:
    """The local sampler's own linear layers on a CPU: in bfloat16 all of them, repacked; in float32 the joined ones."""
    if recipe.rollout is None or recipe.rollout.sampler != "local":
        return {}
    linears = facts.adapted_linears() if recipe.model.quantization is None else []
    if compute_bytes_of(recipe) == 4:
        joined = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if facts.model_type in FUSED_FAMILIES else set()
        return {"sampler's weights": 4.0 * facts.layers * sum(i * o for name, i, o in linears if name in joined)}
    return {"sampler's weights": 2.0 * (facts.layers * sum(i * o for _, i, o in linears) + facts.vocab * facts.hidden)}


def learning_pass(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> Pass:
    """The longest micro-batch that the recipe can make on the shape."""
    lengths = longest_pack(recipe, shape)
    most = recipe.rollout.max_completion_tokens if recipe.rollout is not None else recipe.data.max_seq_tokens
    return Pass(
        facts=facts,
        lengths=lengths,
        num_trained=sum(min(most, length - 1) for length in lengths),
        compute_bytes=compute_bytes_of(recipe),
        rank=recipe.lora.rank if recipe.lora is not None else None,
        is_cpu=shape.device == "cpu",
        is_quantized=recipe.model.quantization is not None,
    )


def _learning(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    micro = learning_pass(recipe, shape, facts)
    is_checkpointed = recipe.model.gradient_checkpointing
    name = "activations (checkpointed)" if is_checkpointed else "activations"
    moments = micro.moments(is_checkpointed=is_checkpointed)
    last = max(moments, key=lambda moment: moments[moment])
    return {name: micro.kept(is_checkpointed=is_checkpointed), last: moments[last]}


def _sampling(recipe: Recipe, rollout: RolloutSettings, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    """The longest prompts of a chunk, the rows' own keys and values, and either reading prompts or drawing a token."""
    c = compute_bytes_of(recipe)
    prompts = min(rollout.chunk_prompts, -(-recipe.rows_per_step // shape.num_ranks))
    rows = prompts * rollout.group_size
    prompt_tokens = max(1, recipe.data.max_seq_tokens - rollout.max_completion_tokens)
    room = FIRST_ROOM
    while room < rollout.max_completion_tokens - 1:
        room *= 2
    width = 2 * facts.layers * facts.key_width * c
    is_cpu = shape.device == "cpu"
    reading = Pass(facts, [prompt_tokens] * prompts, 0, c, None, is_cpu).without_gradient()
    drawing = rows * facts.vocab * (c if is_cpu else c + 4 * 4)
    own = rows * room * width * (1 + 0.5 / facts.layers)  # a layer that grows holds both sizes
    if reading > own + drawing:
        return {"KV cache of prompts": float(prompts * prompt_tokens * width), "reading prompts": reading}
    return {"KV cache of a chunk": prompts * prompt_tokens * width + own, "drawing": float(drawing)}
