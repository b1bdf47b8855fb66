"""Start the engine, load its adapters, start it again when it dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Final, Generic, Protocol, TypeVar, final

from trainer.errors import LaunchError
from trainer.run.console import tell
from trainer.serve.engine_client import EngineClient

START_S: Final = 300.0
"""How long an engine may take to load its model."""
RAPID_S: Final = 10.0
"""An engine that dies within this time of its start was not a good one."""
MAX_RAPID: Final = 3
"""Bad engines in a row after which the gateway gives up."""


class ProcessClient(Protocol):
    """What talks to the process."""

    async def connect(self, path: Path) -> asyncio.Task[None]:
        """Open the socket; the returned task ends when the process goes away."""

    def set_ready(self) -> None:
        """Let requests through."""


C = TypeVar("C", bound=ProcessClient)


class SupervisedProcess(Generic[C]):
    """Supervises one engine, or one executor of the training API."""

    def __init__(self, arguments: Sequence[str], socket: Path, client: C, module: str = "trainer.engine") -> None:
        """Prepare; `start` starts it.

        Args:
            arguments: of `python -m MODULE`, without the socket.
            socket: in a directory that only the owner can read.
            client: is connected.
            module: what runs; its last part is its name in messages.
        """
        self.client = client
        self._module, self._name = module, module.rpartition(".")[2].replace("api", "executor")
        self._arguments, self._socket = list(arguments), socket
        self._prepare: Callable[[], Awaitable[None]] = _nothing
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """Of the engine."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Begin to start it, where it does not run: its imports take seconds, and the gateway has its own."""
        if self._process is not None:
            return
        self._socket.unlink(missing_ok=True)
        self.num_starts += 1
        words = [sys.executable, "-m", self._module, "--socket", str(self._socket), *self._arguments]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE)

    async def start_with(self, prepare: Callable[[], Awaitable[None]] | None = None) -> None:
        """Start it and wait until it answers.

        Args:
            prepare: done with every new process before it gets requests.

        Raises:
            LaunchError: it ended, with its exit code, or an adapter cannot be served.
        """
        self._prepare = prepare or _nothing
        connection = await self._start_once()
        self._supervisor = asyncio.create_task(self._supervise(connection))

    async def stop(self) -> None:
        """End it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        if self._process is not None:
            self._process.terminate()
            await asyncio.to_thread(self._process.wait)

    async def _start_once(self) -> asyncio.Task[None]:
        self.launch()
        assert self._process is not None
        deadline = monotonic() + START_S
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):  # no socket yet, or one that does not listen yet
                connection = await self.client.connect(self._socket)
                break
            if self._process.poll() is not None:
                raise LaunchError(
                    f"the {self._name} ended with exit code {self._process.returncode}; its words are above"
                )
            if monotonic() > deadline:
                raise LaunchError(f"the {self._name} did not load its model within {START_S:.0f} s")
            await asyncio.sleep(0.05)
        await self._prepare()
        self.client.set_ready()
        return connection

    async def _supervise(self, connection: asyncio.Task[None]) -> None:
        rapid = 0
        while True:
            begin = monotonic()
            await connection
            assert self._process is not None
            code = await asyncio.to_thread(self._process.wait)
            self._process = None
            rapid = rapid + 1 if monotonic() - begin < RAPID_S else 0
            if rapid >= MAX_RAPID:
                tell(f"the {self._name} died {rapid} times within {RAPID_S:.0f} s of its start; giving up")
                return
            tell(f"the {self._name} ended (exit code {code}); starting it again")
            try:
                connection = await self._start_once()
            except (LaunchError, OSError) as error:
                tell(f"the {self._name} cannot be started: {error}")
                return


@final
class EngineProcess(SupervisedProcess[EngineClient]):
    """Supervises the embedded engine."""

    async def start(self, adapters: Callable[[], dict[str, str]]) -> None:
        """Start it and wait until it has its adapters.

        Args:
            adapters: name and path of each adapter that is served now; loaded into every new process.

        Raises:
            LaunchError: it ended, with its exit code, or an adapter cannot be served.
        """

        async def load() -> None:
            for name, path in adapters().items():
                reply = await self.client.ask("load", name=name, path=path)
                if not reply["ok"]:
                    raise LaunchError(str(reply["error"]))

        await self.start_with(load)


async def _nothing() -> None:
    """An executor has nothing to load."""
