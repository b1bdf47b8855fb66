"""The largest micro-batch of a recipe on a shape."""

from __future__ import annotations

import math

from trainer.config.recipe import Recipe, RFTRecipe
from trainer.config.shape import TrainingShape


def longest_pack(recipe: Recipe, shape: TrainingShape) -> list[int]:
    """Return the sequence lengths in tokens of the largest micro-batch: greedily, as many of maximum length as fit.

    A rank has at most its share of the sequences of a minibatch. A sequence longer than the budget is alone in a pack.
    With max_seq_tokens 300 and 1,024 tokens per micro-batch the lengths are [300, 300, 300, 124]. With context
    parallelism it is the whole pack, of which each rank has a slice.

    Args:
        recipe: Maximum sequence length and sequences per step.
        shape: Tokens per micro-batch and number of ranks.
    """
    longest, budget = recipe.data.max_seq_tokens, shape.pack_tokens
    sequences = recipe.rows_per_step
    if isinstance(recipe, RFTRecipe):
        sequences = sequences * recipe.rollout.group_size // recipe.algorithm.minibatches_per_step
    sequences = math.ceil(sequences / shape.num_shares)
    whole = max(1, min(sequences, budget // longest))
    rest = budget - whole * longest if whole < sequences else 0
    return [longest] * whole + ([rest] if rest > 1 else [])
