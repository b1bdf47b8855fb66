"""Environments as the trainer sees them: a forked process per rollout, each call under a time limit.

Whatever an environment does, its own rollout fails and nothing else: an exception, a hang, a crash, too much memory.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar, final

from trainer.environments.channel import Channel
from trainer.errors import RewardError
from trainer.rewards.process import STARTUP_TIMEOUT_S, worker_environment
from trainer.types import Row

T = TypeVar("T")

FORK_TIMEOUT_S: Final = 60.0


class EnvironmentDiedError(Exception):
    """The environment raised, hung or ended; the message says how."""


@final
@dataclass(frozen=True)
class EnvironmentSettings:
    """What the zygote loads, and the limits of its children."""

    environment: str | None
    """`module:Class` or `file.py:Class`."""
    tools: tuple[str, ...]
    errors: Mapping[str, str]
    """What a faulty tool call of each status leads to."""
    base_dir: Path
    timeout_s: float = 10.0
    """Wall-clock limit of one `reset` or `step`."""
    memory_limit_gib: float = 2.0
    num_workers: int = 8
    """Environments that compute at the same time."""


@final
class EnvironmentPool:
    """The zygote and the environments it forked; a context manager."""

    def __init__(self, settings: EnvironmentSettings) -> None:
        """Keep the settings; entering the context starts the zygote."""
        self._settings = settings
        self._lock = threading.Lock()
        self._opened: list[RemoteEnvironment] = []
        self.schemas: list[dict[str, Any]] = []
        """Of the recipe's tools."""
        self.compares_groups = False
        """Whether the environment has `group_rewards`."""

    def __enter__(self) -> EnvironmentPool:
        """Start the zygote and import the environment.

        Raises:
            RewardError: environment or tools cannot be loaded.
        """
        settings = self._settings
        self._directory = tempfile.TemporaryDirectory(prefix="environments-", ignore_cleanup_errors=True)
        self._threads = ThreadPoolExecutor(settings.num_workers, thread_name_prefix="environment")
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile(dir=self._directory.name)
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "trainer.environments.zygote", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            stdout=self._stderr,
            stderr=self._stderr,
            start_new_session=True,
            env=worker_environment(Path(self._directory.name)),
        )
        theirs.close()
        self._control = Channel(ours)
        setup = {
            "environment": settings.environment,
            "tools": list(settings.tools),
            "errors": dict(settings.errors),
            "base_dir": str(settings.base_dir),
            "memory_limit_bytes": int(settings.memory_limit_gib * 2**30),
        }
        try:
            self._control.send(setup, None)
            reply = self._control.receive(time.monotonic() + STARTUP_TIMEOUT_S)
            if "error" in reply:
                raise RewardError(reply["error"])
        except (EOFError, TimeoutError, ConnectionError):
            output = self._output()
            self.close()
            raise RewardError(f"the environment process did not start{output}") from None
        except BaseException:
            self.close()
            raise
        self.schemas, self.compares_groups = reply["schemas"], reply["compares"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the zygote, which kills every environment."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for remote in self._opened:
            remote.release()
        self._stderr.close()
        self._directory.cleanup()

    def open(self) -> RemoteEnvironment:
        """Fork a process for one rollout.

        Raises:
            RewardError: the zygote itself has died.
        """
        self._opened = [remote for remote in self._opened if remote.is_open]
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile(dir=self._directory.name)  # noqa: SIM115 - closed by the environment
        deadline = time.monotonic() + FORK_TIMEOUT_S
        try:
            with self._lock:
                self._control.send({"fork": True}, deadline, [theirs.fileno(), log.fileno()])
                pid = self._control.receive(deadline)["pid"]
        except (EOFError, TimeoutError, ConnectionError):
            ours.close()
            log.close()
            raise RewardError(f"the process that starts environments has ended{self._output()}") from None
        finally:
            theirs.close()
        remote = RemoteEnvironment(Channel(ours), pid, log, self._settings.timeout_s, self._end)
        self._opened.append(remote)
        return remote

    def map(self, function: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """Call a function for each item, at most `num_workers` at a time; the results are in the order of the items."""
        return list(self._threads.map(function, items))

    def _end(self, pid: int) -> int:
        deadline = time.monotonic() + FORK_TIMEOUT_S
        try:
            with self._lock:
                self._control.send({"wait": pid}, deadline)
                status: int = self._control.receive(deadline)["status"]
        except (EOFError, TimeoutError, ConnectionError):
            raise RewardError(f"the process that starts environments has ended{self._output()}") from None
        return status

    def _output(self) -> str:
        return _tail(self._stderr.fileno())


@final
class RemoteEnvironment:
    """The environment of one rollout; one call at a time."""

    def __init__(self, channel: Channel, pid: int, log: Any, timeout_s: float, end: Callable[[int], int]) -> None:
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
        except (EOFError, ConnectionError):
            raise EnvironmentDiedError(f"{what}: the environment's process {self._kill()}") from None
        if "failure" in reply:
            raise EnvironmentDiedError(f"{what}:\n{reply['failure']}")
        return reply

    def _kill(self) -> str:
        """End the process; returns how it had ended, and its last output."""
        if not self.is_open:
            return "had ended"
        code = self._end(self._pid)
        output = _tail(self._log.fileno())
        self.release()
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended itself with status {code}"
        return f"{ended}{output}"

    def _stack(self) -> str:
        """The stack of the call that hangs; the process is not reaped before `_end`, so its id is still its own."""
        before = os.fstat(self._log.fileno()).st_size
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.01)
            if os.fstat(self._log.fileno()).st_size > before:
                break
        return _tail(self._log.fileno())


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    start = max(0, size - 4000)
    text = os.pread(descriptor, size - start, start).decode("utf-8", "replace").strip()
    return f"\n{text}" if text else ""
