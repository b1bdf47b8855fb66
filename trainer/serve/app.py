"""The routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from trainer.serve.answers import Answer, ChatAnswer, TextAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.batch_api import BatchStore, add_batches
from trainer.serve.choices import Job, Piece, Usage, run_all
from trainer.serve.gateway import Gateway
from trainer.serve.requests import ChatRequest, CompletionRequest, validation_error
from trainer.serve.training.front import TrainingFront
from trainer.serve.training.routes import PREFIX, add_training

OPEN_ROUTES: Final = frozenset({"/health", "/ready"})
"""Routes that need no key."""
LEFT: Final = 499
"""Status of a request whose client left; nobody reads it but the log."""
Next = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    """A run, or an adapter directory, on the server's machine."""


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def make_app(gateway: Gateway, store: BatchStore, training: TrainingFront | None = None) -> FastAPI:
    """The application.

    Args:
        gateway: its state.
        store: files and batches.
        training: of the training API; None leaves it out.
    """
    app = FastAPI(title="tunesmith", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_guard(app, gateway)
    _add_status(app, gateway, training)
    _add_adapters(app, gateway)
    add_batches(app, store)
    if training is not None:
        add_training(app, training)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        jobs = gateway.chat_jobs(body)
        return await _answer(gateway, request, ChatAnswer(body, jobs[0].served), jobs, is_stream=bool(body.stream))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        jobs = gateway.completion_jobs(body)
        return await _answer(gateway, request, TextAnswer(body, jobs[0].served), jobs, is_stream=bool(body.stream))

    @app.post("/v1/embeddings")
    async def embed() -> Response:
        raise ApiError(400, "a language model that was trained to answer gives no embeddings; use an embedding model")

    return app


async def _answer(gateway: Gateway, request: Request, answer: Answer, jobs: list[Job], *, is_stream: bool) -> Response:
    gateway.admit(len(jobs))
    usage = Usage(prompt_tokens=_prompt_tokens(jobs))
    if is_stream:
        pieces = _counted(gateway, run_all(gateway.engine, jobs, usage), answer, usage)
        first = await _unless_left(_first(pieces), request)  # errors become a status, not a part of the stream
        if first is None:
            await pieces.aclose()
            return Response(status_code=LEFT)
        return StreamingResponse(_events(answer, first, pieces, usage), media_type="text/event-stream")
    whole = _collect(_counted(gateway, run_all(gateway.engine, jobs, usage), answer, usage))
    collected = await _unless_left(whole, request)
    if collected is None:
        return Response(status_code=LEFT)
    return JSONResponse(answer.whole(collected, usage), headers=_version(usage))


async def _unless_left(work: Coroutine[Any, Any, T], request: Request) -> T | None:
    """What the work returns; None where the client left before its end, which cancels it."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    done, _ = await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()
    if task in done:
        return task.result()
    task.cancel()
    with suppress(asyncio.CancelledError, ApiError):
        await task
    return None


async def _first(pieces: AsyncGenerator[Piece, None]) -> Piece:
    return await anext(pieces)


def _prompt_tokens(jobs: Sequence[Job]) -> int:
    """Tokens of the distinct prompts: `n` choices of one prompt count it once."""
    return sum(len(job.prompt) for job in jobs if job.sampling.sample == 0)


async def _collect(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _counted(
    gateway: Gateway, source: AsyncGenerator[Piece, None], answer: Answer, usage: Usage
) -> AsyncGenerator[Piece, None]:
    """The pieces of a request; its tokens are counted when it ends in any way."""
    begin, is_first = perf_counter(), True
    try:
        async with aclosing(source) as pieces:
            async for piece in pieces:
                if is_first:
                    gateway.metrics.first_token_s.observe(perf_counter() - begin)
                    is_first = False
                yield piece
    finally:
        tokens = gateway.metrics.tokens
        tokens.labels("prompt", answer.served.name).inc(usage.prompt_tokens)
        tokens.labels("completion", answer.served.name).inc(usage.completion_tokens)


async def _events(
    answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None], usage: Usage
) -> AsyncIterator[str]:
    """Server-sent events of a stream."""
    async with aclosing(pieces):
        for chunk in answer.opening():
            yield _event(chunk)
        try:
            yield _event(answer.chunk(first))
            async for piece in pieces:
                yield _event(answer.chunk(piece))
            if answer.wants_usage:
                yield _event(answer.usage_chunk(usage))
        except ApiError as error:
            yield _event(error.body())
            return
        yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, separators=(',', ':'), ensure_ascii=False)}\n\n"


def _version(usage: Usage) -> dict[str, str]:
    return {} if usage.version is None else {"X-Adapter-Version": usage.version.encode("ascii", "replace").decode()}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        found = validation_error(list(error.errors()))
        return JSONResponse(found.body(), found.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(found.body(), found.status)


def _add_guard(app: FastAPI, gateway: Gateway) -> None:
    @app.middleware("http")
    async def guard(request: Request, call_next: Next) -> Response:
        given = request.headers.get("x-request-id", "")
        request_id = (
            given if given.isascii() and 0 < len(given) <= 128 and given.isprintable() else secrets.token_hex(8)
        )
        has_own_guard = request.url.path.startswith(f"{PREFIX}/")  # see `training.guard`
        if request.url.path in OPEN_ROUTES or has_own_guard or _has_key(gateway, request):
            response = await call_next(request)
        else:
            error = ApiError(401, "no valid API key: send `Authorization: Bearer KEY`", code="invalid_api_key")
            response = JSONResponse(error.body(), error.status)
        response.headers["X-Request-Id"] = request_id
        route = request.scope.get("route")
        gateway.metrics.requests.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response


def _has_key(gateway: Gateway, request: Request) -> bool:
    digests = gateway.limits.api_key_digests
    if not digests:
        return True
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.encode()).digest()
    return kind.lower() == "bearer" and any(hmac.compare_digest(digest, each) for each in digests)


def _add_status(app: FastAPI, gateway: Gateway, training: TrainingFront | None) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = gateway.engine.is_ready and not gateway.is_draining
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(gateway.metrics.registry).decode()
        if gateway.engine.is_ready:
            text += _gauges("engine", await gateway.engine.ask("stats"))
        if training is not None and training.executor.is_ready:
            text += _gauges("training", (await training.executor.ask("stats"))[0])
        return PlainTextResponse(text)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = [gateway.models.base, *gateway.models.adapters.values()]
        return {"object": "list", "data": [_model(gateway, each.name) for each in served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(gateway, gateway.models.find(name).name)


def _gauges(part: str, stats: Mapping[str, Any]) -> str:
    """The numbers of an engine or executor, as Prometheus reads them."""
    numbers = {name: value for name, value in stats.items() if isinstance(value, int) and name not in {"ok", "id"}}
    return "".join(
        f"# TYPE trainer_{part}_{name} gauge\ntrainer_{part}_{name} {value}\n" for name, value in numbers.items()
    )


def _model(gateway: Gateway, name: str) -> dict[str, Any]:
    served = gateway.models.find(name)
    parent = None if served.adapter is None else gateway.models.base.name
    return {"id": name, "object": "model", "created": served.created, "owned_by": "tunesmith", "parent": parent}


def _add_adapters(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> dict[str, str]:
        return {"status": "loaded", "version": await gateway.load_adapter(body.lora_name, body.lora_path)}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> dict[str, str]:
        await gateway.unload_adapter(body.lora_name)
        return {"status": "unloaded"}
