"""Importance weights for a sampler whose probabilities differ from the trainer's.

An inference engine computes slightly different logprobs from the same weights, so tokens are drawn from `sampler`, not
from `old`. Truncated importance sampling multiplies the policy loss, not the KL penalty, by

    w = min(old / sampler, cap)          of the token, without gradient

(Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; cap 2 there).
"""

from __future__ import annotations

import math

from torch import Tensor

from trainer.algorithms.kl import k3


def truncated_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """Return the weight of every token, [N], detached: `PolicyTokens.sampler_weights`.

    Args:
        old_logprobs: [N] under the policy as the step began, computed by the trainer.
        sampler_logprobs: [N] as recorded by the sampler.
        cap: The largest weight, above 0.
    """
    assert cap > 0
    log_ratio = (old_logprobs - sampler_logprobs).detach()
    return log_ratio.clamp(max=math.log(cap)).exp().clamp(max=cap)


def sampler_kl(old_logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(sampler || old) of every token, [N], detached: `train/sampler_kl`."""
    return k3((old_logprobs - sampler_logprobs).detach())
