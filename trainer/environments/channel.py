"""Length-prefixed JSON messages over a Unix socket, with deadlines and descriptors."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from trainer.rewards.call_result import HEADER, encode

MAX_DESCRIPTORS: Final = 2
MIN_WAIT_S: Final = 0.05
"""Even after the deadline an answer that has arrived is read."""


@final
class Channel:
    """One end of a connection; one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected stream socket."""
        self._socket = connection

    def send(self, message: Mapping[str, Any], deadline: float | None, descriptors: Sequence[int] = ()) -> None:
        """Send a message.

        Args:
            message: JSON values.
            deadline: in `time.monotonic()` seconds; None waits forever.
            descriptors: open files that the receiver gets copies of.

        Raises:
            TimeoutError: not sent in time.
            ConnectionError: the other end is closed.
        """
        data = memoryview(encode(message))
        self._wait_until(deadline)
        if descriptors:
            data = data[socket.send_fds(self._socket, [data], list(descriptors)) :]
        while data:
            self._wait_until(deadline)
            data = data[self._socket.send(data) :]

    def receive(self, deadline: float | None) -> dict[str, Any]:
        """The next message.

        Raises:
            TimeoutError: none came in time.
            EOFError: the other end is closed.
        """
        (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
        message: dict[str, Any] = json.loads(self._read(size, deadline))
        return message

    def receive_with_descriptors(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and the descriptors that came with it.

        Raises:
            EOFError: the other end is closed.
        """
        head, descriptors, _flags, _address = socket.recv_fds(self._socket, HEADER.size, MAX_DESCRIPTORS)
        if not head:
            raise EOFError
        head += self._read(HEADER.size - len(head), None)
        message: dict[str, Any] = json.loads(self._read(HEADER.unpack(head)[0], None))
        return message, descriptors

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, size: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait_until(deadline)
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait_until(self, deadline: float | None) -> None:
        self._socket.settimeout(None if deadline is None else max(MIN_WAIT_S, deadline - time.monotonic()))
