"""Group-relative policy optimization (arXiv:2402.03300), with DAPO's separate clip bounds (arXiv:2503.14476).

    L(theta) = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * KL(policy || reference)
    ratio    = policy / old, of the token

Everything here is per token; how tokens are averaged is the normalizer's business.
"""

from __future__ import annotations

import torch

from trainer.algorithms.kl import bounded_ratio
from trainer.algorithms.terms import PolicyTerms, PolicyTokens, is_clipped_pessimistically, penalize
from trainer.config.presets import KLEstimator


def grpo(
    tokens: PolicyTokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: KLEstimator
) -> PolicyTerms:
    """Return the GRPO terms of every trained token.

    Args:
        tokens: What is known of each token.
        clip_low: A ratio below 1 - clip_low gains nothing more from a bad token.
        clip_high: A ratio above 1 + clip_high gains nothing more from a good token.
        kl_coef: Weight of the penalty on KL(policy || reference).
        kl_estimator: Which penalty, see `kl`.
    """
    ratio = bounded_ratio(tokens.logprobs, tokens.old_logprobs)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
    is_clipped = is_clipped_pessimistically(ratio, tokens.advantages, clip_low, clip_high)
    return penalize(tokens, -surrogate, is_clipped, kl_coef=kl_coef, kl_estimator=kl_estimator)
