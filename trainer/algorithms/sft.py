"""Supervised fine-tuning: the negative log-likelihood of given tokens.

    L(theta) = -weight * log(policy)

To be divided by the sum of the weights over the step and all ranks.
"""

from __future__ import annotations

from torch import Tensor

from trainer.algorithms.terms import PolicyTerms


def sft(logprobs: Tensor, weights: Tensor) -> PolicyTerms:
    """Return the terms of every trained token.

    Args:
        logprobs: [N] log-probability of each token under the policy, with gradient.
        weights: [N] how much the token counts.
    """
    assert logprobs.ndim == 1
    assert logprobs.shape == weights.shape
    return PolicyTerms(loss=-logprobs * weights, metrics={})
