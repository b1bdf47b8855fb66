"""One deployment under an address of its own, where it looks like a server of one model: runs roll out on it.

`rollout.server_url: http://HOST:8000/deployments/NAME`. Adapters that are loaded here are those of its replicas, new
ones included, until they are unloaded or the control process ends; they are not part of the specification.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from trainer.serve.answers import ChatAnswer, TextAnswer
from trainer.serve.api_errors import ApiError
from trainer.serve.app import LoadRequest, UnloadRequest, model_card
from trainer.serve.fleet import Fleet
from trainer.serve.replicas import NOT_LOADED
from trainer.serve.requests import ChatRequest, CompletionRequest
from trainer.serve.responses import AnswerResponse

ROOT = "/deployments/{name}/v1"


def add_addresses(app: FastAPI, fleet: Fleet) -> None:
    """Add the routes; they need a key with the scope `admin`, as every change of adapters does."""

    @app.get(f"{ROOT}/models")
    async def models(name: str) -> dict[str, Any]:
        gateway, _ = await fleet.of(name)
        served = [gateway.models.base, *gateway.models.adapters.values()]
        return {"object": "list", "data": [model_card(gateway, each.name) for each in served]}

    @app.post(f"{ROOT}/chat/completions")
    async def chat(name: str, body: ChatRequest) -> Response:
        gateway, _ = await fleet.of(name)
        jobs = gateway.chat_jobs(body)
        answer = ChatAnswer(body, jobs[0].served, jobs[0].reasoning)
        return AnswerResponse(gateway, answer, jobs, is_stream=bool(body.stream))

    @app.post(f"{ROOT}/completions")
    async def complete(name: str, body: CompletionRequest) -> Response:
        gateway, _ = await fleet.of(name)
        jobs = gateway.completion_jobs(body)
        return AnswerResponse(gateway, TextAnswer(body, jobs[0].served), jobs, is_stream=bool(body.stream))

    @app.post(f"{ROOT}/load_lora_adapter")
    async def load(name: str, body: LoadRequest) -> dict[str, str]:
        gateway, _ = await fleet.of(name)
        _refuse_own(fleet, name, body.lora_name)
        version = await gateway.load_adapter(body.lora_name, body.lora_path)
        if version == NOT_LOADED:
            raise ApiError(503, f"the replicas of {name} were lost as they loaded it; send it again", retry_s=1)
        return {"status": "loaded", "version": version}

    @app.post(f"{ROOT}/unload_lora_adapter")
    async def unload(name: str, body: UnloadRequest) -> dict[str, str]:
        gateway, _ = await fleet.of(name)
        _refuse_own(fleet, name, body.lora_name)
        await gateway.unload_adapter(body.lora_name)
        return {"status": "unloaded"}


def _refuse_own(fleet: Fleet, name: str, adapter: str) -> None:
    if adapter in fleet.live[name].spec.addons or adapter == name:
        raise ApiError(400, f"{adapter} is part of the deployment: change it there", param="lora_name")
