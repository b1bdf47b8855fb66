"""What the gateway and the executor say to each other. No torch.

Frames over a Unix socket: two lengths, a JSON head, a body. The gateway sends an operation with an id, the executor one
reply with the same id, in any order:

    {"op": "session", "id": 1, "owner": "a"}                                    -> {"id": 1, "ok": true, ...}
    {"op": "create", "id": 2, "owner": "a", "session": "s", "number": 0, "lora": {...}}
    {"op": "submit", "id": 3, "owner": "a", "model": "s:train:0", "seq": 4, "kind": "pass"} + body
    {"op": "wait", "id": 4, "owner": "a", "request": "s:train:0/4", "timeout_s": 30}
                                                       -> {"id": 4, "ok": true, "state": "done", "kind": ...} + body
    a refusal                                               -> {"id": 3, "ok": false, "status": 400, "error": "..."}
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, final

from trainer.checkpoints.saved_state import parts_of
from trainer.errors import CheckpointError

LENGTHS: Final = struct.Struct("<II")
MAX_BODY: Final = 1 << 28
"""Bytes of the largest body."""
ResultKind: TypeAlias = Literal["pass", "json", "error"]


@final
class Refused(Exception):  # noqa: N818  (an answer, not a failure)
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *, code: str | None = None, retry_s: int | None = None) -> None:
        """Keep what the client is told.

        Args:
            status: of HTTP.
            message: what is wrong, and the remedy.
            code: a word for programs, such as the name of a limit.
            retry_s: after how many seconds the client may try again.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.retry_s = status, message, code, retry_s


def frame(head: Mapping[str, Any], body: bytes = b"") -> bytes:
    """A message as it is sent."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return LENGTHS.pack(len(text), len(body)) + text + body


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next message.

    Raises:
        asyncio.IncompleteReadError: the other side is gone.
    """
    head_size, body_size = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
    head = json.loads(await reader.readexactly(head_size))
    return head, await reader.readexactly(body_size) if body_size else b""


def request_id(model: str, seq: int) -> str:
    """The id of a request, by which its result is asked for."""
    return f"{model}/{seq}"


def split_path(path: str) -> tuple[str, str, str]:
    """Model, folder and name of a saved state, from its path in the protocol.

    >>> split_path("tinker://s1:train:0/weights/step-20")
    ('s1:train:0', 'weights', 'step-20')

    Raises:
        Refused: it is none.
    """
    try:
        return parts_of(path)
    except CheckpointError as error:
        raise Refused(400, str(error)) from None
