"""One client of an engine: many requests over one socket, continued when the engine is restarted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from trainer.engine.handshake import prove_gateway
from trainer.engine.protocol import LINE_LIMIT, Sampling, line
from trainer.serve.api_errors import ApiError

ATTEMPTS: Final = 3
"""Engines that a request is sent to, one after the other."""
READY_S: Final = 120.0
"""How long a request waits for an engine."""
PING_S: Final = 2.0
"""Between two signs of life of an engine on another machine."""
SILENT_S: Final = 15.0
"""An engine on another machine that said nothing for this long is lost: a machine without power closes no connection."""


@final
@dataclass(frozen=True)
class Token:
    """A token that was drawn."""

    token: int
    report: dict[str, Any] | None
    """`logprob` and `top`, where they were asked for."""
    began: tuple[float, float] | None = None
    """Of the first token, where the engine says it: seconds of waiting there, and of its prompt."""


@final
@dataclass(frozen=True)
class End:
    """The end of a sequence."""

    reason: str
    cached_tokens: int = 0
    version: str | None = None
    """Adapter and digest that answered."""
    prompt_logprobs: tuple[dict[str, Any], ...] = ()


@final
class LostError(Exception):
    """The engine went away."""


Event: TypeAlias = Token | End | ApiError | LostError
Address: TypeAlias = tuple[str, int]
"""Host and port."""


@final
class EngineClient:
    """Sends sequences to an engine and yields their tokens."""

    def __init__(self) -> None:
        """Begin without a connection; see `connect`."""
        self._writer: asyncio.StreamWriter | None = None
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._replies: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._ready = asyncio.Event()
        self._number, self._num_live = 0, 0
        self.hello: dict[str, Any] = {}

    @property
    def is_ready(self) -> bool:
        """Whether an engine answers."""
        return self._ready.is_set()

    @property
    def num_live(self) -> int:
        """Sequences in flight, those that wait for an engine included."""
        return self._num_live

    async def connect(self, path: Path) -> asyncio.Task[None]:
        """Open the socket; the returned task ends when the engine goes away."""
        reader, self._writer = await asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)
        self.hello = json.loads(await reader.readline())
        return asyncio.create_task(self._read(reader))

    async def connect_tcp(self, address: Address, secret: str, patience_s: float) -> asyncio.Task[None]:
        """Connect to an engine that loads its model, perhaps on another machine; the task ends when it goes away.

        Args:
            address: host and port.
            secret: both ends prove that they know it.
            patience_s: how long it may load.

        Raises:
            HandshakeError: another program listens there.
            OSError: it went away, or did not load in time.
        """
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(*address, limit=LINE_LIMIT)
            try:
                await prove_gateway(reader, writer, secret, patience_s)
                self.hello = json.loads(await reader.readline() or _gone())
            except BaseException:
                writer.close()
                raise
        self._writer = writer
        return asyncio.create_task(self._read_with_pings(reader))

    def disconnect(self) -> None:
        """Close the connection; what is in flight is lost."""
        if self._writer is not None:
            self._writer.close()

    def set_ready(self) -> None:
        """Let requests through: adapters are loaded."""
        self._ready.set()

    async def _read_with_pings(self, reader: asyncio.StreamReader) -> None:
        pings = asyncio.create_task(self._ping())
        try:
            await self._read(reader, SILENT_S)
        finally:
            pings.cancel()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            self._send({"op": "ping", "id": "ping"})

    async def _read(self, reader: asyncio.StreamReader, silent_s: float | None = None) -> None:
        with suppress(OSError):  # TimeoutError, too
            while True:
                async with asyncio.timeout(silent_s):
                    received = await reader.readline()
                if not received:
                    break
                self._dispatch(json.loads(received))
        self._ready.clear()
        if self._writer is not None:
            self._writer.close()
        for queue in self._queues.values():
            queue.put_nowait(LostError())
        replies, self._replies = list(self._replies.values()), {}
        for reply in replies:
            if not reply.done():
                reply.set_result({"ok": False, "error": "the engine went away"})

    def _dispatch(self, message: dict[str, Any]) -> None:
        began = dict(message.get("began", ()))
        for request, token, report in message.get("tokens", ()):
            queue, times = self._queues.get(request), began.pop(request, None)
            if queue is not None:
                queue.put_nowait(Token(token, report, times and tuple(times)))
        if "end" in message and (queue := self._queues.get(message["end"])) is not None:
            queue.put_nowait(_end_of(message))
        reply = self._replies.pop(message["reply"], None) if "reply" in message else None
        if reply is not None and not reply.done():  # its client may have left
            reply.set_result(message)

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a command and wait for its reply.

        Args:
            op: `load`, `unload` or `stats`.
            **fields: of the command.
        """
        request = self._new_id()
        reply = self._replies[request] = asyncio.get_running_loop().create_future()
        self._send({"op": op, "id": request, **fields})
        return await reply

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield the tokens of a sequence, then its end; closing the iterator cancels it.

        An engine that goes away is replaced: a sequence without tokens is sent again, one with tokens is continued
        from them at the same noise positions.

        Args:
            prompt: token ids.
            sampling: how tokens are drawn.
            adapter: None is the base.

        Raises:
            ApiError: the engine refuses the request, or none is there.
        """
        self._num_live += 1
        try:
            async with aclosing(self._attempts(prompt, sampling, adapter)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_live -= 1

    async def _attempts(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        drawn: list[int] = []
        for attempt in range(ATTEMPTS):
            await self._wait_ready()
            try:
                async with aclosing(self.attempt([*prompt, *drawn], rest_of(sampling, drawn), adapter)) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            drawn.append(event.token)
                        yield event
                return
            except LostError:
                if attempt + 1 == ATTEMPTS or (drawn and not can_continue(sampling)):
                    raise ApiError(503, "the engine went away during this request; send it again", retry_s=1) from None
                if (end := untold_end(sampling, drawn)) is not None:
                    yield end
                    return

    async def attempt(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield the tokens of a sequence, then its end, from the engine as it is now.

        Args:
            prompt: token ids.
            sampling: how tokens are drawn.
            adapter: None is the base.

        Raises:
            ApiError: the engine refuses the request.
            LostError: the engine went away.
        """
        request = self._new_id()
        queue = self._queues[request] = asyncio.Queue()
        is_ended = False
        try:
            self._send(
                {
                    "op": "generate",
                    "id": request,
                    "prompt": list(prompt),
                    "adapter": adapter,
                    "sampling": sampling.to_json(),
                }
            )
            while not is_ended:
                event = await queue.get()
                is_ended = not isinstance(event, Token)
                if isinstance(event, ApiError | LostError):
                    raise event
                yield event
        finally:
            del self._queues[request]
            if not is_ended and self.is_ready:
                self._send({"op": "cancel", "id": request})

    async def _wait_ready(self) -> None:
        try:
            await asyncio.wait_for(self._ready.wait(), READY_S)
        except TimeoutError:
            raise ApiError(503, "no engine is ready", retry_s=10) from None

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(line(message))

    def _new_id(self) -> str:
        self._number += 1
        return str(self._number)


def _gone() -> bytes:
    raise ConnectionResetError("the engine went away as it began")


def rest_of(sampling: Sampling, drawn: Sequence[int]) -> Sampling:
    """What is left of a sequence of which some tokens are drawn."""
    if not drawn:
        return sampling
    left = sampling.max_tokens - len(drawn)
    return replace(sampling, max_tokens=left, first_position=sampling.first_position + len(drawn))


def untold_end(sampling: Sampling, drawn: Sequence[int]) -> End | None:
    """The end of a sequence whose engine was lost after its last token; None where tokens are left."""
    if not drawn:
        return None
    if drawn[-1] in sampling.stop_ids:
        return End("stop")
    return End("length") if len(drawn) >= sampling.max_tokens else None


def can_continue(sampling: Sampling) -> bool:
    """Whether a sequence's state is its tokens alone: no grammar, no penalty that counts what was drawn."""
    return sampling.grammar is None and not sampling.presence_penalty and not sampling.frequency_penalty


def _end_of(message: dict[str, Any]) -> Event:
    if message["reason"] == "error":
        status = 400 if message.get("is_request_wrong") else 500
        return ApiError(status, message.get("message", "the engine failed"))
    return End(
        message["reason"],
        message["cached_tokens"],
        message["version"],
        tuple(message.get("prompt_logprobs", ())),
    )
