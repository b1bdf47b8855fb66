"""What goes into a loss formula and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from trainer.algorithms.kl import k1, k3, kl_penalty
from trainer.config.presets import KLEstimator


@final
@dataclass(frozen=True)
class PolicyTokens:
    """The trained tokens of whole completions, packed: every tensor is [N], nothing is padding."""

    logprobs: Tensor
    """Under the policy, with gradient."""
    old_logprobs: Tensor
    """Under the policy as the step began, without gradient."""
    ref_logprobs: Tensor
    """Under the reference, without gradient."""
    advantages: Tensor
    """Of the rollout that the token is in."""
    sequence_ids: Tensor
    """Which completion the token is in, a long from 0; a completion is never split over calls."""
    sampler_weights: Tensor | None = None
    """Factor of the policy's part of the loss, see `mismatch`; None is 1."""

    def __post_init__(self) -> None:
        tensors = [self.logprobs, self.old_logprobs, self.ref_logprobs, self.advantages, self.sequence_ids]
        tensors += [] if self.sampler_weights is None else [self.sampler_weights]
        # [N] against [N, 1] would broadcast to [N, N] and train on nonsense.
        assert all(tensor.ndim == 1 and tensor.shape == self.logprobs.shape for tensor in tensors)


@final
@dataclass(frozen=True)
class PolicyTerms:
    """One loss and its measurements per token, unreduced."""

    loss: Tensor
    """[N] with gradient."""
    metrics: Mapping[str, Tensor]
    """[N] each, detached; to be averaged over the step's trained tokens."""


class Algorithm(Protocol):
    """A policy loss: a formula of its own, selectable by name."""

    def __call__(
        self, tokens: PolicyTokens, *, clip_low: float, clip_high: float, kl_coef: float, kl_estimator: KLEstimator
    ) -> PolicyTerms:
        """Return the terms of every token."""


def penalize(
    tokens: PolicyTokens, policy_loss: Tensor, is_clipped: Tensor, *, kl_coef: float, kl_estimator: KLEstimator
) -> PolicyTerms:
    """Add the penalty on the distance from the reference, and measure; the same for every algorithm.

    Args:
        tokens: The inputs of the algorithm.
        policy_loss: [N] the algorithm's own part of the loss.
        is_clipped: [N] bool, where the bounds on the ratio changed the gradient.
        kl_coef: Weight of the penalty.
        kl_estimator: Which penalty, see `kl`.
    """
    if tokens.sampler_weights is not None:
        policy_loss = policy_loss * tokens.sampler_weights
    penalty = kl_penalty(tokens.logprobs, tokens.old_logprobs, tokens.ref_logprobs, kl_estimator)
    logprobs = tokens.logprobs.detach()
    old_to_policy = logprobs - tokens.old_logprobs
    policy_to_ref = tokens.ref_logprobs - logprobs
    return PolicyTerms(
        loss=policy_loss + kl_coef * penalty,
        metrics={
            "ppo_kl": k3(old_to_policy),
            "ppo_kl_k1": k1(old_to_policy),
            "ref_kld": k3(policy_to_ref),
            "ref_kld_k1": k1(policy_to_ref),
            "clip_frac": is_clipped.to(logprobs.dtype),
        },
    )


def is_clipped_pessimistically(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return where min(ratio * A, clip(ratio) * A) takes its constant side, without gradient: [N] bool."""
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
