"""`/v1/files` and `/v1/batches`: batches on the server, which go on after a restart."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import time
from typing import Any, Final, Literal, final

from fastapi import FastAPI, Form, UploadFile
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.serve.api_errors import ApiError
from trainer.serve.batch import BatchRun, finished
from trainer.serve.gateway import Gateway

IDENTITY: Final = re.compile(r"(file|batch)-[0-9a-f]{24}")


class BatchRequest(BaseModel):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


@final
class BatchStore:
    """Files and batches of a directory."""

    def __init__(self, gateway: Gateway, root: Path) -> None:
        """Use a directory, which is made where it is missing."""
        self._gateway, self.root = gateway, root
        self._tasks: dict[str, asyncio.Task[None]] = {}
        root.mkdir(parents=True, exist_ok=True)

    def add_file(self, name: str, purpose: str, data: bytes) -> dict[str, Any]:
        """Keep a file; returns its description."""
        identity = f"file-{secrets.token_hex(12)}"
        (self.root / f"{identity}.jsonl").write_bytes(data)
        about = {
            "id": identity,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        self._write(identity, about)
        return about

    def read(self, identity: str, kind: str) -> dict[str, Any]:
        """The description of a file or a batch.

        Args:
            identity: as a client sent it.
            kind: `file` or `batch`.

        Raises:
            ApiError: there is none.
        """
        file = self.root / f"{identity}.json"
        if not (IDENTITY.fullmatch(identity) and identity.startswith(kind) and file.is_file()):
            raise ApiError(404, f"no {kind} {identity!r}")
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return about

    def content(self, identity: str) -> Path:
        """The content of a file.

        Raises:
            ApiError: there is none.
        """
        self.read(identity, "file")
        return self.root / f"{identity}.jsonl"

    def create(self, request: BatchRequest) -> dict[str, Any]:
        """Begin a batch.

        Raises:
            ApiError: its input file does not exist.
        """
        self.content(request.input_file_id)
        about: dict[str, Any] = {
            "id": f"batch-{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "in_progress",
            "created_at": int(time()),
            "metadata": request.metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self._write(about["id"], about)
        self._begin(about)
        return about

    def cancel(self, identity: str) -> dict[str, Any]:
        """Stop a batch; results so far stay."""
        about = self.read(identity, "batch")
        task = self._tasks.pop(identity, None)
        if task is not None:
            task.cancel()
            about = {**about, "status": "cancelled", "cancelled_at": int(time())}
            self._write(identity, about)
        return about

    def all_batches(self) -> list[dict[str, Any]]:
        """The newest first."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.root.glob("batch-*.json")]
        return sorted(found, key=lambda about: -about["created_at"])

    def resume(self) -> None:
        """Go on with the batches that an earlier server did not finish."""
        for about in self.all_batches():
            if about["status"] == "in_progress":
                self._begin(about)

    async def stop(self) -> None:
        """Stop all batches; the next server goes on with them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, about: dict[str, Any]) -> None:
        self._tasks[about["id"]] = asyncio.create_task(self._run(about))

    async def _run(self, about: dict[str, Any]) -> None:
        identity = about["id"]
        output, errors = (self.root / f"{identity}.{kind}" for kind in ("output", "errors"))
        try:
            run = BatchRun(self._gateway, self.content(about["input_file_id"]), output, errors)
            progress = await run.run()
        except UserError as error:
            about |= {"status": "failed", "errors": {"object": "list", "data": [{"message": str(error)}]}}
        else:
            counts = {"total": progress.total, "completed": progress.completed, "failed": progress.failed}
            about |= {"status": "completed", "completed_at": int(time()), "request_counts": counts}
            for name, file in (("output_file_id", output), ("error_file_id", errors)):
                if finished(file):
                    about[name] = self.add_file(f"{identity}.jsonl", "batch_output", file.read_bytes())["id"]
        self._write(identity, about)
        self._tasks.pop(identity, None)

    def _write(self, identity: str, about: dict[str, Any]) -> None:
        write_atomically(self.root / f"{identity}.json", json.dumps(about))


def add_batches(app: FastAPI, store: BatchStore) -> None:
    """Add the routes."""

    @app.post("/v1/files")
    async def upload(file: UploadFile, purpose: str = Form()) -> dict[str, Any]:
        return store.add_file(file.filename or "file.jsonl", purpose, await file.read())

    @app.get("/v1/files/{identity}")
    async def about_file(identity: str) -> dict[str, Any]:
        return store.read(identity, "file")

    @app.get("/v1/files/{identity}/content")
    async def content(identity: str) -> Response:
        return FileResponse(store.content(identity), media_type="application/jsonl")

    @app.post("/v1/batches")
    async def create(body: BatchRequest) -> dict[str, Any]:
        return store.create(body)

    @app.get("/v1/batches")
    async def list_batches() -> dict[str, Any]:
        return {"object": "list", "data": store.all_batches(), "has_more": False}

    @app.get("/v1/batches/{identity}")
    async def about_batch(identity: str) -> dict[str, Any]:
        return store.read(identity, "batch")

    @app.post("/v1/batches/{identity}/cancel")
    async def cancel(identity: str) -> dict[str, Any]:
        return store.cancel(identity)


@asynccontextmanager
async def running_batches(store: BatchStore) -> AsyncIterator[None]:
    """Go on with unfinished batches within the block."""
    store.resume()
    try:
        yield
    finally:
        with suppress(asyncio.CancelledError):
            await store.stop()
