"""Result of one reward call, and its wire format."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Final, final

HEADER: Final = struct.Struct("!I")
"""Precedes each message: its length in bytes."""


@final
@dataclass(frozen=True)
class CallResult:
    """A value, an abstention (neither value nor failure) or a failure.

    A reward that returned `Score(1.0, {"format": 0.5})` gives `CallResult(value=1.0, parts={"format": 0.5})`; one that
    raised gives `CallResult(failure="Traceback ...")`.
    """

    value: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    """Traceback, or how the process ended."""
    missing: str | None = None
    """Row field whose absence caused the failure."""
    fields: tuple[str, ...] = ()
    """Row fields that the reward read."""
    seconds: float = 0.0
    is_chosen: bool = True
    """Whether the row chose this reward; if not, it is no abstention, and is not logged."""

    def to_json(self) -> dict[str, Any]:
        """The wire format."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CallResult:
        """Parse the wire format."""
        return cls(**{**data, "fields": tuple(data["fields"])})


def encode(message: Mapping[str, Any]) -> bytes:
    """Serialize a message, with its length in front.

    ASCII only, so that lone surrogates, which models do write, survive.
    """
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; None at the end of the pipe."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    body = stream.read(*HEADER.unpack(header))
    message: dict[str, Any] = json.loads(body)
    return message
