"""One client of an executor: many operations over one socket, sent again when the executor is restarted."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from trainer.api.protocol import frame, read_frame
from trainer.serve.api_errors import ApiError

ATTEMPTS: Final = 3
"""Executors that an operation is sent to, one after the other; each gives the same answer."""
READY_S: Final = 120.0
"""How long an operation waits for an executor."""


@final
class ExecutorClient:
    """Sends operations to an executor."""

    def __init__(self) -> None:
        """Begin without a connection; see `connect`."""
        self._writer: asyncio.StreamWriter | None = None
        self._replies: dict[int, asyncio.Future[tuple[dict[str, Any], bytes] | None]] = {}
        self._ready = asyncio.Event()
        self._number = 0
        self.hello: dict[str, Any] = {}

    @property
    def is_ready(self) -> bool:
        """Whether an executor answers."""
        return self._ready.is_set()

    async def connect(self, path: Path) -> asyncio.Task[None]:
        """Open the socket; the returned task ends when the executor goes away."""
        reader, self._writer = await asyncio.open_unix_connection(str(path))
        self.hello, _ = await read_frame(reader)
        return asyncio.create_task(self._read(reader))

    def set_ready(self) -> None:
        """Let operations through."""
        self._ready.set()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head, body = await read_frame(reader)
                reply = self._replies.pop(head["id"], None)
                if reply is not None and not reply.done():
                    reply.set_result((head, body))
        self._ready.clear()
        if self._writer is not None:
            self._writer.close()
        lost, self._replies = self._replies, {}
        for reply in lost.values():
            if not reply.done():
                reply.set_result(None)

    async def ask(self, op: str, content: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        """Do an operation.

        Args:
            op: its name; see `trainer.api.protocol`.
            content: its body.
            **fields: of its head.

        Returns:
            Head and body of the reply.

        Raises:
            ApiError: the executor refuses it, or none is there.
        """
        for _ in range(ATTEMPTS):
            try:
                await asyncio.wait_for(self._ready.wait(), READY_S)
            except TimeoutError:
                break
            self._number += 1
            number = self._number
            reply = self._replies[number] = asyncio.get_running_loop().create_future()
            assert self._writer is not None
            self._writer.write(frame({"op": op, "id": number, **fields}, content))
            try:
                found = await reply
            finally:
                self._replies.pop(number, None)
            if found is None:
                continue
            head, body = found
            if not head["ok"]:
                raise ApiError(
                    int(head["status"]), str(head["error"]), code=head.get("code"), retry_s=head.get("retry_s")
                )
            return head, body
        raise ApiError(503, "no executor is ready", retry_s=5)
