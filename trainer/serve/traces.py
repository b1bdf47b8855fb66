"""OpenTelemetry spans of requests: request > wait for a replica, queue, prefill, decode. Imported only with `--traces`.

Attributes are numbers, route templates and names of deployments: no word of a prompt or a completion, no exception text.
A `traceparent` header of the client is the parent of its request.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from time import time_ns
from typing import Any, Final, final

from fastapi import FastAPI
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer import __version__
from trainer.engine.protocol import Sampling
from trainer.serve.engine import Engine
from trainer.serve.engine_client import End, Token

PARENT: Final = TraceContextTextMapPropagator()


@final
class Traces:
    """Makes spans and sends them."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Begin.

        Args:
            exporter: gets finished spans, in batches, from a thread.
        """
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "tunesmith", "service.version": __version__})
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer: Tracer = self._provider.get_tracer("trainer.serve")

    @contextmanager
    def span(self, name: str, **attributes: str | int) -> Iterator[None]:
        """A span of what is done in the block, below the present one."""
        span = self.tracer.start_span(name, attributes=attributes)
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        except Exception:
            span.set_status(Status(StatusCode.ERROR))  # its text may hold a part of the request
            raise
        finally:
            span.end()

    def of(self, engine: Engine) -> Engine:
        """The engine, with spans of its sequences."""
        return TracedEngine(engine, self)

    def around(self, app: FastAPI) -> None:
        """Make a span of each request of an application."""
        app.add_middleware(TraceRequests, traces=self)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def open_traces(where: str) -> Traces:
    """What `--traces` asks for.

    Args:
        where: `otlp`, sent as the variables OTEL_EXPORTER_OTLP_* say; or `console`, JSON on standard error.

    Raises:
        ModuleNotFoundError: the exporter is not installed.
    """
    if where == "console":
        return Traces(ConsoleSpanExporter(out=sys.stderr))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Traces(OTLPSpanExporter())


@final
class TraceRequests:
    """Middleware: one span for each request."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        """Wrap an application.

        Args:
            app: the application.
            traces: makes spans.
        """
        self._app, self._traces = app, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parent = PARENT.extract(dict(Headers(scope=scope)), context=Context())
        method = scope["method"]
        span = self._traces.tracer.start_span(method, context=parent, kind=SpanKind.SERVER)
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, send_on)
        finally:
            route = str(getattr(scope.get("route"), "path", "other"))  # not the path, which a client may write freely
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route})
            principal = scope.get("state", {}).get("principal")
            if principal is not None:
                span.set_attribute("tunesmith.account", principal.account)
            if status:
                span.set_attribute("http.response.status_code", status)
            if not status or status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            span.end()


@final
class TracedEngine:
    """An engine whose sequences have spans."""

    def __init__(self, engine: Engine, traces: Traces) -> None:
        """Wrap an engine.

        Args:
            engine: continues token sequences.
            traces: makes spans.
        """
        self._engine, self._traces = engine, traces

    @property
    def hello(self) -> dict[str, Any]:
        """Of the engine."""
        return self._engine.hello

    @property
    def is_ready(self) -> bool:
        """Whether the engine answers."""
        return self._engine.is_ready

    @property
    def num_live(self) -> int:
        """Sequences in flight."""
        return self._engine.num_live

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Of the engine."""
        return await self._engine.ask(op, **fields)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield what the engine yields, and record when it did.

        Args:
            prompt: token ids.
            sampling: how tokens are drawn.
            adapter: None is the base.

        Raises:
            ApiError: of the engine.
        """
        begin, first, num_tokens, cached = time_ns(), 0, 0, 0
        times: tuple[float, float] | None = None
        try:
            async with aclosing(self._engine.generate(prompt, sampling, adapter)) as events:
                async for event in events:
                    if isinstance(event, Token):
                        num_tokens += 1
                        if not first:
                            first, times = time_ns(), event.began
                    else:
                        cached = event.cached_tokens
                    yield event
        finally:
            self._record(begin, first, times, {"prompt_tokens": len(prompt), "cached_tokens": cached}, num_tokens)

    def _record(
        self, begin: int, first: int, times: tuple[float, float] | None, read: dict[str, int], num_tokens: int
    ) -> None:
        """Write the spans of a sequence that ended.

        Args:
            begin: when it was sent; nanoseconds of the epoch, as all times of spans.
            first: when its first token came; 0 if none did.
            times: seconds that it waited in the engine, and that its prompt took; None if the engine does not say.
            read: attributes of the prompt.
            num_tokens: tokens that were drawn.
        """
        now = time_ns()
        if not first:
            self._write("queue", begin, now, {})
            return
        read_s = (first - begin) / 1e9 if times is None else min(times[1], (first - begin) / 1e9)
        started = first - int(read_s * 1e9)
        if times is not None:
            self._write("queue", begin, started, {"engine_wait_ms": round(1000 * times[0])})
        self._write("prefill", started, first, {**read, "has_queue": int(times is None)})
        self._write("decode", first, now, {"completion_tokens": num_tokens})

    def _write(self, name: str, start: int, end: int, attributes: dict[str, int]) -> None:
        named = {f"tunesmith.{key}": value for key, value in attributes.items()}
        self._traces.tracer.start_span(name, start_time=start, attributes=named).end(end)
