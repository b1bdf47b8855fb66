"""Where replicas run: what the fleet needs of a backend, and the processes of this machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import monotonic
from typing import IO, Any, Final, Protocol, final

from trainer.config.deployment_shape import DeploymentShape
from trainer.control.deployments import Spec
from trainer.errors import LaunchError
from trainer.serve.engine_client import EngineClient

START_S: Final = 300.0
"""How long an engine may take to load its model."""
LAST_WORDS_S: Final = 5.0
"""How long the end of its log is waited for, once it has ended."""
_NUMBERS: Final = count(1)


class NoPlaceError(Exception):
    """There is no place for a replica now; there may be one later."""


class Host(Protocol):
    """The process of one engine, wherever it runs. It is not started again."""

    @property
    def about(self) -> Mapping[str, Any]:
        """For people and the store: `pid`, and what the backend needs to find it again."""

    async def place(self) -> None:
        """Start the process.

        Raises:
            LaunchError: it cannot be started.
            NoPlaceError: there is no room for it now.
        """

    async def connect(self, client: EngineClient) -> asyncio.Task[None]:
        """Wait until the engine has loaded its model; the returned task ends when it goes away.

        Raises:
            LaunchError: it ended, or took too long.
        """

    async def end(self) -> None:
        """End the process; it may have ended already."""


class Backend(Protocol):
    """Starts engines."""

    def check(self, spec: Spec) -> None:
        """Refuse what it can never run.

        Raises:
            LaunchError: says why.
        """

    def new(self, name: str, shape: DeploymentShape, region: str, words: Sequence[str]) -> Host:
        """An engine that is not started yet.

        Args:
            name: of the deployment.
            shape: what it runs on.
            region: where.
            words: arguments of `python -m trainer.engine`, without its address.
        """

    async def adopt(self, saved: Mapping[str, Any], words: Sequence[str]) -> Host | None:
        """The engine that `about` described to an earlier control process, if it lives and has the same arguments."""

    async def close(self) -> None:
        """End what the backend itself started; replicas have ended."""


@final
class LocalHost:
    """An engine on this machine, on a Unix socket. It ends with this process."""

    def __init__(self, words: Sequence[str], directory: Path) -> None:
        """Prepare.

        Args:
            words: arguments of `python -m trainer.engine`, without the socket.
            directory: of the socket; only the owner can read it.
        """
        self._words, self._socket = list(words), directory / f"replica-{next(_NUMBERS)}.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=1)
        """The last line that it wrote to standard error."""
        self._reader: threading.Thread | None = None

    @property
    def about(self) -> Mapping[str, Any]:
        """Its process."""
        return {"pid": None if self._process is None else self._process.pid}

    async def place(self) -> None:
        """Start the process."""
        words = [sys.executable, "-m", "trainer.engine", "--socket", str(self._socket), *self._words]
        pipe = subprocess.PIPE
        self._process = process = await asyncio.to_thread(subprocess.Popen, words, stdin=pipe, stderr=pipe)
        assert process.stderr is not None
        self._reader = threading.Thread(target=_pass_on, args=(process.stderr, self._said), daemon=True)
        self._reader.start()

    async def connect(self, client: EngineClient) -> asyncio.Task[None]:
        """Wait until the engine listens.

        Raises:
            LaunchError: it ended, or took too long.
        """
        assert self._process is not None
        deadline = monotonic() + START_S
        while monotonic() < deadline:
            if self._process.poll() is not None:
                if self._reader is not None:
                    await asyncio.to_thread(self._reader.join, LAST_WORDS_S)
                words = f": {self._said[-1]}" if self._said else ""
                raise LaunchError(f"the engine ended with exit code {self._process.returncode}{words}")
            try:
                return await client.connect(self._socket)
            except (FileNotFoundError, ConnectionRefusedError):  # no socket yet, or one that does not listen yet
                await asyncio.sleep(0.02)
            except (OSError, ValueError) as error:
                raise LaunchError(f"the engine went away as it began: {error}") from None
        raise LaunchError(f"the engine did not load its model within {START_S:.0f} s")

    async def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
        self._socket.unlink(missing_ok=True)


def _pass_on(stream: IO[bytes], said: deque[str]) -> None:
    """Copy what a process writes to this one's standard error, and keep its last line."""
    for line in stream:
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()
        if line.strip():
            said.append(line.decode(errors="replace").strip())


@final
class LocalBackend:
    """Starts engines on this machine."""

    def __init__(self, directory: Path, region: str) -> None:
        """Begin without engines.

        Args:
            directory: of sockets; only the owner can read it.
            region: of this machine; deployments of another one fail.
        """
        self._directory, self._region = directory, region

    def check(self, spec: Spec) -> None:
        """Refuse other regions.

        Raises:
            LaunchError: names both.
        """
        if spec.region != self._region:
            raise LaunchError(f"region {spec.region}: this control process is in region {self._region}")

    def new(self, name: str, shape: DeploymentShape, region: str, words: Sequence[str]) -> Host:
        """An engine that is not started yet."""
        return LocalHost(words, self._directory)

    async def adopt(self, saved: Mapping[str, Any], words: Sequence[str]) -> Host | None:
        """None: they ended with the process that started them."""
        return None

    async def close(self) -> None:
        """Nothing is left."""
