"""Records passed between rooms: rows, completions, rollouts, groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

FinishReason = Literal["stop", "length"]


@final
@dataclass(frozen=True)
class Row(Mapping[str, Any]):
    """One JSONL line: its fields, and its file and line for messages.

    >>> row = Row({"answer": 4}, file="sums.jsonl", line=7)
    >>> row["answer"], str(row)
    (4, 'sums.jsonl:7')
    """

    fields: Mapping[str, Any]
    file: str = "<row>"
    line: int = 0
    index: int = 0
    """Position in the data set, from 0; a run's row order is a permutation of these."""

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@final
@dataclass(frozen=True)
class Completion:
    """The tokens that a sampler drew after one prompt.

    Three tokens, the last one the stop token, drawn with the weights of step 4:

    >>> four = Completion((19, 13, 2), (-0.25, -1.5, -0.125), finish_reason="stop", policy_version=4, text="4.")
    >>> len(four.token_ids) == len(four.logprobs)
    True
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """One per token, under the untruncated distribution at the sampling temperature."""
    finish_reason: FinishReason
    policy_version: int
    """Step whose weights the sampler used."""
    text: str
    """The tokens decoded without special tokens: for rewards and people, never tokenized again."""


@final
@dataclass(frozen=True)
class Rollout:
    """A token sequence, which of its tokens the policy drew, and what they earned.

    The completion above after the prompt (1, 40), in a group whose mean reward is 0.5:

    >>> four = Completion((19, 13, 2), (-0.25, -1.5, -0.125), finish_reason="stop", policy_version=4, text="4.")
    >>> sampled = Rollout.of_completion((1, 40), four)
    >>> sampled.token_ids, sampled.loss_mask
    ((1, 40, 19, 13, 2), (False, False, True, True, True))
    >>> sampled.sampler_logprobs, sampled.reward
    ((-0.25, -1.5, -0.125), None)

    Scoring adds `reward=1.0, rewards={"last_number": 1.0}`; comparison with its group then adds `advantage=0.5`. The
    mask may have several segments of True, for instance with a tool's answer in between.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """One per token: whether the policy drew it, so that it is trained."""
    sampler_logprobs: tuple[float, ...]
    """One per drawn token, as many as `loss_mask` has True."""
    finish_reason: FinishReason
    policy_version: int
    text: str
    """The drawn tokens decoded: for rewards and people, never tokenized again."""
    reward: float | None = None
    """Weighted sum of the rewards; None before scoring, and when a reward failed."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward by name; None where it abstained or failed."""
    failure: str | None = None
    """Traceback of the reward that failed."""
    advantage: float | None = None
    """The reward relative to the group; None without a reward."""

    @classmethod
    def of_completion(cls, prompt_ids: tuple[int, ...], completion: Completion) -> Rollout:
        """A single-turn rollout that is not scored yet: prompt, then one drawn segment."""
        return cls(
            token_ids=prompt_ids + completion.token_ids,
            loss_mask=(False,) * len(prompt_ids) + (True,) * len(completion.token_ids),
            sampler_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            policy_version=completion.policy_version,
            text=completion.text,
        )

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew."""
        return len(self.sampler_logprobs)


@final
@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt, whose rewards are compared with each other.

    Two completions of one row and their advantages under `mean_only`; a failed third one would have neither reward nor
    advantage:

    >>> right = Rollout((1, 19), (False, True), (-0.25,), "stop", 4, "4", reward=1.0, advantage=0.5)
    >>> wrong = Rollout((1, 20), (False, True), (-1.5,), "stop", 4, "5", reward=0.0, advantage=-0.5)
    >>> Group(Row({"answer": 4}), (right, wrong)).is_flat
    False
    """

    row: Row
    rollouts: tuple[Rollout, ...]

    @property
    def scored(self) -> tuple[Rollout, ...]:
        """The rollouts that have a reward."""
        return tuple(rollout for rollout in self.rollouts if rollout.reward is not None)

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that every advantage is 0."""
        return len({rollout.reward for rollout in self.scored}) < 2
