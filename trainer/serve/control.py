"""What a server checks, records and counts; errors without the content of requests."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from fastapi import Request

from trainer.serve.access import Access, KeyFile, principal_of
from trainer.serve.api_errors import ApiError
from trainer.serve.metering import NoMeter, RequestMeter

if TYPE_CHECKING:
    from trainer.control.audit import Actor
    from trainer.control.store import Store

RECORDED: Final = (
    ("POST", re.compile(r"(/deployments/[^/]+)?/v1/(load|unload)_lora_adapter"), "adapters"),
    ("DELETE", re.compile(r"/v1/files/.*"), "files"),
    ("POST", re.compile(r"/api/v1/(create_session|create_model|load_weights|save_\w+|finish|delete\w*)"), "training"),
)
"""Control actions that are recorded by their route; routes that change the store record with the change itself."""


class Recorder(Protocol):
    """Keeps the record of control actions."""

    async def record(self, request: Request | None, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Append an entry.

        Args:
            request: says who acts; None is the server itself.
            action: what is done.
            target: to what.
            details: values for JSON, without prompts, completions and keys.

        Raises:
            ApiError: 503, it cannot be kept now.
        """


@final
class NoRecorder:
    """Of a server without accounts."""

    async def record(self, request: Request | None, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Nothing to do."""


@final
class AuditRecorder:
    """Writes to the audit log."""

    def __init__(self, store: Store) -> None:
        """Write to a store."""
        self._store = store

    async def record(self, request: Request | None, action: str, target: str, details: Mapping[str, Any]) -> None:
        """Append an entry; committed when this returns."""
        from trainer.control.audit import Actor

        actor = Actor("server") if request is None else actor_of(request)
        await asyncio.to_thread(self._write, actor, action, target, details)

    def _write(self, actor: Actor, action: str, target: str, details: Mapping[str, Any]) -> None:
        from trainer.control.audit import record
        from trainer.control.store import StoreDownError

        try:
            with self._store.write() as connection:
                record(connection, actor, action, target, details)
        except StoreDownError:
            raise ApiError(503, "the audit log cannot be written now", code="store_down", retry_s=5) from None


@final
@dataclass(frozen=True)
class Control:
    """What a server checks, records and counts. The default is that of a server without accounts."""

    access: Access = field(default_factory=KeyFile)
    recorder: Recorder = field(default_factory=NoRecorder)
    meter: RequestMeter = field(default_factory=NoMeter)


def actor_of(request: Request) -> Actor:
    """Who acts, for the audit log."""
    from trainer.control.audit import Actor

    principal = principal_of(request)
    address = request.client.host if request.client is not None else ""
    return Actor(f"key {principal.key}" if principal else "anonymous", principal.account if principal else "", address)


def recorded_action(method: str, path: str) -> str | None:
    """The name of a control action that its route does not record itself; None for any other request.

    >>> recorded_action("POST", "/v1/load_lora_adapter"), recorded_action("GET", "/v1/models")
    ('adapters', None)
    """
    return next((name for verb, pattern, name in RECORDED if verb == method and pattern.fullmatch(path)), None)


def places_of(error: BaseException) -> str:
    """The kind of an exception and the lines that it passed, without its text.

    >>> try:
    ...     raise ValueError("secret")
    ... except ValueError as error:
    ...     "secret" in places_of(error)
    False
    """
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])


@final
class WithoutContent(logging.Filter):
    """Replaces the text of exceptions in a server's log by their kind and lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the record through, without exception text."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = f"{record.getMessage().splitlines()[0]} {places_of(record.exc_info[1])}", ()
            record.exc_info = record.exc_text = None
        return True
