"""Group-relative policy optimization (arXiv:2402.03300), with DAPO's separate clip bounds (arXiv:2503.14476).

    L(theta) = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
    ratio    = policy / old, of the token

Terms are per token; `normalize` says how they are averaged, `policy` adds the KL penalty.
"""

from __future__ import annotations

import torch

from trainer.algorithms.kl import bounded_ratio
from trainer.algorithms.terms import PolicyLossTerms, PolicyTokens, is_clipped_pessimistically


def grpo(tokens: PolicyTokens, *, clip_low: float, clip_high: float) -> PolicyLossTerms:
    """Return the GRPO loss of every trained token.

    Args:
        tokens: Logprobs, advantages and completion of each token.
        clip_low: With a negative advantage, a ratio below 1 - clip_low has no gradient.
        clip_high: With a positive advantage, a ratio above 1 + clip_high has no gradient.
    """
    ratio = bounded_ratio(tokens.logprobs, tokens.old_logprobs)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
    return PolicyLossTerms(-surrogate, is_clipped_pessimistically(ratio, tokens.advantages, clip_low, clip_high))
