"""The engine's socket: lines from clients into a queue, lines for clients out of the step loop."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias, final

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
class Connections:
    """Listens on a Unix socket that only the owner may open, in a thread of its own."""

    def __init__(self, path: Path, hello: dict[str, Any]) -> None:
        """Listen.

        Args:
            path: of the socket.
            hello: the first line that every client gets.
        """
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self._path, self._hello = path, hello
        self._is_open = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._is_open.wait()

    async def _serve(self) -> None:
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._converse, str(self._path), limit=LINE_LIMIT)
        finally:
            os.umask(mask)
        self._is_open.set()
        async with server:
            await server.serve_forever()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Client(writer, asyncio.get_running_loop())
        writer.write(line(self._hello))
        with suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
            while received := await reader.readline():
                self.commands.put((client, json.loads(received)))
        self.commands.put((client, None))
        writer.close()
