"""Predict the peak memory of one device from the model's config; does not import torch.

The peak is the larger of loading the model and running: permanent state plus the larger of learning and sampling. The
constants are counted from the code, not fitted. docs/memory.md has the formulas, what they omit, and measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from trainer.config.recipe import Recipe, RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.planning.activations import Pass
from trainer.planning.longest_pack import longest_pack
from trainer.planning.model_facts import ModelFacts

GIB: Final = 2**30
PROCESS_GIB: Final = {"cpu": 0.5, "cuda": 1.2}
"""Libraries of the process; on a GPU its context and workspaces."""
FRAGMENTATION_FRAC: Final = 0.1
KERNELS_GIB: Final = 0.094
"""On a CPU in bfloat16 oneDNN caches a kernel of 0.75 MiB (measured) per shape, at most 128 in a worker."""
NF4_BYTES: Final = 0.5 + 4 / 64
"""Bytes per weight in 4 bits, with a float32 scale for each block of 64."""
FUSED_FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types that the local sampler decodes with fused matrix products on a CPU; as in `trainer.sampling.fused`."""
BESIDE: Final = "vLLM on this device"
FIRST_ROOM: Final = 64
"""Initial capacity in tokens of a row of the KV cache, doubled when full; as in `trainer.model.kv_cache`."""


@final
@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted memory of one device in GiB.

    For the 135M model of the SFT quickstart the parts are {"base weights": 0.25, "adapter": 0.01, "masters": 0.02, ...,
    "activations": 0.71, "head": 0.07, "fragmentation": 0.12, "kernels": 0.09, "process": 0.50}.
    """

    parts: Mapping[str, float]
    """Composition of the peak: permanent state plus the larger of learning and sampling, or loading if that is more."""
    available_gib: float
    """Memory of the device."""
    phases: Mapping[str, float]
    """Needed by `learning` and `sampling` in addition to permanent state, and by `loading` before."""
    weights_gib: float
    """Weights of model and adapter."""
    state_gib: float
    """Master weights, gradients, optimizer state and reference weights."""
    other_gib: float
    """Checkpoint copies, cached kernels, fragmentation and the process."""

    @property
    def total_gib(self) -> float:
        """Peak, including an allowance for fragmentation."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of the device."""
        return self.total_gib <= self.available_gib


def estimate_memory(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> MemoryEstimate:
    """Predict the peak memory of one device during training.

    Args:
        recipe: The recipe.
        shape: The shape.
        facts: Sizes of the model.
    """
    weights, state = _weights(recipe, shape, facts), _trained_state(recipe, shape, facts)
    always = weights | state
    is_cpu = shape.device == "cpu"
    if is_cpu:
        always |= _checkpoint_copies(recipe, shape, facts)
        always |= _sampler_copies(recipe, facts)
    phases = {"learning": _learning(recipe, shape, facts)}
    if isinstance(recipe, RFTRecipe) and recipe.rollout.sampler == "local":
        phases["sampling"] = _sampling(recipe, shape, facts)
    asleep, awake = _beside(recipe, shape)
    if awake:
        phases = {"learning": phases["learning"] | {BESIDE: asleep}, "sampling": {BESIDE: awake}}
    sizes = {name: sum(parts.values()) / GIB for name, parts in phases.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    process = {"process": PROCESS_GIB[shape.device]}
    parts = {name: size / GIB for name, size in (always | phases[largest]).items()}
    parts["fragmentation"] = FRAGMENTATION_FRAC * (sum(parts.values()) - parts.get(BESIDE, 0.0))
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
    )


def _beside(recipe: Recipe, shape: TrainingShape) -> tuple[float, float]:
    """Bytes of a vLLM server on the same device: asleep, where its process remains, and awake; 0 without one.

    That a sleeping server keeps no more than the context of its process is vLLM's word; it was not measured.
    """
    if not isinstance(recipe, RFTRecipe) or not recipe.rollout.is_colocated or shape.device != "cuda":
        return 0.0, 0.0
    return PROCESS_GIB["cuda"] * GIB, recipe.rollout.vllm.gpu_memory_frac * shape.gpu_memory_gib * GIB


def _loading(recipe: Recipe, facts: ModelFacts) -> dict[str, float]:
    """While loading: mapped files and converted weights; without conversion the mapped files are the weights."""
    c = compute_bytes_of(recipe)
    is_cast = facts.stored_bytes != c or recipe.model.quantization is not None
    stored = facts.params * facts.stored_bytes if is_cast else 0
    return {"base weights": base_bytes(recipe, facts) / GIB, "weights as stored": stored / GIB}


def compute_bytes_of(recipe: Recipe) -> int:
    """Return the bytes of a weight or activation."""
    return 2 if recipe.model.compute_dtype == "bfloat16" else 4


def _shards(shape: TrainingShape) -> int:
    return shape.num_shards


def _num_trained(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> float:
    """Trained parameters on this device; adapters are not sharded."""
    return facts.lora_params(recipe.lora) if recipe.lora is not None else facts.params / _shards(shape)


def _weights(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    c, shards = compute_bytes_of(recipe), _shards(shape)
    # in full-parameter training the shards are the float32 masters, counted in `_trained_state`
    is_master = shards > 1 and recipe.lora is None and c < 4
    whole = facts.unsplit_params * c if shards > 1 and recipe.lora is not None else 0  # a frozen base: only its blocks
    parts = {"base weights": 0.0 if is_master else whole + (base_bytes(recipe, facts) - whole) / shards}
    if recipe.lora is not None:
        parts["adapter"] = facts.lora_params(recipe.lora) * c
    if shards > 1:
        parts["gathered block"] = 2 * facts.block_params / facts.layers * c
        if recipe.lora is None:
            parts["gathered embedding and head"] = facts.embedding_params * c
            parts["gradients before the scatter"] = (facts.block_params / facts.layers + facts.embedding_params) * 4
    return parts


def base_bytes(recipe: Recipe, facts: ModelFacts) -> float:
    """Return the bytes of the base model as stored during training."""
    c = compute_bytes_of(recipe)
    if recipe.model.quantization is None:
        return float(facts.params * c)
    return facts.quantizable_params * NF4_BYTES + (facts.params - facts.quantizable_params) * c


def _trained_state(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    """Masters (none if the parameters are float32 themselves), gradient sums, both moments and the reference."""
    c, trained = compute_bytes_of(recipe), _num_trained(recipe, shape, facts)
    parts = {"masters": trained * 4} if c < 4 else {}
    parts |= {"gradients": trained * 4, "optimizer": trained * moment_bytes(recipe)}
    if isinstance(recipe, RFTRecipe):
        is_warm = recipe.lora is not None and recipe.lora.warm_start is not None
        is_kept = recipe.lora is None or (is_warm and recipe.algorithm.reference == "initial")
        parts |= {"reference": trained * c} if is_kept else {}
    return parts


def moment_bytes(recipe: Recipe) -> float:
    """Return the bytes of both moments of a trained parameter; in 8 bits each block of 256 has a float32 scale.

    bitsandbytes keeps the moments of parameters below 4,096 values in float32, which is not counted.
    """
    return 2 * (1 + 4 / 256) if recipe.optimizer.name == "adamw_8bit" else 8.0


def _checkpoint_copies(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    """Masters and moments in host memory, which a thread writes while training continues."""
    copied = _num_trained(recipe, shape, facts) * (4 + moment_bytes(recipe))
    return {"copies for checkpoints": copied} if recipe.dcp_save_interval else {}


def _sampler_copies(recipe: Recipe, facts: ModelFacts) -> dict[str, float]:
    """The local sampler's copies of linear layers on a CPU: in bfloat16 all, repacked; in float32 the fused ones."""
    if not isinstance(recipe, RFTRecipe) or recipe.rollout.sampler != "local":
        return {}
    linears = facts.plain_linears() if recipe.model.quantization is None else []
    if compute_bytes_of(recipe) == 4:
        joined = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} if facts.model_type in FUSED_FAMILIES else set()
        return {"sampler's weights": 4.0 * facts.layers * sum(i * o for name, i, o in linears if name in joined)}
    return {"sampler's weights": 2.0 * (facts.layers * sum(i * o for _, i, o in linears) + facts.vocab * facts.hidden)}


def learning_pass(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> Pass:
    """Return the pass over the largest micro-batch of the recipe on the shape.

    Args:
        recipe: The recipe.
        shape: The shape.
        facts: Sizes of the model.
    """
    lengths = longest_pack(recipe, shape)
    most = recipe.rollout.max_completion_tokens if isinstance(recipe, RFTRecipe) else recipe.data.max_seq_tokens
    num_trained = sum(min(most, length - 1) for length in lengths)
    return Pass(
        facts=facts,
        lengths=lengths,
        num_trained=-(-num_trained // shape.context_parallel),
        compute_bytes=compute_bytes_of(recipe),
        rank=recipe.lora.rank if recipe.lora is not None else None,
        is_cpu=shape.device == "cpu",
        is_quantized=recipe.model.quantization is not None,
        ranks=shape.context_parallel,
    )


def _learning(recipe: Recipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    micro = learning_pass(recipe, shape, facts)
    recomputed = recipe.model.gradient_checkpointing
    name = {False: "activations", True: "activations (checkpointed)", "selective": "activations (selected)"}[recomputed]
    moments = micro.moments(recomputed=recomputed)
    last = max(moments, key=lambda moment: moments[moment])
    kept = micro.kept(recomputed=recomputed)
    if recipe.model.activation_offload:  # the inputs of the layer that runs and of the next one
        name, kept = "activations (in host memory)", 2 * kept / facts.layers
    return {name: kept, last: moments[last]}


def _sampling(recipe: RFTRecipe, shape: TrainingShape, facts: ModelFacts) -> dict[str, float]:
    """KV cache of a chunk of maximum length, and the larger of prefill and decoding a token.

    Over several turns each rollout has a prompt of its own, and a copy of what it has read is kept for its next turn.
    """
    c, rollout = compute_bytes_of(recipe), recipe.rollout
    prompts = min(rollout.chunk_prompts, -(-recipe.rows_per_step // shape.num_ranks))
    rows = prompts * rollout.group_size
    prompt_tokens = max(1, recipe.data.max_seq_tokens - rollout.max_completion_tokens)
    room = FIRST_ROOM
    while room < rollout.max_completion_tokens - 1:
        room *= 2
    width = 2 * facts.layers * facts.key_width * c
    is_cpu = shape.device == "cpu"
    prefill = Pass(facts, [prompt_tokens] * prompts, 0, c, None, is_cpu).without_gradient()
    decoding = rows * facts.vocab * (c if is_cpu else c + 4 * 4)
    completions = (
        rows * room * width * (1 + 0.5 / facts.layers)
    )  # a layer whose cache grows holds the old and the new one
    kept = rows * recipe.data.max_seq_tokens * width if rollout.has_turns else 0
    of_prompts = (rows if rollout.has_turns else prompts) * prompt_tokens * width + kept
    if prefill > completions + decoding:
        return {"KV cache of prompts": float(of_prompts), "prefill": prefill}
    return {"KV cache of a chunk": of_prompts + completions, "decoding": float(decoding)}
