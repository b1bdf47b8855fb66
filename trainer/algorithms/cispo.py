"""Clipped importance-sampling-weight policy optimization (MiniMax-M1, arXiv:2506.13585).

    L(theta) = -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log(policy) + kl_coef * KL(policy || reference)
    ratio    = policy / old, of the token

The bounds limit how much a token weighs; no token loses its gradient, not even a rare one that became much likelier.
"""

from __future__ import annotations

from trainer.algorithms.kl import bounded_ratio
from trainer.algorithms.terms import PolicyTerms, PolicyTokens, penalize
from trainer.config.presets import KLEstimator


def cispo(
    tokens: PolicyTokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: KLEstimator
) -> PolicyTerms:
    """Return the CISPO terms of every trained token; here `clip_frac` counts weights that a bound changed.

    Args:
        tokens: What is known of each token.
        clip_low: No token weighs less than 1 - clip_low; 1.0 is no bound, as in the paper.
        clip_high: No token weighs more than 1 + clip_high.
        kl_coef: Weight of the penalty on KL(policy || reference).
        kl_estimator: Which penalty, see `kl`.
    """
    ratio = bounded_ratio(tokens.logprobs, tokens.old_logprobs).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy_loss = -weight * tokens.advantages * tokens.logprobs
    return penalize(tokens, policy_loss, weight != ratio, kl_coef=kl_coef, kl_estimator=kl_estimator)
