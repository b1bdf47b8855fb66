"""Supervised fine-tuning: the negative log-likelihood of given tokens.

    L(theta) = -weight * log(policy)

The denominator is the sum of the weights over the step and all ranks.
"""

from __future__ import annotations

from torch import Tensor

from trainer.algorithms.terms import LossTerms


def sft(logprobs: Tensor, weights: Tensor) -> LossTerms:
    """Return the loss of every trained token.

    Args:
        logprobs: [N] log-probability of each token under the policy, with gradient.
        weights: [N] weight of each token in the loss.
    """
    assert logprobs.ndim == 1
    assert logprobs.shape == weights.shape
    return LossTerms(loss=-logprobs * weights, metrics={})
