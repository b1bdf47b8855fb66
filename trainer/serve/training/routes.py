"""The routes of `/api/v1`."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from trainer.checkpoints.saved_state import SCHEME
from trainer.serve.api_errors import ApiError
from trainer.serve.training.front import MAX_BODY, TrainingFront, json_body, state_of
from trainer.serve.training.samples import sample_body

PREFIX: Final = "/api/v1"
PROTOBUF: Final = "application/x-protobuf"
POLL_S: Final = 25.0
"""How long a poll is held; the client waits for 45 s."""
Handler: TypeAlias = Callable[[str, Request, bytes], Awaitable[Any]]
"""From account, request and body to what is answered: a response, or what JSON can write."""


def add_training(app: FastAPI, front: TrainingFront) -> None:
    """Add the routes.

    Args:
        app: the gateway's application.
        front: their state.
    """
    _add_sessions(app, front)
    _add_training(app, front)
    _add_futures(app, front)
    _add_states(app, front)
    _add_other(app, front)


def _route(app: FastAPI, front: TrainingFront, method: str, path: str, action: str, handler: Handler) -> None:
    """Add a route whose body is read and whose account is known before it does anything."""

    async def answer(request: Request) -> Response:
        raw = await _body(request)
        account = await front.guard.enter(request, action, num_bytes=len(raw))
        status = 500
        try:
            found = await handler(account, request, raw)
            response = found if isinstance(found, Response) else JSONResponse(found)
            status = response.status_code
        except ApiError as error:
            status = error.status
            raise
        finally:
            await front.guard.leave(account, action, status=status, subject=request.url.path)
        return response

    app.add_api_route(f"{PREFIX}/{path}", answer, methods=[method], name=action)


async def _body(request: Request) -> bytes:
    """The body, decompressed, up to the limit.

    Raises:
        ApiError: it is too large, or not compressed as it says.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(413, f"the body has more than {MAX_BODY:,} bytes; send fewer data in a request")
        parts.append(part)
    raw = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return raw
    if encoding != "zstd":
        raise ApiError(400, f"Content-Encoding {encoding!r}: send zstd, or none")
    return await asyncio.to_thread(_decompressed, raw)


def _decompressed(raw: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise ApiError(400, "this server cannot read zstd: pip install 'tunesmith[training]'") from None
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)) as reader:
            found = reader.read(MAX_BODY + 1)
    except zstandard.ZstdError as error:
        raise ApiError(400, f"the body is no zstd: {error}") from None
    if len(found) > MAX_BODY:
        raise ApiError(413, f"the body has more than {MAX_BODY:,} bytes; send fewer data in a request")
    return found


def _add_sessions(app: FastAPI, front: TrainingFront) -> None:
    async def config(_owner: str, _request: Request, _raw: bytes) -> Any:
        return front.config()

    async def dynamic_config(_owner: str, _request: Request, _raw: bytes) -> Any:
        return {"sample_cancel_enabled": True}

    async def create_session(owner: str, _request: Request, raw: bytes) -> Any:
        return await front.create_session(owner, json_body(raw))

    async def heartbeat(owner: str, _request: Request, raw: bytes) -> Any:
        await front.executor.ask("heartbeat", owner=owner, session=json_body(raw, "session_id")["session_id"])
        return {"type": "session_heartbeat"}

    async def finish(owner: str, request: Request, _raw: bytes) -> Any:
        await front.executor.ask("finish", owner=owner, session=request.path_params["session"])
        return {"status": "finished"}

    async def session(owner: str, request: Request, _raw: bytes) -> Any:
        name = request.path_params["session"]
        found = next((each for each in await sessions_of(owner) if each["session"] == name), None)
        if found is None:
            raise ApiError(404, f"no session {name!r}")
        about = found["about"]
        return {
            "training_run_ids": found["models"],
            "sampler_ids": found["samplers"],
            "user_metadata": about.get("user_metadata"),
            "display_name": about.get("display_name"),
        }

    async def sessions(owner: str, _request: Request, _raw: bytes) -> Any:
        return {"sessions": [each["session"] for each in await sessions_of(owner)]}

    async def sessions_of(owner: str) -> list[dict[str, Any]]:
        reply, _ = await front.executor.ask("sessions", owner=owner)
        found: list[dict[str, Any]] = reply["sessions"]
        return found

    for method, path, action, handler in (
        ("POST", "client/config", "client_config", config),
        ("POST", "client/dynamic_config", "client_dynamic_config", dynamic_config),
        ("POST", "create_session", "create_session", create_session),
        ("POST", "session_heartbeat", "session_heartbeat", heartbeat),
        ("GET", "sessions", "list_sessions", sessions),
        ("GET", "sessions/{session}", "get_session", session),
        ("POST", "sessions/{session}/finish", "finish_session", finish),
    ):
        _route(app, front, method, path, action, handler)


def _add_training(app: FastAPI, front: TrainingFront) -> None:
    async def create_model(owner: str, _request: Request, raw: bytes) -> Any:
        return await front.create_model(owner, json_body(raw, "session_id", "model_seq_id", "base_model"))

    async def get_info(owner: str, _request: Request, raw: bytes) -> Any:
        model = json_body(raw, "model_id")["model_id"]
        return front.info(model, (await front.model(owner, model))["lora_rank"])

    async def forward_backward(owner: str, request: Request, raw: bytes) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind != PROTOBUF:
            raise ApiError(400, f"Content-Type {kind!r}: this request is {PROTOBUF}")
        return await front.submit_pass(owner, raw)

    def ordered(kind: str, *needed: str) -> Handler:
        async def handler(owner: str, _request: Request, raw: bytes) -> Any:
            return await front.submit(owner, kind, json_body(raw, "model_id", *needed), raw)

        return handler

    async def load_weights(owner: str, _request: Request, raw: bytes) -> Any:
        return await front.load_weights(owner, json_body(raw, "path"), raw)

    for path, handler in (
        ("create_model", create_model),
        ("get_info", get_info),
        ("forward", forward_backward),
        ("forward_backward", forward_backward),
        ("optim_step", ordered("optim")),
        ("save_weights", ordered("save")),
        ("save_weights_for_sampler", ordered("save_sampler")),
        ("load_weights", load_weights),
    ):
        _route(app, front, "POST", path, path, handler)


def _add_futures(app: FastAPI, front: TrainingFront) -> None:
    async def create_sampling_session(owner: str, _request: Request, raw: bytes) -> Any:
        body = json_body(raw, "session_id", "sampling_session_seq_id")
        path = body.get("model_path")
        if path is None:
            front.check_base(body.get("base_model") or "")
        reply, _ = await front.executor.ask(
            "sampler", owner=owner, session=body["session_id"], number=body["sampling_session_seq_id"], path=path
        )
        return {"type": "create_sampling_session", "sampling_session_id": reply["sampler"]}

    async def asample(owner: str, _request: Request, raw: bytes) -> Any:
        return await front.start_sample(owner, sample_body(raw))

    async def retrieve(owner: str, _request: Request, raw: bytes) -> Any:
        name = str(json_body(raw, "request_id")["request_id"])
        if ":sample:" in name:
            try:
                found = await front.samples.wait(owner, name, POLL_S)
            except asyncio.CancelledError:
                raise ApiError(410, f"request {name} was cancelled") from None
            return _pending(name, "active") if found is None else Response(found, media_type=PROTOBUF)
        reply, content = await front.executor.ask("wait", owner=owner, request=name, timeout_s=POLL_S)
        if reply["state"] != "done":
            return _pending(name, "active" if reply["state"] == "pending" else "paused_capacity")
        return Response(content, media_type=PROTOBUF if reply["kind"] == "pass" else "application/json")

    async def cancel(owner: str, _request: Request, raw: bytes) -> Any:
        front.samples.cancel(owner, str(json_body(raw, "request_id")["request_id"]))
        return {"status": "cancelled"}

    async def sampler(owner: str, request: Request, _raw: bytes) -> Any:
        name = request.path_params["sampler"]
        reply, _ = await front.executor.ask("find_sampler", owner=owner, sampler=name)
        return {"sampler_id": name, "base_model": front.model_name, "model_path": reply["path"]}

    for method, path, handler in (
        ("POST", "create_sampling_session", create_sampling_session),
        ("POST", "asample", asample),
        ("POST", "retrieve_future", retrieve),
        ("POST", "cancel_future", cancel),
    ):
        _route(app, front, method, path, path, handler)
    _route(app, front, "GET", "samplers/{sampler}", "get_sampler", sampler)


def _pending(request: str, state: str) -> Response:
    body: Mapping[str, Any] = {"type": "try_again", "request_id": request, "queue_state": state}
    return JSONResponse(body, 408)


def _add_states(app: FastAPI, front: TrainingFront) -> None:
    async def runs(owner: str, request: Request, _raw: bytes) -> Any:
        reply, _ = await front.executor.ask("models", owner=owner)
        offset, limit = _page(request)
        found = [front.run(owner, model) for model in reply["models"]]
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {"training_runs": found[offset : offset + limit], "cursor": cursor}

    async def run(owner: str, request: Request, _raw: bytes) -> Any:
        return front.run(owner, await front.model(owner, request.path_params["model"]))

    async def states(owner: str, request: Request, _raw: bytes) -> Any:
        model = await front.model(owner, request.path_params["model"])
        return {"checkpoints": [state_of(each) for each in model["states"]]}

    async def all_states(owner: str, request: Request, _raw: bytes) -> Any:
        reply, _ = await front.executor.ask("models", owner=owner)
        offset, limit = _page(request)
        found = [state_of(each) for model in reply["models"] for each in model["states"]]
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {"checkpoints": found[offset : offset + limit], "cursor": cursor}

    async def delete(owner: str, request: Request, _raw: bytes) -> Any:
        await front.executor.ask("delete", owner=owner, path=_path(request))
        return Response(status_code=204)

    async def archive(owner: str, request: Request, _raw: bytes) -> Any:
        reply, _ = await front.executor.ask("archive", owner=owner, path=_path(request))
        name = f"{request.path_params['name']}.tar"
        return FileResponse(reply["file"], media_type="application/x-tar", filename=name)

    async def weights_info(owner: str, _request: Request, raw: bytes) -> Any:
        path = json_body(raw, "tinker_path")["tinker_path"]
        reply, _ = await front.executor.ask("find_state", owner=owner, path=path)
        layers = reply["lora"]["target_modules"]
        return {
            "base_model": front.model_name,
            "is_lora": True,
            "lora_rank": reply["lora"]["rank"],
            "train_unembed": False,
            "train_attn": layers == "all-linear" or "q_proj" in layers,
            "train_mlp": layers == "all-linear" or "q_proj" not in layers,
        }

    state = "training_runs/{model}/checkpoints/{folder}/{name}"
    for method, path, action, handler in (
        ("GET", "training_runs", "list_models", runs),
        ("GET", "training_runs/{model}", "get_model", run),
        ("GET", "training_runs/{model}/checkpoints", "list_checkpoints", states),
        ("GET", "checkpoints", "list_all_checkpoints", all_states),
        ("DELETE", state, "delete_checkpoint", delete),
        ("GET", f"{state}/archive", "archive_checkpoint", archive),
        ("POST", "weights_info", "weights_info", weights_info),
    ):
        _route(app, front, method, path, action, handler)


def _path(request: Request) -> str:
    parts = request.path_params
    return f"{SCHEME}{parts['model']}/{parts['folder']}/{parts['name']}"


def _page(request: Request) -> tuple[int, int]:
    """Offset and limit of a list."""
    try:
        offset, limit = (int(request.query_params.get(name, value)) for name, value in (("offset", 0), ("limit", 100)))
    except ValueError:
        raise ApiError(400, "offset and limit are numbers") from None
    return max(0, offset), max(0, limit)


def _add_other(app: FastAPI, front: TrainingFront) -> None:
    async def health(_owner: str, _request: Request, _raw: bytes) -> Any:
        if not front.executor.is_ready:
            raise ApiError(503, "no executor is ready", retry_s=5)
        return {"status": "ok"}

    async def capabilities(_owner: str, _request: Request, _raw: bytes) -> Any:
        model = {
            "model_name": front.model_name,
            "max_context_length": front.executor.hello["window"],
            "trainable": True,
            "sampleable": True,
        }
        return {"supported_models": [model]}

    async def telemetry(_owner: str, _request: Request, _raw: bytes) -> Any:
        return {"status": "accepted"}  # of the client about itself: nothing is kept

    _route(app, front, "GET", "healthz", "health", health)
    _route(app, front, "GET", "get_server_capabilities", "capabilities", capabilities)
    _route(app, front, "POST", "telemetry", "telemetry", telemetry)
