"""The application of `trainer serve --deployments`: completions by deployment, and the deployments themselves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from trainer.control.deployments import (
    Deployment,
    Spec,
    change_deployment,
    create_deployment,
    delete_deployment,
    get_deployment,
    list_deployments,
)
from trainer.control.store import Store
from trainer.serve.access import principal_of
from trainer.serve.answers import ChatAnswer, TextAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.app import LoadRequest, UnloadRequest, add_errors
from trainer.serve.control import Control, actor_of
from trainer.serve.control_api import in_thread
from trainer.serve.deployed import shape_for
from trainer.serve.fleet import Fleet
from trainer.serve.gateway import Gateway, served_source
from trainer.serve.guard import Guard
from trainer.serve.metrics import exposition
from trainer.serve.models import SEPARATOR
from trainer.serve.requests import ChatRequest, CompletionRequest
from trainer.serve.responses import AnswerResponse


class _Changes(BaseModel):
    """Fields of a specification; what is left out stays, or has its default."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    shape: str | None = None
    region: str | None = None
    is_addons_enabled: bool | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    scale_to_zero_s: float | None = None
    scale_up: float | None = None
    scale_down: float | None = None
    scale_down_s: float | None = None
    max_wait_s: float | None = None

    def given(self) -> dict[str, Any]:
        """What is not left out."""
        return {
            name: value for name, value in self.model_dump(exclude={"name", "account"}).items() if value is not None
        }


@final
class CreateRequest(_Changes):
    """POST /v1/deployments."""

    name: str
    account: str | None = None
    """Owner; the key's account when left out."""


@final
class ChangeRequest(_Changes):
    """PATCH /v1/deployments/NAME."""


def make_fleet_app(fleet: Fleet, store: Store, control: Control) -> FastAPI:
    """The application.

    Args:
        fleet: answers.
        store: what is asked for.
        control: checks, records and counts requests.
    """
    app = FastAPI(title="tunesmith", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.control = control
    add_errors(app)
    app.add_middleware(Guard, requests=fleet.metrics.requests, control=control)
    _add_status(app, fleet)
    _add_completions(app, fleet)
    _add_deployments(app, store)
    _add_addons(app, store)
    return app


def _add_status(app: FastAPI, fleet: Fleet) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"status": "ready" if fleet.is_leading else "not ready"}, 200 if fleet.is_leading else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await exposition(fleet))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = []
        for name, live in sorted(fleet.live.items()):
            addons = [each for each in live.version.gateway.models.adapters if each != name]
            for each in (name, *(f"{name}{SEPARATOR}{addon}" for addon in addons)):
                data.append({"id": each, "object": "model", "created": 0, "owned_by": live.account})
        return {"object": "list", "data": data}


def _add_completions(app: FastAPI, fleet: Fleet) -> None:
    async def routed(model: str, request: Request) -> tuple[Gateway, str]:
        name, _, addon = model.partition(SEPARATOR)
        gateway, cold_start = await fleet.of(name)
        if cold_start is not None:
            parts = ", ".join(f"{part};dur={seconds * 1000:.0f}" for part, seconds in cold_start.items())
            request.scope["state"]["headers"] = [(b"server-timing", parts.encode())]
        return gateway, addon or name

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        gateway, name = await routed(body.model, request)
        jobs = gateway.chat_jobs(body.model_copy(update={"model": name}))
        answer = ChatAnswer(body, jobs[0].served, jobs[0].reasoning)
        return AnswerResponse(gateway, answer, jobs, is_stream=bool(body.stream))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        gateway, name = await routed(body.model, request)
        jobs = gateway.completion_jobs(body.model_copy(update={"model": name}))
        return AnswerResponse(gateway, TextAnswer(body, jobs[0].served), jobs, is_stream=bool(body.stream))


def _add_deployments(app: FastAPI, store: Store) -> None:
    @app.post("/v1/deployments")
    async def create(body: CreateRequest, request: Request) -> dict[str, Any]:
        given = body.given()
        missing = [name for name in ("model", "shape") if name not in given]
        if missing:
            raise ApiError(400, f"{' and '.join(missing)} must be given", param=missing[0])
        spec = Spec(**given)
        principal = principal_of(request)
        account = body.account or (principal.account if principal is not None else "")

        def work() -> Deployment:
            shape_for(spec)
            served_source(spec.model)
            return create_deployment(store, actor_of(request), account, body.name, spec)

        return asdict(await in_thread(work))

    @app.get("/v1/deployments")
    async def list_all() -> dict[str, Any]:
        return {"data": [asdict(each) for each in await in_thread(lambda: list_deployments(store))]}

    @app.get("/v1/deployments/{name}")
    async def get(name: str) -> dict[str, Any]:
        return asdict(await in_thread(lambda: get_deployment(store, name)))

    @app.patch("/v1/deployments/{name}")
    async def change(name: str, body: ChangeRequest, request: Request) -> dict[str, Any]:
        changes = body.given()
        action = "update" if {"model", "shape"} & set(changes) else "scale"

        def work() -> Deployment:
            spec = get_deployment(store, name).spec
            shape_for(Spec(**{**asdict(spec), **changes}))
            if "model" in changes:
                served_source(changes["model"])
            return change_deployment(store, actor_of(request), name, action, changes)

        return asdict(await in_thread(work))

    @app.delete("/v1/deployments/{name}")
    async def delete(name: str, request: Request) -> dict[str, Any]:
        return asdict(await in_thread(lambda: delete_deployment(store, actor_of(request), name)))


def _add_addons(app: FastAPI, store: Store) -> None:
    def change(request: Request, name: str, target: str | None) -> Deployment:
        deployment, _, addon = name.partition(SEPARATOR)
        if not addon:
            raise ApiError(400, f"{name}: write DEPLOYMENT{SEPARATOR}ADDON", param="lora_name")
        spec = get_deployment(store, deployment).spec
        if not spec.is_addons_enabled:
            raise ApiError(400, f"deployment {deployment} was created without addons; update it with is_addons_enabled")
        addons = {key: value for key, value in spec.addons.items() if key != addon}
        if target is None and addon not in spec.addons:
            raise ApiError(404, f"deployment {deployment} has no addon {addon!r}")
        if target is not None:
            if served_source(target).adapter is None:
                raise ApiError(400, f"{target} is a base model, not an adapter", param="lora_path")
            addons[addon] = target
        return change_deployment(store, actor_of(request), deployment, "addons", {"addons": addons})

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest, request: Request) -> dict[str, Any]:
        found = await in_thread(lambda: change(request, body.lora_name, body.lora_path))
        return {"status": "asked for", "generation": found.generation}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest, request: Request) -> dict[str, Any]:
        found = await in_thread(lambda: change(request, body.lora_name, None))
        return {"status": "asked for", "generation": found.generation}
