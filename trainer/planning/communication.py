"""Bytes that a rank exchanges in a step of a sharded model; for the cost report. Torch-free.

As `distributed/sharding.py` shards: every layer is gathered for the forward pass and again for the backward pass, and
so is what lies outside of the layers (embedding, last norm, head). A collective over n ranks brings a rank (n - 1) / n
of the whole; an all-reduce brings it twice that. tests/unit/test_communication.py counts the collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from trainer.config.shape import TrainingShape
from trainer.planning.activations import Recomputed
from trainer.planning.model_facts import ModelFacts

COMPUTE_BYTES: Final = 2
"""Parameters are gathered in the compute dtype."""
GRADIENT_BYTES: Final = 4
"""Gradients are summed in float32."""


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


def exchanged(shape: TrainingShape, params: int, adapter_params: int | None) -> Exchanged:
    """What a rank of a shape receives.

    Args:
        shape: ranks, and over which of them the model is sharded.
        params: of the base model.
        adapter_params: trained parameters of the adapter; None: every parameter of the base is trained.
    """
    shards, ranks = shape.num_shards, shape.num_ranks
    copies = ranks // shards
    gathered = 2.0 * COMPUTE_BYTES * params * _others(shards)
    if adapter_params is not None:
        return Exchanged(gathered, 0.0, 0.0, 2.0 * GRADIENT_BYTES * adapter_params * _others(ranks))
    if shards == 1:
        return Exchanged(0.0, 0.0, 0.0, 2.0 * GRADIENT_BYTES * params * _others(ranks))
    scattered = GRADIENT_BYTES * params * _others(shards)
    between = 2.0 * GRADIENT_BYTES * params / shards * _others(copies)
    return Exchanged(gathered, scattered, between, 0.0)


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
