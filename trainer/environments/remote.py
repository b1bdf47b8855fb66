"""The process of one rollout's environment, as the trainer sees it: one call at a time, each under a time limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, final

from trainer.environments.channel import Channel
from trainer.types import Row

ENDING_S: Final = 2.0
"""A process whose connection has closed is about to end; only afterwards is it known how."""


class EnvironmentDiedError(Exception):
    """The environment raised, hung or ended; the message says how."""


class KilledError(EnvironmentDiedError):
    """Its process was ended by SIGKILL or SIGTERM, which nothing that an environment computes leads to."""


@final
class RemoteEnvironment:
    """The environment of one rollout; one call at a time."""

    def __init__(
        self, channel: Channel, pid: int, log: Any, timeout_s: float, end: Callable[[int, float], int]
    ) -> None:
        """Take the connection to a forked process; `end` kills and reaps it."""
        self._channel, self._pid, self._log, self._timeout_s, self._end = channel, pid, log, timeout_s, end
        self.is_open = True

    def reset(self, row: Row, messages: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """The first messages and the tools' schemas.

        Raises:
            EnvironmentDiedError: it raised, hung or ended.
        """
        fields = {"fields": dict(row.fields), "file": row.file, "line": row.line, "index": row.index}
        return self._ask({"reset": fields, "messages": list(messages), "seed": seed}, "reset")

    def step(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy gets back for a turn.

        Raises:
            EnvironmentDiedError: it raised, hung or ended.
        """
        return self._ask({"turn": turn}, f"step of turn {turn['number']}")

    def compare(self, rollouts: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The environment's `group_rewards`.

        Raises:
            EnvironmentDiedError: it raised, hung or ended.
        """
        values: list[float | None] = self._ask({"group": list(rollouts)}, "group_rewards")["values"]
        return values

    def close(self) -> None:
        """Let the environment close itself within its time limit, then end its process; idempotent."""
        if not self.is_open:
            return
        with suppress(TimeoutError, EOFError, ConnectionError):
            deadline = time.monotonic() + self._timeout_s
            self._channel.send({"close": True}, deadline)
            self._channel.receive(deadline)  # ends with EOFError once the process has ended
        self._kill()

    def release(self) -> None:
        """Close the connection and the log of a process that has ended, or that the zygote will end."""
        self.is_open = False
        self._channel.close()
        self._log.close()

    def _ask(self, message: Mapping[str, Any], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout_s
        try:
            self._channel.send(message, deadline)
            reply = self._channel.receive(deadline)
        except TimeoutError:
            stack = self._stack()
            self._kill()
            raise EnvironmentDiedError(f"{what}: no answer within {self._timeout_s:g} s{stack}") from None
        except (EOFError, OSError):
            code, output = self._kill(ENDING_S)
            kind = KilledError if code in (-signal.SIGKILL, -signal.SIGTERM) else EnvironmentDiedError
            raise kind(f"{what}: the environment's process {_ending(code)}{output}") from None
        if "failure" in reply:
            raise EnvironmentDiedError(f"{what}:\n{reply['failure']}")
        return reply

    def _kill(self, grace_s: float = 0.0) -> tuple[int | None, str]:
        """End the process; returns the status with which it had ended, and its last output.

        Args:
            grace_s: how long it may take to end by itself.
        """
        if not self.is_open:
            return None, ""
        try:
            code = self._end(self._pid, grace_s)
            return code, tail(self._log.fileno())
        finally:
            self.release()

    def _stack(self) -> str:
        """The stack of the call that hangs; the process is not reaped before `_end`, so its id is still its own."""
        before = os.fstat(self._log.fileno()).st_size
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.01)
            if os.fstat(self._log.fileno()).st_size > before:
                break
        return tail(self._log.fileno())


def _ending(code: int | None) -> str:
    if code is None:
        return "had ended"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended itself with status {code}"


def tail(descriptor: int) -> str:
    """The last output in a file, behind a line break; empty where there is none."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - 4000)
    text = os.pread(descriptor, size - start, start).decode("utf-8", "replace").strip()
    return f"\n{text}" if text else ""
