"""The routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from trainer.serve.access import KeyFile
from trainer.serve.answers import ChatAnswer, TextAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.batch_api import BatchStore, add_batches
from trainer.serve.control import Control
from trainer.serve.gateway import Gateway
from trainer.serve.guard import Guard
from trainer.serve.metrics import EngineView, engine_lines, engine_pids
from trainer.serve.requests import ChatRequest, CompletionRequest, validation_error
from trainer.serve.responses import AnswerResponse
from trainer.serve.training.front import TrainingFront
from trainer.serve.training.routes import add_training


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    """A run, or an adapter directory, on the server's machine."""


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


def make_app(
    gateway: Gateway, store: BatchStore, control: Control | None = None, training: TrainingFront | None = None
) -> FastAPI:
    """The application.

    Args:
        gateway: its state.
        store: files and batches.
        control: checks, records and counts requests; the keys of `gateway.limits` when left out.
        training: of the training API; None leaves it out.
    """
    app = FastAPI(title="tunesmith", docs_url=None, redoc_url=None, openapi_url=None)
    add_errors(app)
    app.state.control = control or Control(KeyFile(gateway.limits.api_key_digests))
    app.add_middleware(Guard, requests=gateway.metrics.requests, control=app.state.control)
    _add_status(app, gateway, training)
    _add_adapters(app, gateway)
    add_batches(app, store)
    if training is not None:
        add_training(app, training)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        jobs = gateway.chat_jobs(body)
        return AnswerResponse(
            gateway, ChatAnswer(body, jobs[0].served, jobs[0].reasoning), jobs, is_stream=bool(body.stream)
        )

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest) -> Response:
        jobs = gateway.completion_jobs(body)
        return AnswerResponse(gateway, TextAnswer(body, jobs[0].served), jobs, is_stream=bool(body.stream))

    @app.post("/v1/embeddings")
    async def embed() -> Response:
        raise ApiError(400, "a language model that was trained to answer gives no embeddings; use an embedding model")

    return app


def add_errors(app: FastAPI) -> None:
    """Answer errors in OpenAI's form."""

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
            stats = await gateway.engine.ask("stats")
            text += _gauges("engine", stats)
            text += engine_lines([EngineView(gateway.models.base.name, stats, engine_pids())])
        if training is not None and training.executor.is_ready:
            text += _gauges("training", (await training.executor.ask("stats"))[0])
        return PlainTextResponse(text)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = [gateway.models.base, *gateway.models.adapters.values()]
        return {"object": "list", "data": [model_card(gateway, each.name) for each in served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return model_card(gateway, gateway.models.find(name).name)


def _gauges(part: str, stats: Mapping[str, Any]) -> str:
    """The numbers of an engine or executor, as Prometheus reads them."""
    numbers = {name: value for name, value in stats.items() if isinstance(value, int) and name not in {"ok", "id"}}
    return "".join(
        f"# TYPE trainer_{part}_{name} gauge\ntrainer_{part}_{name} {value}\n" for name, value in numbers.items()
    )


def model_card(gateway: Gateway, name: str) -> dict[str, Any]:
    """A model as OpenAI describes it."""
    served = gateway.models.find(name)
    parent = None if served.adapter is None else gateway.models.base.name
    card = {"id": name, "object": "model", "created": served.created, "owned_by": "tunesmith", "parent": parent}
    return card | {"root": served.path or gateway.models.path, "max_model_len": gateway.engine.hello.get("window")}


def _add_adapters(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> dict[str, str]:
        return {"status": "loaded", "version": await gateway.load_adapter(body.lora_name, body.lora_path)}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> dict[str, str]:
        await gateway.unload_adapter(body.lora_name)
        return {"status": "unloaded"}
