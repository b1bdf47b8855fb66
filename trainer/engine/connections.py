"""The engine's socket: lines from clients into a queue, lines for clients out of the step loop."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeAlias, final

from trainer.engine.handshake import HandshakeError, prove_engine
from trainer.engine.protocol import LINE_LIMIT, line

Command: TypeAlias = "tuple[Client, dict[str, Any] | None]"
"""Who sent it, and the message; None: the client is gone."""


@final
class Client:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, loop: asyncio.AbstractEventLoop) -> None:
        """Wrap a connection of the I/O thread."""
        self._writer, self._loop = writer, loop

    def send(self, *messages: dict[str, Any]) -> None:
        """Send messages; may be called from any thread."""
        data = b"".join(map(line, messages))
        with suppress(RuntimeError):  # the loop has ended with the process
            self._loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)


@final
@dataclass(frozen=True)
class Listening:
    """Where clients connect: a Unix socket that only the owner may open, or TCP with a secret."""

    path: Path | None = None
    handle: int | None = None
    """File descriptor of a TCP socket that listens already."""
    secret: str = ""
    """What a client on TCP must know."""
    orphan_s: float = float("inf")
    """Without a client for this long, the engine ends."""


@final
class Connections:
    """Listens in a thread of its own."""

    def __init__(self, listening: Listening, hello: dict[str, Any]) -> None:
        """Listen.

        Args:
            listening: where.
            hello: the first line that every client gets.
        """
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self._listening, self._hello = listening, hello
        self._num_clients, self._alone_since = 0, monotonic()
        self._is_open = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._is_open.wait()

    async def _serve(self) -> None:
        if self._listening.handle is not None:
            taken = socket.socket(fileno=self._listening.handle)
            server = await asyncio.start_server(self._converse, sock=taken, limit=LINE_LIMIT)
        else:
            mask = os.umask(0o177)
            try:
                server = await asyncio.start_unix_server(self._converse, str(self._listening.path), limit=LINE_LIMIT)
            finally:
                os.umask(mask)
        self._is_open.set()
        async with server:
            while self._num_clients or monotonic() - self._alone_since < self._listening.orphan_s:
                await asyncio.sleep(min(1.0, self._listening.orphan_s / 4))
        os._exit(0)  # nobody asks for its end either

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._listening.handle is not None:
            try:
                await prove_engine(reader, writer, self._listening.secret)
            except (HandshakeError, ConnectionError):
                writer.close()
                return
        client = Client(writer, asyncio.get_running_loop())
        writer.write(line(self._hello))
        self._num_clients += 1
        with suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
            while received := await reader.readline():
                message = json.loads(received)
                if message.get("op") == "ping":  # whatever the steps do: this process lives
                    writer.write(line({"reply": message["id"], "ok": True}))
                else:
                    self.commands.put((client, message))
        self.commands.put((client, None))
        self._num_clients, self._alone_since = self._num_clients - 1, monotonic()
        writer.close()
