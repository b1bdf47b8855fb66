"""Inputs and outputs of the loss formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor


@final
@dataclass(frozen=True)
class PolicyTokens:
    """The trained tokens of whole completions, packed: every tensor is [N], nothing is padding.

    Two completions of 2 and 3 tokens, the first better than its group, as the policy begins to move:

        sequence_ids   [0, 0, 1, 1, 1]
        advantages     [0.7, 0.7, -0.7, -0.7, -0.7]
        logprobs       [-1.1, -0.3, -2.0, -0.9, -0.1]
        old_logprobs   [-1.2, -0.3, -1.9, -0.9, -0.1]
    """

    logprobs: Tensor
    """Under the policy, with gradient."""
    old_logprobs: Tensor
    """Under the policy as the step began, without gradient."""
    ref_logprobs: Tensor
    """Under the reference, without gradient."""
    advantages: Tensor
    """Advantage of the token's rollout."""
    sequence_ids: Tensor
    """Long, from 0: the completion of each token. All tokens of a completion are in one call."""
    sampler_weights: Tensor | None = None
    """Factor of the policy loss, see `mismatch`; None is 1."""
    num_sequences: int | None = None
    """All `sequence_ids` are below it; None: found by reading them, which waits for a GPU."""

    def __post_init__(self) -> None:
        tensors = [self.logprobs, self.old_logprobs, self.ref_logprobs, self.advantages, self.sequence_ids]
        tensors += [] if self.sampler_weights is None else [self.sampler_weights]
        # [N] with [N, 1] would broadcast to [N, N] and give a wrong loss without an error.
        assert all(tensor.ndim == 1 and tensor.shape == self.logprobs.shape for tensor in tensors)


@final
@dataclass(frozen=True)
class PolicyLossTerms:
    """What a formula returns, per token."""

    loss: Tensor
    """[N] with gradient: the policy loss, without KL penalty."""
    is_clipped: Tensor
    """[N] bool: where a bound on the ratio took effect."""


@final
@dataclass(frozen=True)
class LossTerms:
    """Loss and metrics per token, unreduced."""

    loss: Tensor
    """[N] with gradient."""
    metrics: Mapping[str, Tensor]
    """[N] each, detached; logged as means over the step's trained tokens."""


class Algorithm(Protocol):
    """A policy loss formula."""

    def __call__(self, tokens: PolicyTokens, *, clip_low: float, clip_high: float) -> PolicyLossTerms:
        """Return the policy loss of every token.

        Args:
            tokens: Logprobs, advantages and completion of each token.
            clip_low: The ratio is bounded below by 1 - clip_low.
            clip_high: The ratio is bounded above by 1 + clip_high.
        """


def is_clipped_pessimistically(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Return where min(ratio * A, clip(ratio) * A) is the constant side, which has no gradient: [N] bool.

    Args:
        ratio: [N] policy / old.
        advantages: [N].
        clip_low: The ratio is bounded below by 1 - clip_low.
        clip_high: The ratio is bounded above by 1 + clip_high.
    """
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))
