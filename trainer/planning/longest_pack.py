"""The longest micro-batch that a recipe can make on a shape."""

from __future__ import annotations

import math

from trainer.config.recipe import Recipe
from trainer.config.shape import TrainingShape


def longest_pack(recipe: Recipe, shape: TrainingShape) -> list[int]:
    """Lengths in tokens of the sequences of the fullest micro-batch: as many of the longest as the budget takes.

    A rank has no more sequences than its part of a minibatch. A sequence longer than the budget stands alone.
    """
    longest, budget = recipe.data.max_seq_tokens, shape.micro_batch_tokens
    sequences = recipe.rows_per_step
    if recipe.rollout is not None:
        minibatches = recipe.algorithm.minibatches_per_step if recipe.algorithm is not None else 1
        sequences = sequences * recipe.rollout.group_size // minibatches
    sequences = math.ceil(sequences / shape.num_ranks)
    whole = max(1, min(sequences, budget // longest))
    rest = budget - whole * longest if whole < sequences else 0
    return [longest] * whole + ([rest] if rest > 1 else [])
