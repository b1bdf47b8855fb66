"""The records that pass between modules: rows, completions, rollouts, groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

FinishReason = Literal["stop", "length"]


@final
@dataclass(frozen=True)
class Row(Mapping[str, Any]):
    """One JSONL line: its fields, and where it stands for messages to people.

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
    """The tokens that one sampling call drew after a prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token, under the untruncated distribution at the sampling temperature."""
    finish_reason: FinishReason
    policy_version: int
    """The step whose weights drew it."""


@final
@dataclass(frozen=True)
class Rollout:
    """One token sequence with what was drawn in it and what it earned.

    A single turn is the case of one trained segment; nothing here assumes prompt + completion.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Which tokens the policy drew, of the length of `token_ids`."""
    sampler_logprobs: tuple[float, ...]
    """Of each token; 0.0 where `trained` is False."""
    finish_reason: FinishReason
    policy_version: int
    text: str
    """What the policy drew, decoded: for rewards and people, never tokenized again."""
    reward: float | None
    """Weighted sum of the rewards; None when one of them failed."""
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    """Each reward by name; None where it abstained or failed."""
    failure: str | None = None
    """The traceback of the reward that failed."""


@final
@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt, which are compared with each other."""

    row: Row
    rollouts: tuple[Rollout, ...]

    @property
    def scored(self) -> tuple[Rollout, ...]:
        """The rollouts that have a reward."""
        return tuple(rollout for rollout in self.rollouts if rollout.reward is not None)

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that the group carries no signal."""
        return len({rollout.reward for rollout in self.scored}) < 2
