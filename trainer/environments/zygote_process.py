"""The process that forks environments, as the trainer sees it: start, fork, end a child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from trainer.environments.channel import Channel
from trainer.environments.remote import RemoteEnvironment, tail
from trainer.errors import RewardError, TrainerError
from trainer.rewards.process import STARTUP_TIMEOUT_S, worker_environment

FORK_TIMEOUT_S: Final = 60.0


class ZygoteDiedError(TrainerError):
    """The process that forks environments has ended, and with it all of them; another attempt starts it again."""


@final
class ZygoteProcess:
    """A process that has imported the environment and forks a child per rollout."""

    def __init__(self, setup: Mapping[str, Any], directory: Path, timeout_s: float, python: str | None = None) -> None:
        """Start it and wait until it has imported everything.

        Args:
            setup: its first message: what to import, and limits.
            directory: for temporary files.
            timeout_s: of one call of a child.
            python: another interpreter than the trainer's own.

        Raises:
            RewardError: environment or tools cannot be loaded.
        """
        self._directory, self._timeout_s, self._lock = directory, timeout_s, threading.Lock()
        self._opened: list[RemoteEnvironment] = []
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [python or sys.executable, "-X", "faulthandler", "-m", "trainer.environments.zygote", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            stdout=self._stderr,
            stderr=self._stderr,
            start_new_session=True,
            env=worker_environment(directory) if python is None else _foreign(directory),
        )
        theirs.close()
        self._control = Channel(ours)
        try:
            self._control.send(setup, None)
            self.ready: dict[str, Any] = self._control.receive(time.monotonic() + STARTUP_TIMEOUT_S)
            """Schemas of the recipe's tools, and whether the environment compares groups."""
            if "error" in self.ready:
                raise RewardError(self.ready["error"])
        except (EOFError, TimeoutError, ConnectionError):
            output = self._output()
            self.close()
            raise RewardError(f"the environment process did not start{output}") from None
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fork(self) -> RemoteEnvironment:
        """Fork a process for one rollout.

        Raises:
            ZygoteDiedError: it has died.
        """
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - closed by the environment
        deadline = time.monotonic() + FORK_TIMEOUT_S
        try:
            with self._lock:
                self._control.send({"fork": True}, deadline, [theirs.fileno(), log.fileno()])
                pid = self._control.receive(deadline)["pid"]
        except (EOFError, TimeoutError, OSError):
            ours.close()
            log.close()
            raise self._died() from None
        finally:
            theirs.close()
        remote = RemoteEnvironment(Channel(ours), pid, log, self._timeout_s, self._end)
        with self._lock:
            self._opened = [*(each for each in self._opened if each.is_open), remote]
        return remote

    def close(self) -> None:
        """End it, which kills every environment."""
        self.abandon()
        for remote in self._opened:
            remote.release()

    def abandon(self) -> None:
        """End it, but leave the connections to its environments to those that use them."""
        with self._lock:
            self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._stderr.close()

    def _end(self, pid: int, grace_s: float) -> int:
        """Kill and reap a child; its exit code, negative for a signal.

        Raises:
            ZygoteDiedError: the zygote itself has died.
        """
        deadline = time.monotonic() + FORK_TIMEOUT_S
        try:
            with self._lock:
                self._control.send({"wait": pid, "grace_s": grace_s}, deadline)
                status: int = self._control.receive(deadline)["status"]
        except (EOFError, TimeoutError, OSError):
            raise self._died() from None
        return status

    def _died(self) -> ZygoteDiedError:
        return ZygoteDiedError(f"the process that starts environments has ended{self._output()}")

    def _output(self) -> str:
        return "" if self._stderr.closed else tail(self._stderr.fileno())


def _foreign(directory: Path) -> dict[str, str]:
    """Variables for another interpreter: it finds this package, and nothing else of what is installed beside it."""
    packages = directory / "packages"
    packages.mkdir(exist_ok=True)
    link = packages / "trainer"
    if not link.is_symlink():
        link.symlink_to(Path(__file__).parents[1])
    return worker_environment(directory) | {"PYTHONPATH": str(packages)}
