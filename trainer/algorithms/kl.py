"""Estimates of a KL divergence, and penalties with known gradients.

For a token drawn from p, with d = log q - log p, three estimates of KL(p || q)
(Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html):

    k1 = -d                 unbiased, may be negative
    k2 = d**2 / 2           biased, exact to second order, never negative
    k3 = exp(d) - 1 - d     unbiased, never negative

The gradient of an unbiased estimate need not be an unbiased gradient: differentiating the estimate of a sampled token
leaves out that theta also changes which tokens are sampled. With p = policy and q = reference:

    term in the loss        tokens drawn by   expected gradient is the gradient of
    k1 itself               policy            nothing: it is 0
    "k1", "k2"              policy            KL(policy || reference)
    "k3"                    policy            KL(reference || policy), the other direction
    "k3_corrected"          old               KL(policy || reference)

"k1" has the value of k1 and the gradient of k2, which is that of the score function with k1 as its cost. "k3" is what
GRPO's paper writes. "k3_corrected" is k3 * policy / old, differentiated as a product: DeepSeek-V3.2 (arXiv:2512.02556).
All are per token: the effect of a token on later tokens is left out, as in all these algorithms.
"""

from __future__ import annotations

from typing import Final, assert_never

from torch import Tensor

from trainer.config.presets import KLEstimator

LOG_RATIO_BOUND: Final = 20.0
"""Bound of log ratios (a ratio of 5e8): beyond it the value is constant and the gradient 0, never inf or NaN."""


def k1(log_ratio: Tensor) -> Tensor:
    """Return -d: unbiased, may be negative.

    Args:
        log_ratio: [N] d = log q - log p of tokens drawn from p.
    """
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return d**2 / 2: its gradient is unbiased; d as for `k1`."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(d) - 1 - d: unbiased and never negative; d as for `k1`."""
    # In float64: expm1(d) - d is about d**2 / 2, of which float32 keeps four digits at d = 1e-3 and none at 1e-7.
    bounded = log_ratio.double().clamp(max=LOG_RATIO_BOUND)
    return (bounded.expm1() - bounded).to(log_ratio.dtype)


def bounded_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return policy / old of every token, [N], finite and with a finite gradient whatever the inputs."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def kl_penalty(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Return the penalty of every token; the module's docstring gives the expected gradient of each estimator.

    Args:
        logprobs: [N] under the policy, with gradient.
        old_logprobs: [N] under the old policy; only "k3_corrected" reads it.
        ref_logprobs: [N] under the reference.
        estimator: Which penalty.
    """
    log_ratio = ref_logprobs - logprobs
    match estimator:
        case "k1":
            gradient_of_k2 = k2(log_ratio)
            return gradient_of_k2 + (k1(log_ratio) - gradient_of_k2).detach()
        case "k2":
            return k2(log_ratio)
        case "k3":
            return k3(log_ratio)
        case "k3_corrected":
            return bounded_ratio(logprobs, old_logprobs) * k3(log_ratio)
        case _:
            assert_never(estimator)
