"""The sampler protocol: token ids in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol, final

from transformers import PreTrainedTokenizerBase

from trainer.model.turn_cache import TurnCache
from trainer.types import Completion

if TYPE_CHECKING:
    from trainer.model.policy import Policy

MAX_CONCURRENT: Final = 64
"""Requests of one rank to servers at the same time; a server queues and batches them."""


@final
@dataclass(frozen=True)
class SampleRequest:
    """A prompt, and how many completions to draw for it."""

    prompt_ids: tuple[int, ...]
    row: int
    """Index of the row; selects the noise of the prompt."""
    num_samples: int
    """The group size, G."""
    first_sample: int = 0
    """Index of the first completion in the row's noise; later groups of the same row and step start higher."""
    turn: int = 0
    """Turn of the conversation, from 0; each has noise of its own."""
    cache: TurnCache | None = field(default=None, compare=False, repr=False)
    """Where the local sampler keeps what the conversation has read; with it `num_samples` is 1."""


@final
@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and what ends a completion."""

    max_completion_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end a completion; the last one is part of it."""
    seed: int
    step: int
    temperature: float = 1.0
    """Of sampling, and of the logprobs that are recorded."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """Strings that end a completion, at the token that completes one of them."""
    is_greedy: bool = False
    """Take the most likely token, for evaluation; top_p, top_k and min_p then have no effect."""

    def at_step(self, step: int) -> SamplingParams:
        """The same parameters with the noise of another step."""
        return replace(self, step=step)

    def for_evaluation(self, seed_offset: int) -> SamplingParams:
        """The same parameters with noise that no training step uses and every evaluation shares."""
        return replace(self, seed=self.seed + seed_offset, step=0)


class Sampler(Protocol):
    """An engine that samples completions with the policy's weights."""

    @property
    def draws_apart(self) -> bool:
        """Whether calls of `sample` may run at the same time, and a completion is the same whatever is drawn beside it.

        In process, the composition of a batch changes the last bits of logprobs.
        """

    def publish(self, policy: Policy, version: int) -> None:
        """Take the policy's current weights; completions carry `version` from now on."""

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        """Draw `num_samples` completions per request; one list per request, in the same order.

        Logprobs are of the untruncated distribution at `params.temperature`, regardless of top_p, top_k and min_p.
        """


def decoded(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion, without special tokens."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text
