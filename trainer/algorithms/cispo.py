"""Clipped importance-sampling-weight policy optimization (MiniMax-M1, arXiv:2506.13585).

    L(theta) = -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log(policy)
    ratio    = policy / old, of the token; sg stops the gradient

The bounds limit the weight of a token; every token keeps its gradient, also a rare one that became much likelier.
"""

from __future__ import annotations

from trainer.algorithms.kl import bounded_ratio
from trainer.algorithms.terms import PolicyLossTerms, PolicyTokens


def cispo(tokens: PolicyTokens, *, clip_low: float, clip_high: float) -> PolicyLossTerms:
    """Return the CISPO loss of every trained token; `is_clipped` marks weights that a bound changed.

    Args:
        tokens: Logprobs, advantages and completion of each token.
        clip_low: The smallest weight is 1 - clip_low; 1.0 is no bound, as in the paper.
        clip_high: The largest weight is 1 + clip_high.
    """
    ratio = bounded_ratio(tokens.logprobs, tokens.old_logprobs).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLossTerms(-weight * tokens.advantages * tokens.logprobs, weight != ratio)
