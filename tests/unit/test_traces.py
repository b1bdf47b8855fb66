"""Spans of requests: what is below what, how long each part was, and what they do not say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from trainer.engine.protocol import Sampling
from trainer.serve.engine_client import End, Token
from trainer.serve.traces import Traces

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLING = Sampling(max_tokens=3, seed=0)


class Slow:
    """An engine that lets a sequence wait for 30 ms, reads for 60 ms and draws two tokens, 40 ms apart."""

    hello: dict[str, Any] = {"window": 8, "vocab": 8}
    is_ready, num_live = True, 0

    def __init__(self, began: tuple[float, float] | None = (0.03, 0.06), error: Exception | None = None) -> None:
        self._began, self._error = began, error

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        return {"ok": True}

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        if self._error is not None:
            raise self._error
        await asyncio.sleep(0.09)
        yield Token(4, None, self._began)
        await asyncio.sleep(0.04)
        yield Token(5, None)
        yield End("stop", cached_tokens=1)


def spans_of(engine: Slow, headers: dict[str, str] | None = None, path: str = "/ask/secret-word") -> list[ReadableSpan]:
    """The spans of one request to an application whose route draws from an engine."""
    exporter = InMemorySpanExporter()
    traces = Traces(exporter)
    app = FastAPI()
    traced = traces.of(engine)

    @app.get("/ask/{word}")
    async def ask(word: str) -> int:
        with traces.span("replica wait", deployment="orders"):
            pass
        async with aclosing(traced.generate((1, 2, 3), SAMPLING, None)) as events:
            return len([event async for event in events])

    traces.around(app)

    async def request() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get(path, headers=headers)

    asyncio.run(request())
    traces.close()
    return list(exporter.get_finished_spans())


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_has_its_wait_queue_prefill_and_decode_below_it() -> None:
    spans = {span.name: span for span in spans_of(Slow())}
    assert sorted(spans) == ["GET /ask/{word}", "decode", "prefill", "queue", "replica wait"]
    request = spans.pop("GET /ask/{word}")
    assert request.parent is None
    assert {span.parent.span_id for span in spans.values()} == {request.context.span_id}
    assert seconds(spans["prefill"]) == pytest.approx(0.06)  # as the engine says
    assert seconds(spans["queue"]) >= 0.03
    assert seconds(spans["decode"]) >= 0.04
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert dict(spans["prefill"].attributes or {}) == {
        "tunesmith.prompt_tokens": 3,
        "tunesmith.cached_tokens": 1,
        "tunesmith.has_queue": 0,
    }
    assert dict(spans["decode"].attributes or {}) == {"tunesmith.completion_tokens": 2}


def test_a_clients_trace_is_continued() -> None:
    spans = spans_of(Slow(), {"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    (request,) = [span for span in spans if span.name.startswith("GET")]
    assert f"{request.parent.span_id:016x}" == SPAN


def test_an_engine_that_does_not_say_when_it_began_has_queue_and_prefill_in_one_span() -> None:
    spans = {span.name: span for span in spans_of(Slow(began=None))}
    assert "queue" not in spans
    assert (spans["prefill"].attributes or {})["tunesmith.has_queue"] == 1
    assert seconds(spans["prefill"]) >= 0.09


def test_no_word_of_a_request_and_no_exception_is_in_a_span() -> None:
    for spans in (spans_of(Slow(error=ValueError("secret-word"))), spans_of(Slow(), path="/none/secret-word")):
        assert spans
        assert "secret-word" not in "".join(span.to_json() for span in spans)
    (request,) = [span for span in spans_of(Slow(error=ValueError("x"))) if span.name.startswith("GET")]
    assert request.status.status_code is StatusCode.ERROR
    assert not request.events
