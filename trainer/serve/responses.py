"""Run the sequences of a request and send what they give: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, Final, TypeAlias, final

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from trainer.serve.access import Principal
from trainer.serve.answers import Answer
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job, Piece, Usage, run_all
from trainer.serve.gateway import Gateway
from trainer.serve.metering import BASE_SUFFIX, RequestMeter

EVENT_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
"""Of a stream; the last one keeps nginx from collecting it."""
Headers: TypeAlias = list[tuple[bytes, bytes]]


@final
class AnswerResponse(Response):
    """Answers a request while it is sent, so that a response that is never sent runs nothing.

    A client that leaves ends its sequences. An error before the first token becomes a status; one behind it is an
    event of the stream.
    """

    def __init__(self, gateway: Gateway, answer: Answer, jobs: Sequence[Job], *, is_stream: bool) -> None:
        """Prepare.

        Args:
            gateway: has the engine and the counters.
            answer: how pieces are written.
            jobs: the sequences of the request.
            is_stream: events instead of one document.
        """
        super().__init__()
        self._gateway, self._answer, self._jobs, self._is_stream = gateway, answer, jobs, is_stream
        # `n` choices of one prompt count it once
        self._usage = Usage(prompt_tokens=sum(len(job.prompt) for job in jobs if job.sampling.sample == 0))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; see `Response`.

        Raises:
            ApiError: nothing was sent yet.
        """
        self._meter: RequestMeter = scope["app"].state.control.meter
        self._principal: Principal | None = scope["state"]["principal"]
        work = self._send_events(send) if self._is_stream else self._send_whole(scope, receive, send)
        await unless_left(work, receive)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            document = self._answer.whole([piece async for piece in pieces], self._usage)
        await JSONResponse(document, headers=_version(self._usage))(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            piece = await anext(pieces)  # an error until here becomes a status
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            begun = b"".join(map(_event, self._answer.opening()))
            await _send_part(send, begun + _event(self._answer.chunk(piece)))
            try:
                async for piece in pieces:
                    await _send_part(send, _event(self._answer.chunk(piece)))
                rest = _event(self._answer.usage_chunk(self._usage)) if self._answer.wants_usage else b""
                rest += b"data: [DONE]\n\n"
            except ApiError as error:
                rest = _event(error.body())
        await send({"type": "http.response.body", "body": rest})

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of a request; its tokens are counted when it ends in any way."""
        metrics, usage, name = self._gateway.metrics, self._usage, self._answer.served.name
        begin, first_s = perf_counter(), 0.0
        base = self._gateway.models.base.name
        labels = labels_of(base, self._answer.served.adapter)
        by_model, is_error, is_left = metrics.by_model, True, False
        with self._gateway.admitted(len(self._jobs)):
            ticket = await self._meter.open(self._principal, base, self._jobs, usage.prompt_tokens)
            try:
                async with aclosing(run_all(self._gateway.engine, self._jobs, usage)) as pieces:
                    async for piece in pieces:
                        if not first_s:
                            first_s = perf_counter() - begin
                            metrics.first_token_s.observe(first_s)
                            by_model.first_s.labels(*labels).observe(first_s)
                        yield piece
                is_error = False
            except (asyncio.CancelledError, GeneratorExit):
                is_error, is_left = False, True
                raise
            finally:
                ticket.close(usage.completion_tokens)
                by_model.errors.labels(*labels).inc(int(is_error))
                by_model.left.labels(*labels).inc(int(is_left))
                if usage.completion_tokens > 1 and first_s:
                    rest_s = perf_counter() - begin - first_s
                    by_model.token_s.labels(*labels).observe(rest_s / (usage.completion_tokens - 1))
                by_model.prompt.labels(*labels).inc(usage.prompt_tokens)
                by_model.cached.labels(*labels).inc(usage.cached_tokens)
                by_model.output.labels(*labels).inc(usage.completion_tokens)
                metrics.tokens.labels("prompt", name).inc(usage.prompt_tokens)
                metrics.tokens.labels("completion", name).inc(usage.completion_tokens)


def labels_of(base: str, adapter: str | None) -> tuple[str, str, str]:
    """Deployment, model and addon of a request, for the counters.

    >>> labels_of("orders:base", "orders"), labels_of("orders", "tea")
    (('orders', 'orders', ''), ('orders', 'orders', 'tea'))
    """
    name = base.removesuffix(BASE_SUFFIX)
    return name, name, "" if adapter is None or adapter == name else adapter


async def unless_left(work: Any, receive: Receive) -> None:
    """Await a coroutine, which is cancelled where the client leaves before its end.

    Args:
        work: a coroutine.
        receive: of the request, whose body has been read.

    Raises:
        ApiError: of the coroutine.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError, OSError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def _version(usage: Usage) -> dict[str, str]:
    return {} if usage.version is None else {"X-Adapter-Version": usage.version.encode("ascii", "replace").decode()}
