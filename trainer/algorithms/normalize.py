"""How a step's per-token terms become one loss.

    loss of the step = sum of weight * term over all ranks / sum of denominators over all ranks

    normalizer   weight                         denominator                     is the average of
    token        1                              tokens                          DAPO (arXiv:2503.14476), CISPO
    sequence     1 / tokens of its completion   completions                     GRPO (arXiv:2402.03300), GSPO
    constant     1                              completions * the token limit   Dr. GRPO (arXiv:2503.20783)

Weights depend on the token's own completion only and denominators add up: micro-batches and ranks change no loss.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from trainer.config.presets import Normalizer


def token_weights(normalizer: Normalizer, sequence_ids: Tensor) -> Tensor:
    """Return the weight of every token, [N] float32.

    Args:
        normalizer: What to average over.
        sequence_ids: [N] which completion each token is in, from 0; completions must be whole.
    """
    if normalizer == "sequence":
        return torch.bincount(sequence_ids)[sequence_ids].float().reciprocal()
    return torch.ones_like(sequence_ids, dtype=torch.float32)


def denominator(normalizer: Normalizer, *, num_tokens: int, num_sequences: int, max_completion_tokens: int) -> int:
    """Return what this part of the step adds to the denominator.

    Args:
        normalizer: What to average over.
        num_tokens: Trained tokens in this part.
        num_sequences: Completions in this part, including any without a trained token.
        max_completion_tokens: The limit under which completions were drawn.
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
