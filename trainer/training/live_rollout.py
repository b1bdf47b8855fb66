"""A rollout with several turns in progress: its sequences, turns and messages. For conversations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from trainer.data.template import opened_thinking
from trainer.environments.pool import OpenEnvironment
from trainer.environments.tool_calls import ParsedTurn
from trainer.model.turn_cache import TurnCache
from trainer.sampling.sampler import SampleRequest
from trainer.types import Completion, Conversation, DrawnSequence, Rollout, Row, StopReason, TurnSpan

CONVERSATION: Final = "conversation"
"""Field under which rewards find the messages of a rollout in its row."""


@final
@dataclass
class SequenceInProgress:
    """A token sequence in progress."""

    ids: list[int]
    mask: list[bool]
    logprobs: list[float] = field(default_factory=list)

    def extend(self, ids: Sequence[int], *, drawn: bool) -> None:
        """Append ids that the policy drew, or was given."""
        self.ids += ids
        self.mask += [drawn] * len(ids)

    def frozen(self) -> DrawnSequence:
        """As a record."""
        return DrawnSequence(tuple(self.ids), tuple(self.mask), tuple(self.logprobs))


@final
@dataclass
class LiveRollout:
    """A rollout in progress."""

    row: Row
    sample: int
    remote: OpenEnvironment
    began: float = field(default_factory=time.monotonic)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    tools: tuple[Mapping[str, Any], ...] = ()
    num_prompt: int = 0
    prompt_text: str = ""
    sequences: list[SequenceInProgress] = field(default_factory=list)
    turns: list[TurnSpan] = field(default_factory=list)
    drawn: tuple[int, ...] = ()
    """Ids of the last turn."""
    drawn_text: str = ""
    """Their text, without special tokens."""
    prefilled: str = ""
    """Thinking that the prompt of the last turn opens for it."""
    parsed: ParsedTurn = field(default_factory=lambda: ParsedTurn({}))
    """The last turn as a message and calls."""
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    stop: StopReason | None = None
    failure: str | None = None
    version: int = 0
    cache: TurnCache = field(default_factory=TurnCache)
    """What the local sampler has read of the last sequence."""

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(len(each.ids) for each in self.sequences)

    @property
    def text(self) -> str:
        """The last turn, as rewards and environments see it: with the thinking that its prompt opens."""
        return self.prefilled + self.drawn_text

    def request(self, turn: int) -> SampleRequest:
        """What the sampler is asked for as this turn."""
        return SampleRequest(tuple(self.sequences[-1].ids), self.row.index, 1, self.sample, turn, self.cache)

    def die(self, error: Exception | str) -> None:
        """End as a failed rollout."""
        self.stop, self.failure = "environment_died", f"environment on {self.row}: {error}"

    def take(self, completion: Completion, turn: int) -> None:
        """Append a drawn turn to the last sequence.

        Args:
            completion: the turn.
            turn: its number.
        """
        sequence = self.sequences[-1]
        begin = len(sequence.ids)
        sequence.extend(completion.token_ids, drawn=True)
        sequence.logprobs += completion.logprobs
        self.drawn, self.version = completion.token_ids, completion.policy_version
        self.drawn_text = completion.text
        self.prefilled = opened_thinking(self.prompt_text)
        self.turns.append(TurnSpan(turn, len(self.sequences) - 1, begin, len(sequence.ids), completion.finish_reason))

    def forget_undrawn(self) -> None:
        """Remove what follows the last drawn token: a prompt that nothing answers."""
        last = self.sequences[-1]
        if not any(last.mask):
            self.sequences.pop()
            return
        end = len(last.mask) - last.mask[::-1].index(True)
        del last.ids[end:], last.mask[end:]

    def rollout(self) -> Rollout:
        """What is trained and recorded of it."""
        first, *later = [sequence.frozen() for sequence in self.sequences] or [DrawnSequence((), (), ())]
        stop = self.stop or "done"
        is_cut = stop in ("length", "max_tokens")
        return Rollout(
            token_ids=first.token_ids,
            loss_mask=first.loss_mask,
            sampler_logprobs=first.sampler_logprobs,
            finish_reason="length" if is_cut else "stop",
            policy_version=self.version,
            text=self.drawn_text,
            conversation=Conversation(
                tuple(self.messages), self.num_prompt, tuple(self.turns), stop, tuple(later), self.tools
            ),
        )

    def compared(self) -> dict[str, Any]:
        """The rollout as `group_rewards` gets it."""
        row = {"fields": dict(self.row.fields), "file": self.row.file, "line": self.row.line, "index": self.row.index}
        return {"row": row, "messages": self.messages, "reward": self.reward, "stop": self.stop}

    def judged(self) -> tuple[str, Row]:
        """Text and row as reward functions get them."""
        return self.text, replace(self.row, fields={**self.row.fields, CONVERSATION: list(self.messages)})
