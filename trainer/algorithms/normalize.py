"""Normalizers: how the per-token terms of a step become one loss.

    loss of the step = sum of weight * term over all ranks / sum of denominators over all ranks

    normalizer   weight                         denominator                     is the average of
    token        1                              tokens                          DAPO (arXiv:2503.14476), CISPO
    sequence     1 / tokens of its completion   completions                     GRPO (arXiv:2402.03300), GSPO
    constant     1                              completions * the token limit   Dr. GRPO (arXiv:2503.20783)

A weight depends on the token's own completion only and denominators add up, so the split into micro-batches and ranks
does not change the loss.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from trainer.config.presets import Normalizer


def token_weights(normalizer: Normalizer, sequence_ids: Tensor, num_sequences: int | None = None) -> Tensor:
    """Return the weight of every token, [N] float32.

    Args:
        normalizer: What to average over.
        sequence_ids: [N] completion of each token, from 0; completions must be whole.
        num_sequences: All ids are below it; None: found by reading them, which waits for a GPU.
    """
    if normalizer == "sequence":
        return sequence_sizes(sequence_ids, num_sequences)[sequence_ids].float().reciprocal()
    return torch.ones_like(sequence_ids, dtype=torch.float32)


def sequence_sizes(sequence_ids: Tensor, num_sequences: int | None = None) -> Tensor:
    """Return the tokens of each completion, long.

    Args:
        sequence_ids: [N] completion of each token, from 0.
        num_sequences: All ids are below it; None: found by reading them, which waits for a GPU.
    """
    if num_sequences is None:
        return torch.bincount(sequence_ids)
    return sequence_ids.new_zeros(num_sequences).scatter_add_(0, sequence_ids, torch.ones_like(sequence_ids))


def denominator(normalizer: Normalizer, *, num_tokens: int, num_sequences: int, max_completion_tokens: int) -> int:
    """Return the contribution of a part of the step to the denominator.

    Args:
        normalizer: What to average over.
        num_tokens: Trained tokens in this part.
        num_sequences: Completions in this part, including any without a trained token.
        max_completion_tokens: The sampling limit of the recipe.
    """
    match normalizer:
        case "token":
            return num_tokens
        case "sequence":
            return num_sequences
        case "constant":
            return num_sequences * max_completion_tokens
        case _:
            assert_never(normalizer)
