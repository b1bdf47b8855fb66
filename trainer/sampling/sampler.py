"""What every sampler takes and gives: token in, token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from trainer.config.recipe import RolloutSettings
from trainer.policy import Policy
from trainer.types import Completion


@final
@dataclass(frozen=True)
class SampleRequest:
    """A prompt, and how many completions of it are wanted."""

    prompt_ids: tuple[int, ...]
    row: int
    """Index of the row, which names the prompt in the noise."""
    num_samples: int
    """G."""
    first_sample: int = 0
    """Number of the first completion in the noise; further draws of the same row in the same step begin higher."""


@final
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and where a completion ends."""

    max_completion_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end a completion and belong to it."""
    seed: int
    step: int
    temperature: float = 1.0
    """Of drawing and of the logprobs that are recorded."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Strings that end a completion with the token that completes them."""
    is_greedy: bool = False
    """Take the likeliest token, for evaluation; top_p, top_k and min_p are then without effect."""

    @classmethod
    def of_rollout(cls, settings: RolloutSettings, stop_ids: frozenset[int], *, seed: int, step: int) -> SamplingParams:
        """What a recipe's `rollout` says, in one step of a run."""
        return cls(
            max_completion_tokens=settings.max_completion_tokens,
            stop_ids=stop_ids,
            seed=seed,
            step=step,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            stop=tuple(settings.stop),
        )


class Sampler(Protocol):
    """An engine that draws completions with the policy's weights."""

    def publish(self, policy: Policy, version: int) -> None:
        """Take the policy's weights; completions carry `version` from now on."""

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw `num_samples` completions of each request; lists stand in the order of the requests.

        Logprobs are of the untruncated distribution at `params.temperature`, whatever top_p, top_k and min_p say.
        """
