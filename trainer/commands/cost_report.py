"""`trainer check --cost`: the predicted time of a step on a GPU shape, by parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from trainer.commands.tables import table_lines
from trainer.config.devices import KnownDevice
from trainer.config.load import known_devices
from trainer.config.recipe import Recipe, RFTRecipe
from trainer.config.shape import TrainingShape
from trainer.errors import RecipeError
from trainer.planning.communication import (
    LINK_FRAC,
    Exchanged,
    exchanged,
    exchanged_in_attention,
    knows_link,
    sharded_cost,
)
from trainer.planning.fit import has_compiled_layers
from trainer.planning.plan import Plan, model_facts
from trainer.planning.roofline import StepCost, step_cost

SCORED_FRAC: Final = 0.75
"""Assumed fraction of tokens with a loss."""
DOCUMENTS: Final = (1, 4, 8)
"""Documents per pack that are shown."""


def cost_lines(plan: Plan, *, width: int | None) -> list[str]:
    """The lines of `trainer check --cost`.

    Args:
        plan: of the recipe.
        width: columns of the terminal, or None.

    Raises:
        RecipeError: the shape is a CPU or an unknown GPU, or the sizes of the model are unknown.
    """
    shape, recipe = plan.shape, plan.recipe
    device, facts = _device_of(shape), model_facts(recipe)
    if facts is None:
        raise RecipeError(["--cost: the sizes of the model are unknown; its config.json must be at model.path"])
    tokens, is_compiled = shape.micro_batch_tokens, has_compiled_layers(recipe, shape, facts)
    is_allowed = recipe.model.flash_attention and not recipe.deterministic
    uses_flash = is_compiled and device.flash_attention and is_allowed
    adapter = None if recipe.lora is None else facts.lora_params(recipe.lora)
    said = exchanged(shape, facts.params, facts.unsplit_params, adapter)

    def cost_of(documents: int) -> StepCost:
        alone = step_cost(
            facts,
            device,
            [tokens // documents] * documents,
            int(SCORED_FRAC * tokens),
            rank=None if recipe.lora is None else recipe.lora.rank,
            is_compiled=is_compiled,
            recomputed=recipe.model.gradient_checkpointing,
            uses_flash=uses_flash,
        )
        shared = replace(alone, micro_batches=_micro_batches(recipe, shape, documents))
        return sharded_cost(shared, shape, device, facts, said)

    costs = {documents: cost_of(documents) for documents in DOCUMENTS}
    rows = [
        [
            "documents per pack",
            "packs per step and GPU",
            "ms per pack",
            "tokens/s per GPU",
            "MFU (4N)",
            "MFU with attention",
        ]
    ]
    rows += [[str(documents), str(cost.micro_batches), *_figures(cost)] for documents, cost in costs.items()]
    parts = costs[DOCUMENTS[1]]
    by_part = [["part", "ms"], *([name, _milliseconds(pair)] for name, pair in parts.parts_s.items())]
    by_part += [["host, at the same time", _milliseconds(parts.host_s)]]
    return [
        f"Predicted, not measured: forward and backward of {tokens:,} tokens on one {device.device_name} "
        f"({device.bf16_tflops:g} TFLOP/s, {device.bandwidth_gbps:g} GB/s), {SCORED_FRAC:.0%} of them with a loss.",
        "MFU (4N): 4 FLOPs (full parameters: 6) per parameter without embeddings and token, and the head on scored "
        "tokens, over the data sheet's peak.",
        "Attention: "
        + ("flash-attn-4, if the extra `flash` is installed and passes its test." if uses_flash else "FlexAttention."),
        "",
        *table_lines(rows, width=width),
        "",
        f"With {DOCUMENTS[1]} documents:",
        *table_lines(by_part, width=width),
        *_communication(shape, device, said),
        *_slices(shape, device, exchanged_in_attention(shape, facts, recipe.model.gradient_checkpointing)),
    ]


def _micro_batches(recipe: Recipe, shape: TrainingShape, documents: int) -> int:
    """Micro-batches of an optimizer step on each device, with this many documents per pack."""
    rows = recipe.rows_per_step * (recipe.rollout.group_size if isinstance(recipe, RFTRecipe) else 1)
    copies = shape.num_ranks // shape.context_parallel
    return max(1, -(-rows // (documents * copies)))


def _figures(cost: StepCost) -> list[str]:
    slow, fast = cost.tokens_per_s
    low, high = cost.mfu
    factor = cost.flops / cost.flops_4n
    return [
        _milliseconds(cost.step_s), f"{slow:,.0f} to {fast:,.0f}", f"{low:.0%} to {high:.0%}",
        f"{low * factor:.0%} to {high * factor:.0%}",
    ]  # fmt: skip


def _milliseconds(pair: tuple[float, float]) -> str:
    fast, slow = (f"{value * 1e3:,.0f}" for value in pair)
    return fast if fast == slow else f"{fast} to {slow}"


def _communication(shape: TrainingShape, device: KnownDevice, said: Exchanged) -> list[str]:
    """What a rank receives from others."""
    if shape.num_ranks == 1:
        return []
    lines = [""]
    rate = device.nvlink_gbps / 2 * 1e9
    if said.per_micro_batch:
        parts = {"parameters": said.gathered, "gradients": said.scattered + said.summed_between_copies}
        amounts = " and ".join(f"{value / 1e9:.1f} GB of {name}" for name, value in parts.items() if value)
        time = ", which is not in the time above"
        if knows_link(shape, device):
            slow, fast = (said.per_micro_batch / rate / fraction for fraction in LINK_FRAC)
            time = f", {_milliseconds((fast, slow))} ms beside the computing; what is not hidden is in the time above"
        elif shape.num_shards > shape.ranks_per_node:
            time += ", partly from other machines: `sharding: node` gathers inside each machine"
        elif said.summed_between_copies:
            time += f", {said.summed_between_copies / 1e9:.1f} GB of it from other machines"
        lines.append(f"Sharded weights: each GPU receives {amounts} per micro-batch{time}.")
    if said.per_step:
        lines.append(f"Gradients: each GPU receives {said.per_step / 1e9:.2f} GB per step, after its last micro-batch.")
    return lines


def _slices(shape: TrainingShape, device: KnownDevice, received: float) -> list[str]:
    """What context parallelism adds: the exchange of keys and values, and attention to other ranks' tokens."""
    if shape.context_parallel == 1:
        return []
    rate = device.nvlink_gbps / 2 * 1e9
    time = f", {received / rate * 1e3:,.0f} ms at {rate / 1e9:g} GB/s, added to the time above" if rate else ""
    if shape.context_parallel > shape.ranks_per_node:
        time = ", partly from other machines"
    ranks = shape.context_parallel
    return [
        f"Context parallelism: {ranks} GPUs compute {shape.pack_tokens:,} tokens together. Each receives "
        f"{received / 1e9:.2f} GB of keys, values and their gradients per micro-batch{time}. Attention above is that "
        f"of a rank's own tokens to each other; to those of all ranks it takes up to {ranks} times as long."
    ]


def _device_of(shape: TrainingShape) -> KnownDevice:
    known = next((each for each in known_devices().values() if each.device_name == shape.device_name), None)
    if known is None:
        names = ", ".join(sorted(each.device_name for each in known_devices().values()))
        raise RecipeError([f"--cost: no rates are known of {shape.device_name}; choose a --shape of {names}"])
    return known
