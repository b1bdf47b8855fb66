"""Group sequence policy optimization (arXiv:2507.18071): one ratio per completion, its geometric mean.

    L(theta) = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * KL(policy || reference)
    ratio    = sg(s) * policy / sg(policy)                 of the token, the paper's GSPO-token: its value is s
    s        = exp(mean over the completion's tokens of log(policy / old))

sg stops the gradient. So a term has its gradient, -s * A where it is not clipped, in its own token only, and the sum
over a completion has the gradient of the paper's sequence form. Clipping takes or leaves whole completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.kl import LOG_RATIO_BOUND
from trainer.algorithms.terms import PolicyTerms, PolicyTokens, is_clipped_pessimistically, penalize
from trainer.config.presets import KLEstimator


def gspo(
    tokens: PolicyTokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: KLEstimator
) -> PolicyTerms:
    """Return the GSPO terms of every trained token.

    Args:
        tokens: What is known of each token; completions must be whole.
        clip_low: Bound of the completion's ratio below, 1 - clip_low.
        clip_high: Bound of the completion's ratio above, 1 + clip_high.
        kl_coef: Weight of the penalty on KL(policy || reference), which stays a matter of tokens.
        kl_estimator: Which penalty, see `kl`.
    """
    log_ratio = sequence_means((tokens.logprobs - tokens.old_logprobs).detach(), tokens.sequence_ids)
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = (log_ratio + (tokens.logprobs - tokens.logprobs.detach())).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
    is_clipped = is_clipped_pessimistically(ratio, tokens.advantages, clip_low, clip_high)
    return penalize(tokens, -surrogate, is_clipped, kl_coef=kl_coef, kl_estimator=kl_estimator)


def sequence_means(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return, for every token, the mean of `values` over its completion: [N]."""
    num_tokens = torch.bincount(sequence_ids)
    # In float64, so that the order of a sum does not decide which side of a bound of 3e-4 a completion is on.
    sums = torch.zeros_like(num_tokens, dtype=torch.float64).index_add_(0, sequence_ids, values.double())
    return (sums[sequence_ids] / num_tokens[sequence_ids]).to(values.dtype)
