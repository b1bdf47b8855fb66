"""What every sampler takes and gives: token in, token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

from trainer.model.policy import Policy
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

    def at_step(self, step: int) -> SamplingParams:
        """The same with the noise of another step."""
        return replace(self, step=step)

    def for_evaluation(self, seed_offset: int) -> SamplingParams:
        """The same with a noise that no training step uses and that is equal at every evaluation."""
        return replace(self, seed=self.seed + seed_offset, step=0)


class Sampler(Protocol):
    """An engine that draws completions with the policy's weights."""

    def publish(self, policy: Policy, version: int) -> None:
        """Take the policy's weights; completions carry `version` from now on."""

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw `num_samples` completions of each request; lists stand in the order of the requests.

        Logprobs are of the untruncated distribution at `params.temperature`, whatever top_p, top_k and min_p say.
        """

    def text_of(self, completion: Completion) -> str:
        """What was drawn as text, without special tokens: for rewards and people, never tokenized again."""
