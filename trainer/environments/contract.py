"""The environment interface: what users write, and the records that it exchanges.

    class Guess:
        def reset(self, row, *, seed):            # the first messages, once per rollout
            self.secret = row["secret"]
            return Start([{"role": "user", "content": "Guess a number from 1 to 8."}])

        def step(self, turn):                     # what the policy gets back for a turn
            is_right = turn.text.strip() == str(self.secret)
            return Observation([{"role": "user", "content": "No."}], done=is_right, reward=float(is_right))

`close()` is optional. `group_rewards(rollouts)`, a static or class method, is optional too: it compares the finished
rollouts of a group. An environment is an object per rollout; it is never shared and never used from two threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, final

from trainer.types import FinishReason, Row, ToolCall

Message: TypeAlias = Mapping[str, Any]
"""A chat message: `role`, `content`, and `tool_calls` or the fields of a tool's result."""

__all__ = ["Environment", "FinishedRollout", "Message", "Observation", "Start", "ToolCall", "Turn"]


@final
@dataclass(frozen=True)
class Start:
    """What a rollout begins with.

    >>> Start([{"role": "user", "content": "Guess a number from 1 to 8."}]).tools
    ()
    """

    messages: Sequence[Message]
    """The prompt; its last message is by the user, or a tool's result."""
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = ()
    """Typed functions that the policy may call, in addition to the recipe's `rollout.tools`. Or all are schemas,
    `{"type": "function", "function": {"name", "description", "parameters"}}`: then the environment runs them itself,
    and `step` gets the turns with calls."""


@final
@dataclass(frozen=True)
class Turn:
    """What the policy said."""

    number: int
    """From 0."""
    text: str
    """Without the stop token."""
    message: Message
    """The text as an assistant's message, with the tool calls that could be read."""
    finish: FinishReason
    calls: tuple[ToolCall, ...] = ()


@final
@dataclass(frozen=True)
class Observation:
    """What the policy gets back for a turn.

    >>> Observation([{"role": "user", "content": "Too low."}], done=False).reward is None
    True
    """

    messages: Sequence[Message]
    """Untrained; may be empty with `done`."""
    done: bool
    reward: float | None = None
    """Of this turn; the rollout's reward is the sum over its turns. None adds nothing."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Logged as `environment/name`, summed over the turns."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Recorded in the journal with the turn, for people; JSON values."""


@final
@dataclass(frozen=True)
class FinishedRollout:
    """A rollout of a group as `group_rewards` sees it."""

    row: Row
    messages: Sequence[Message]
    reward: float | None
    """Sum of its turns' rewards."""
    stop: str


class Environment(Protocol):
    """One rollout's surroundings; see the module's docstring."""

    def reset(self, row: Row, *, seed: int) -> Start:
        """Begin.

        Args:
            row: of the training or held-out data.
            seed: a function of the run's seed, the step, the row and the sample; all randomness must come from it.
        """

    def step(self, turn: Turn) -> Observation:
        """Answer a turn of the policy."""
