"""One rollout inside its process: the user's environment, the tools, and what a turn gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Protocol, final

from trainer.environments.contract import FinishedRollout, Message, Observation, Start, Turn
from trainer.environments.tools import Tool, by_name, check_call, described_tool, run_call
from trainer.types import Row, ToolCall

ROLES: Final = ("system", "developer", "user", "tool")
"""Of observations."""


class Servers(Protocol):
    """Tool servers of one rollout."""

    def start(self) -> list[Tool]:
        """Start them; returns their tools."""

    def close(self) -> None:
        """End them."""


@final
class Session:
    """Answers `reset` and `step` messages; every value is plain JSON."""

    def __init__(
        self, environment: type[Any] | None, tools: Mapping[str, Tool], errors: Mapping[str, str], servers: Servers
    ) -> None:
        """Begin nothing yet.

        Args:
            environment: the user's class; None with tools alone.
            tools: functions of the recipe.
            errors: what a call of each faulty status leads to: `tell`, `end` or `answer`.
            servers: the recipe's tool servers, which `reset` starts.
        """
        self._environment = environment() if environment is not None else None
        self._tools, self._errors, self._servers = dict(tools), errors, servers
        self._runs_calls = False

    def reset(self, row: Row, messages: Sequence[Message], seed: int) -> dict[str, Any]:
        """The first messages and the schemas of all tools.

        Args:
            row: of the data.
            messages: the row's own prompt, used where there is no environment.
            seed: of the rollout.
        """
        self._tools = by_name([*self._tools.values(), *self._servers.start()])
        if self._environment is not None:
            start = self._environment.reset(row, seed=seed)
            if not isinstance(start, Start):
                raise TypeError(f"reset returned {type(start).__name__}; return a Start")
            messages = start.messages
            given = [
                Tool.of(each) if callable(each) else described_tool(each["function"], None) for each in start.tools
            ]
            self._tools = by_name([*self._tools.values(), *given])
            self._runs_calls = any(tool.run is None for tool in self._tools.values())
            if self._runs_calls and any(tool.run is not None for tool in self._tools.values()):
                raise ValueError("the environment runs its tools itself; there can be no others beside them")
        if not messages:
            raise ValueError("a rollout needs at least one message to begin with")
        schemas = [tool.schema for tool in self._tools.values()]
        return {"messages": _checked_messages(messages, (*ROLES, "assistant")), "tools": schemas}

    def step(self, turn: Turn) -> dict[str, Any]:
        """What the policy gets back. Turns with calls go to the tools, the others to the environment."""
        calls = tuple(check_call(call, self._tools) for call in turn.calls) if self._tools else ()
        faulty = [call for call in calls if call.status != "ok"]
        ways = {self._errors[call.status] for call in faulty}
        if calls and "end" not in ways and "answer" not in ways and (faulty or not self._runs_calls):
            results = [_result(call, self._tools) for call in calls]
            return _wire(Observation(results, done=False), calls)
        if "end" in ways or self._environment is None:
            return _wire(Observation([], done=True), calls)
        observation = self._environment.step(Turn(turn.number, turn.text, turn.message, turn.finish, calls))
        if not isinstance(observation, Observation):
            raise TypeError(f"step returned {type(observation).__name__}; return an Observation")
        return _wire(observation, calls)

    def close(self) -> None:
        """Call the environment's `close`, if it has one, and end the tool servers."""
        try:
            close = getattr(self._environment, "close", None)
            if callable(close):
                close()
        finally:
            self._servers.close()


def group_rewards(environment: type[Any], rollouts: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The environment's comparison of a group."""
    finished = [
        FinishedRollout(Row(**each["row"]), each["messages"], each["reward"], each["stop"]) for each in rollouts
    ]
    values = list(environment.group_rewards(finished))
    if len(values) != len(finished):
        raise ValueError(f"group_rewards returned {len(values)} values for {len(finished)} rollouts")
    return [None if value is None else _finite(value, "group_rewards") for value in values]


def _result(call: ToolCall, tools: Mapping[str, Tool]) -> Message:
    text = run_call(call, tools) if call.status == "ok" else f"error: {call.problem}"
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


def _wire(observation: Observation, calls: Sequence[ToolCall]) -> dict[str, Any]:
    if not observation.done and not observation.messages:
        raise ValueError("an observation without messages must be done")
    reward = observation.reward
    return {
        "messages": _checked_messages(observation.messages, ROLES),
        "done": bool(observation.done),
        "reward": None if reward is None else _finite(reward, "the turn's reward"),
        "parts": {str(name): _finite(value, f"part {name}") for name, value in observation.parts.items()},
        "info": dict(observation.info),
        "calls": [asdict(call) for call in calls],
    }


def _checked_messages(messages: Sequence[Message], roles: Sequence[str]) -> list[dict[str, Any]]:
    for message in messages:
        if message.get("role") not in roles or not isinstance(message.get("content"), str):
            raise ValueError(f"a message needs a role ({', '.join(roles)}) and text content (got {message!r:.200})")
    return [dict(message) for message in messages]


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, not finite")
    return number
