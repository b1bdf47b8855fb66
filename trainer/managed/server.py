"""Keeps one server running: start, readiness, restart, end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import httpx

from trainer.errors import LaunchError
from trainer.files import write_atomically
from trainer.http import direct_client
from trainer.managed.child import Child
from trainer.managed.place import ServerPlace, accepts

POLL_S: Final = 0.2
HEALTH_TIMEOUT_S: Final = 5.0
STOP_JOIN_S: Final = 10.0
"""How long the end waits for a restart that is in `prepare`; the server is ended under it."""
RAPID_S: Final = 30.0
"""A server that dies within this time of being ready was not a good one."""
MAX_RAPID: Final = 3
"""Bad servers in a row after which it is given up."""


@final
@dataclass(frozen=True)
class ServerCommand:
    """How a server that answers GET /health on a Unix socket is started."""

    name: str
    """For messages, for example `vLLM`."""
    argv: Callable[[Path], Sequence[str]]
    """Its program and arguments, given the path of its socket."""
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of this process."""
    start_timeout_s: float = 600.0
    """How long it may take to become healthy."""


@final
class ManagedServer:
    """One server that this process started; it ends with this process.

    Clients connect to `place.socket`, which leads to a server only after `prepare` has returned, so that a server that
    was restarted never answers without its adapters.
    """

    def __init__(self, command: ServerCommand, place: ServerPlace, say: Callable[[str], None]) -> None:
        """Prepare; `launch` starts it.

        Args:
            command: how to start it.
            place: where its clients look for it.
            say: tells the user about restarts.
        """
        self.command, self.place = command, place
        self.num_starts = 0
        """A request that failed is sent again if this number has changed."""
        self.problem: str | None = None
        """Why it was given up."""
        self._say = say
        self._prepare: Callable[[Path], None] = lambda _socket: None
        self._child: Child | None = None
        self._watcher: threading.Thread | None = None
        self._is_ending = threading.Event()

    @property
    def pid(self) -> int | None:
        """Of the server that runs now."""
        return None if self._child is None else self._child.pid

    def launch(self) -> None:
        """Begin to start it; its imports take seconds, in which this process may do something else.

        Raises:
            LaunchError: the log cannot be written.
        """
        if self._child is not None:
            return
        self.num_starts += 1
        argv = self.command.argv(self.place.socket_of(self.num_starts))
        try:
            self._child = Child(argv, {**os.environ, **self.command.environment}, self.command.log)
        except OSError as error:
            raise LaunchError(f"{self.command.log}: {error.strerror}") from None

    def start(self, prepare: Callable[[Path], None] = lambda _socket: None) -> None:
        """Wait until it is healthy and prepared; from now on it is started again whenever it dies.

        Args:
            prepare: called with the socket of each start, before clients can connect.

        Raises:
            LaunchError: it ended or did not become healthy in time, with the end of its log.
        """
        self._prepare = prepare
        self._start_once()
        self._watcher = threading.Thread(target=self._watch, name=f"{self.command.name} watcher", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """End it; returns when none of its processes runs any more."""
        self._is_ending.set()
        if self._watcher is not None:
            self._watcher.join(STOP_JOIN_S)
        if self._child is not None:
            self._child.stop()
            self._child = None
        self._remove_socket()

    def _start_once(self) -> None:
        self.launch()
        child, socket = self._child, self.place.socket_of(self.num_starts)
        assert child is not None
        begin = time.monotonic()
        with direct_client(socket) as client:
            while not _is_healthy(client, socket):
                code = child.poll()
                if code is not None:
                    raise self._failure(f"ended with exit code {code} before it was ready")
                if self._is_ending.wait(POLL_S):
                    raise LaunchError(f"{self.command.name} is to end")
                if time.monotonic() - begin > self.command.start_timeout_s:
                    child.kill()
                    raise self._failure(f"was not ready within {self.command.start_timeout_s:.0f} s")
        self._prepare(socket)
        link = self.place.socket.with_suffix(".new")
        link.unlink(missing_ok=True)
        link.symlink_to(socket.name)
        link.replace(self.place.socket)

    def _failure(self, what: str) -> LaunchError:
        assert self._child is not None
        tail = self._child.tail()
        return LaunchError(f"{self.command.name} {what}. The end of {self.command.log}:\n{tail}")

    def _watch(self) -> None:
        rapid, ready_at = 0, time.monotonic()
        while not self._is_ending.wait(POLL_S):
            assert self._child is not None
            code = self._child.poll()
            if code is None:
                continue
            rapid = rapid + 1 if time.monotonic() - ready_at < RAPID_S else 0
            if rapid >= MAX_RAPID:
                failure = self._failure(f"died {rapid} times within {RAPID_S:.0f} s of being ready")
                self._give_up(str(failure))
                return
            self._say(f"{self.command.name} ended (exit code {code}); starting it again")
            self._child.kill()
            self._child = None
            self._remove_socket()
            try:
                self._start_once()
            except Exception as error:  # prepare is the caller's: whatever it raises, clients must not wait for ever
                if not self._is_ending.is_set():
                    self._give_up(f"{self.command.name} cannot be started again: {error}")
                return
            ready_at = time.monotonic()
            self._say(f"{self.command.name} is ready again")

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self._say(problem)
        if self._child is not None:
            self._child.kill()
        self._remove_socket()
        write_atomically(self.place.failed_file, problem, durable=False)

    def _remove_socket(self) -> None:
        self.place.socket.unlink(missing_ok=True)
        self.place.socket_of(self.num_starts).unlink(missing_ok=True)


def _is_healthy(client: httpx.Client, socket: Path) -> bool:
    """Whether the server answers; its socket is then for its owner alone."""
    if not accepts(socket):
        return False
    socket.chmod(0o600)
    try:
        return client.get("http://server/health", timeout=HEALTH_TIMEOUT_S).is_success
    except httpx.RequestError:
        return False
