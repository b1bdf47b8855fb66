"""Bytes that a rank exchanges in a step of a sharded model, and the time that it adds; for the cost report. Torch-free.

As `distributed/sharding.py` shards: every layer is gathered for the forward pass and again for the backward pass; with
full parameters, so is what lies outside of the layers (embedding, last norm, head). A collective over n ranks brings a
rank (n - 1) / n of the whole; an all-reduce brings it twice that. tests/unit/test_communication.py counts the
collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

from trainer.config.devices import KnownDevice
from trainer.config.shape import TrainingShape
from trainer.planning.activations import Recomputed
from trainer.planning.model_facts import ModelFacts
from trainer.planning.module_names import JOINED
from trainer.planning.roofline import BANDWIDTH_FRAC, StepCost

COMPUTE_BYTES: Final = 2
"""Parameters are gathered in the compute dtype."""
GRADIENT_BYTES: Final = 4
"""Gradients are summed in float32."""
LINK_FRAC: Final = (0.6, 0.8)
"""(slow, fast) fractions of NVLink's rate in one direction. Fast: 360 of 450 GB/s, what NCCL's all-gather reaches on
eight H100, as its maintainers expect (NVIDIA/nccl-tests, issue 326). Slow: assumed, while kernels compute."""


@final
@dataclass(frozen=True)
class Exchanged:
    """Bytes that each rank receives, by their place in a step."""

    gathered: float
    """Parameters, in each micro-batch."""
    scattered: float
    """Gradients of full parameters, summed over the ranks of a copy, in each micro-batch."""
    summed_between_copies: float
    """The same between the copies of the model, in each micro-batch."""
    per_step: float
    """Gradients of what every rank holds whole, such as an adapter, in each optimizer step."""

    @property
    def per_micro_batch(self) -> float:
        """Bytes of a micro-batch."""
        return self.gathered + self.scattered + self.summed_between_copies


def exchanged(shape: TrainingShape, params: int, unsplit: int, adapter_params: int | None) -> Exchanged:
    """What a rank of a shape receives.

    Args:
        shape: ranks, and over which of them the model is sharded.
        params: of the base model.
        unsplit: those of them that a frozen base leaves whole on each rank.
        adapter_params: trained parameters of the adapter; None: every parameter of the base is trained.
    """
    shards, ranks = shape.num_shards, shape.num_ranks
    copies = ranks // shards
    split = params if adapter_params is None else params - unsplit
    gathered = 2.0 * COMPUTE_BYTES * split * _others(shards)
    if adapter_params is not None:
        return Exchanged(gathered, 0.0, 0.0, 2.0 * GRADIENT_BYTES * adapter_params * _others(ranks))
    if shards == 1:
        return Exchanged(0.0, 0.0, 0.0, 2.0 * GRADIENT_BYTES * params * _others(ranks))
    scattered = GRADIENT_BYTES * params * _others(shards)
    between = 2.0 * GRADIENT_BYTES * params / shards * _others(copies)
    return Exchanged(gathered, scattered, between, 0.0)


def knows_link(shape: TrainingShape, device: KnownDevice) -> bool:
    """Whether the rate is known at which a rank receives what others hold: over NVLink, inside a machine."""
    is_inside = shape.num_shards <= shape.ranks_per_node and shape.nodes == 1
    return is_inside and device.nvlink_gbps > 0


def sharded_cost(
    cost: StepCost, shape: TrainingShape, device: KnownDevice, facts: ModelFacts, said: Exchanged
) -> StepCost:
    """Return the cost of a micro-batch of a sharded model: with what sharding adds, as parts of the device's time.

    Assumed is FSDP2's order: a layer is gathered while the layer before it computes, forward and backward, and its
    gradient is summed while the next one computes. Communication is hidden as far as computing takes as long, but for
    what nothing is beside: the first layer; and, of full parameters, embedding and head, which are gathered first in
    either pass, and the sum of their gradients at the end. Collectives slow down no kernel. Not included are the host's
    time for FSDP's hooks, and, where `knows_link` is false, all communication.

    Gathered weights are copied out of the collective's buffer, and gradients into one, which is never beside anything.
    In compiled layers the base products of joined adapters are apart, so the gradient of their input is read and
    written once more for each.

    Args:
        cost: of one device with the whole model.
        shape: the ranks; if they hold the whole model each, the cost stays as it is.
        device: of the shape.
        facts: of the model.
        said: what a rank receives.
    """
    if shape.num_shards == 1:
        return cost
    is_full, bandwidth = said.scattered > 0, device.bandwidth_gbps * 1e9 * BANDWIDTH_FRAC
    split = facts.params if is_full else facts.block_params
    copied = 2 * 2 * COMPUTE_BYTES * split + (COMPUTE_BYTES + GRADIENT_BYTES) * split * is_full
    apart = 0 if is_full else sum(len(names) - 1 for names in JOINED)
    summed = 2 * COMPUTE_BYTES * apart * facts.layers * cost.tokens * facts.hidden
    parts = {name: pair for name, pair in cost.parts_s.items() if name != "optimizer"}
    if is_full:  # each rank updates its part
        fast, slow = cost.parts_s["optimizer"]
        parts["optimizer"] = fast / shape.num_shards, slow / shape.num_shards
    parts["copies of gathered weights"] = ((copied + summed) / bandwidth,) * 2
    if knows_link(shape, device):
        ends = facts.embedding_params * is_full
        first = COMPUTE_BYTES * (facts.block_params / facts.layers + 2 * ends) + GRADIENT_BYTES * ends
        rates = [device.nvlink_gbps / 2 * 1e9 * fraction for fraction in reversed(LINK_FRAC)]
        computing = [sum(pair[side] for pair in parts.values()) for side in (0, 1)]
        fast, slow = (
            max(first * _others(shape.num_shards) / rate, said.per_micro_batch / rate - computed)
            for rate, computed in zip(rates, computing, strict=True)
        )
        parts["communication that is not hidden"] = fast, slow
    return replace(cost, parts_s=parts)


def exchanged_in_attention(shape: TrainingShape, facts: ModelFacts, recomputed: Recomputed) -> float:
    """Return the bytes of keys and values, and of their gradients, that each rank receives in a full micro-batch.

    They are gathered in every layer, again where the layer is recomputed, and their gradients are summed in float32.

    Args:
        shape: Ranks that compute a pack together.
        facts: Sizes of the model.
        recomputed: What the backward pass computes again.
    """
    values = 2.0 * facts.layers * facts.key_width * shape.pack_tokens
    passes = 2 if recomputed else 1
    return values * (passes * COMPUTE_BYTES + GRADIENT_BYTES) * _others(shape.context_parallel)


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks
