"""What one call of one reward came to, and its form on the pipe."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Final, final

HEADER: Final = struct.Struct("!I")
"""Before each message stands its length in bytes."""


@final
@dataclass(frozen=True)
class Outcome:
    """A value, an abstention (no value, no failure) or a failure."""

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    """The traceback, or what happened to the process."""
    missing: str | None = None
    """The row field whose absence made it fail."""
    fields: tuple[str, ...] = ()
    """Row fields that the reward asked for."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the form on the pipe."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Read the form on the pipe."""
        return cls(**{**data, "fields": tuple(data["fields"])})


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message with its length in front.

    ASCII only, so that half a surrogate pair, which models do write, survives.
    """
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message, or None at the end of the pipe."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    body = stream.read(*HEADER.unpack(header))
    message: dict[str, Any] = json.loads(body)
    return message
