"""Records passed between rooms: rows, completions, rollouts, groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

FinishReason = Literal["stop", "length"]
CallStatus = Literal["ok", "invalid_json", "unclosed", "unknown_tool", "bad_arguments"]
StopReason = Literal["done", "max_turns", "max_tokens", "length", "time", "environment_died"]
"""Why a rollout of several turns ended."""


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
class MissingFieldError(KeyError):
    """A row has no such nested field; says where the dotted path ends."""

    def __init__(self, name: str, what_is_there: str) -> None:
        """Keep the name."""
        super().__init__(name)
        self.name, self.what_is_there = name, what_is_there

    def __str__(self) -> str:
        return f"no field `{self.name}`: {self.what_is_there}"


def read_field(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a row, or of a field: `reward_model.ground_truth`; a number counts the entries of a list.

    >>> row = {"reward_model": {"ground_truth": "4"}, "a.b": 1, "options": [{"text": "x"}]}
    >>> read_field(row, "reward_model.ground_truth"), read_field(row, "a.b"), read_field(row, "options.0.text")
    ('4', 1, 'x')
    >>> read_field(row, "reward_model.gold")
    Traceback (most recent call last):
    trainer.types.MissingFieldError: no field `reward_model.gold`: `reward_model` has ground_truth

    A field of the row whose own name is `name`, dots and all, is meant before any nested one.

    Args:
        fields: of the row.
        name: with dots between the levels.

    Raises:
        MissingFieldError: there is none, though the name has dots.
        KeyError: there is none.
    """
    if name in fields or "." not in name:
        return fields[name]
    value: Any = fields
    path = name.split(".")
    for depth, part in enumerate(path):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise MissingFieldError(name, _what_is_there(value, path[:depth]))
    return value


def has_field(fields: Mapping[str, Any], name: str) -> bool:
    """Whether `read_field` finds it."""
    try:
        read_field(fields, name)
    except KeyError:
        return False
    return True


def _what_is_there(value: object, path: Sequence[str]) -> str:
    where = f"`{'.'.join(path)}`" if path else "the row"
    if isinstance(value, Mapping):
        return f"{where} has {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"{where} is a list of {len(value)}"
    return f"{where} is {'null' if value is None else type(value).__name__}"


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
class ToolCall:
    """A call of a tool as the policy wrote it.

    >>> ToolCall("call_0", "add", {"a": 1}, "bad_arguments", problem="b: field required").status
    'bad_arguments'
    """

    id: str
    name: str
    """Empty where it could not be read."""
    arguments: Mapping[str, Any]
    """As written; empty where they could not be read."""
    status: CallStatus
    problem: str = ""
    """What is wrong with the call, in words for the policy; empty with `ok`."""


@final
@dataclass(frozen=True)
class DrawnSequence:
    """Token ids as the policy was given and drew them, and which of them it drew."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """One per token: whether the policy drew it, so that it is trained."""
    sampler_logprobs: tuple[float, ...]
    """One per drawn token, as many as `loss_mask` has True."""


@final
@dataclass(frozen=True)
class TurnSpan:
    """Where a turn of a rollout lies among its tokens, and what it earned.

    The completion above as the first turn of a conversation: tokens 2 to 4 of sequence 0.

    >>> TurnSpan(0, sequence=0, begin=2, end=5, finish="stop", reward=1.0).end
    5
    """

    number: int
    sequence: int
    begin: int
    end: int
    """The token after its last one."""
    finish: FinishReason
    reward: float | None = None
    """What the environment gave for this turn; None if nothing."""
    calls: tuple[ToolCall, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    """`Observation.info`."""
    seconds: float = 0.0
    """That the environment took to answer."""


@final
@dataclass(frozen=True)
class Conversation:
    """What a rollout of several turns has in addition to its first sequence."""

    messages: tuple[Mapping[str, Any], ...]
    """All of them: prompt, turns and observations."""
    num_prompt: int
    """Messages of the prompt."""
    turns: tuple[TurnSpan, ...]
    stop: StopReason
    later: tuple[DrawnSequence, ...] = ()
    """Sequences after the first one: a new one begins where the chat template rewrites what was said before."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the policy could call."""


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
    conversation: Conversation | None = None
    """Of a rollout with an environment or tools; None of a single completion."""

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
    def sequences(self) -> tuple[DrawnSequence, ...]:
        """All token sequences: one, unless the chat template rewrote earlier turns."""
        later = self.conversation.later if self.conversation is not None else ()
        return DrawnSequence(self.token_ids, self.loss_mask, self.sampler_logprobs), *later

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew."""
        return sum(len(sequence.sampler_logprobs) for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


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
