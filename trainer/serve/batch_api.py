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

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from trainer.errors import UserError
from trainer.files import fsync_dir, write_atomically
from trainer.run.console import tell
from trainer.serve.access import Principal, principal_of
from trainer.serve.api_errors import ApiError
from trainer.serve.batch import BatchRun, Route, finished
from trainer.serve.choices import Job
from trainer.serve.control import Control
from trainer.serve.metering import Counted, open_patiently

DEFAULT_KEEP_S: Final = 30 * 86400.0
SWEEP_S: Final = 60.0
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

    def __init__(
        self, route: Route, root: Path, control: Control | None = None, *, keep_s: float = DEFAULT_KEEP_S
    ) -> None:
        """Use a directory, which is made where it is missing.

        Args:
            route: who answers.
            root: the directory; only its owner can read it.
            control: records deletions and counts requests.
            keep_s: lifetime of files and batches.
        """
        self._route, self.root, self._control, self._keep_s = route, root, control or Control(), keep_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add_file(self, name: str, purpose: str, data: bytes, owner: str | None) -> dict[str, Any]:
        """Keep a file; returns its description.

        Args:
            name: as the client calls it.
            purpose: of the file.
            data: its content.
            owner: an account; None where there are none.
        """
        identity = f"file-{secrets.token_hex(12)}"
        (self.root / f"{identity}.jsonl").write_bytes(data)
        about = {
            "id": identity,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time()),
            "expires_at": int(time() + self._keep_s),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
            "owner": owner,
        }
        self._write(identity, about)
        return about

    def read(self, identity: str, kind: str, reader: Principal | None) -> dict[str, Any]:
        """The description of a file or a batch.

        Args:
            identity: as a client sent it.
            kind: `file` or `batch`.
            reader: whose key the request has; None reads everything.

        Raises:
            ApiError: there is none, or another account owns it.
        """
        file = self.root / f"{identity}.json"
        about: dict[str, Any] | None = None
        if IDENTITY.fullmatch(identity) and identity.startswith(kind) and file.is_file():
            about = json.loads(file.read_text(encoding="utf-8"))
        if about is None or not _may_read(about, reader):
            raise ApiError(404, f"no {kind} {identity!r}")
        return about

    def content(self, identity: str, reader: Principal | None) -> Path:
        """The content of a file.

        Raises:
            ApiError: there is none, or another account owns it.
        """
        self.read(identity, "file", reader)
        return self.root / f"{identity}.jsonl"

    def delete_file(self, identity: str, reader: Principal | None) -> dict[str, Any]:
        """Delete a file, and check that it is gone.

        Raises:
            ApiError: there is none, or a batch reads it.
        """
        about = self.read(identity, "file", reader)
        users = [each["id"] for each in self.all_batches(None) if each["input_file_id"] == identity]
        running = [each for each in users if each in self._tasks]
        if running:
            raise ApiError(400, f"{identity} is read by {running[0]}: cancel it first")
        _remove([self.root / f"{identity}.jsonl", self.root / f"{identity}.json"])
        return {"id": about["id"], "object": "file", "deleted": True}

    async def delete_expired(self) -> int:
        """Delete files and batches at the end of their lifetime; returns their number. Each deletion is recorded."""
        count, now = 0, time()
        for file in [*self.root.glob("file-*.json"), *self.root.glob("batch-*.json")]:
            about = json.loads(file.read_text(encoding="utf-8"))
            if about.get("expires_at", now) >= now or about["id"] in self._tasks:
                continue
            await self._control.recorder.record(None, "files.expire", about["id"], {"owner": about.get("owner")})
            endings = ("jsonl", "output", "errors", "json")
            _remove([file.with_name(f"{about['id']}.{ending}") for ending in endings])
            count += 1
        return count

    def create(self, request: BatchRequest, owner: Principal | None) -> dict[str, Any]:
        """Begin a batch.

        Raises:
            ApiError: its input file does not exist, or another account owns it.
        """
        self.content(request.input_file_id, owner)
        about: dict[str, Any] = {
            "id": f"batch-{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "in_progress",
            "created_at": int(time()),
            "expires_at": int(time() + self._keep_s),
            "owner": None if owner is None else owner.account,
            "metadata": request.metadata,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self._write(about["id"], about)
        self._begin(about)
        return about

    def cancel(self, identity: str, reader: Principal | None) -> dict[str, Any]:
        """Stop a batch; results so far stay until its lifetime ends."""
        about = self.read(identity, "batch", reader)
        task = self._tasks.pop(identity, None)
        if task is not None:
            task.cancel()
            about = {**about, "status": "cancelled", "cancelled_at": int(time())}
            self._write(identity, about)
        return about

    def all_batches(self, reader: Principal | None) -> list[dict[str, Any]]:
        """The newest first."""
        found = [json.loads(file.read_text(encoding="utf-8")) for file in self.root.glob("batch-*.json")]
        return sorted((each for each in found if _may_read(each, reader)), key=lambda about: -about["created_at"])

    def resume(self) -> None:
        """Go on with the batches that an earlier server did not finish."""
        for about in self.all_batches(None):
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
        owner = about.get("owner")
        principal = None if owner is None else Principal(owner, identity, frozenset({"inference"}))

        async def admit(base: str, jobs: list[Job], prompt_tokens: int) -> Counted:
            return await open_patiently(self._control.meter, principal, base, jobs, prompt_tokens)

        try:
            source = self.content(about["input_file_id"], None)
            progress = await BatchRun(self._route, source, output, errors, admit=admit).run()
        except UserError as error:
            about |= {"status": "failed", "errors": {"object": "list", "data": [{"message": str(error)}]}}
        else:
            counts = {"total": progress.total, "completed": progress.completed, "failed": progress.failed}
            about |= {"status": "completed", "completed_at": int(time()), "request_counts": counts}
            for name, file in (("output_file_id", output), ("error_file_id", errors)):
                if finished(file):
                    data = file.read_bytes()
                    about[name] = self.add_file(f"{identity}.jsonl", "batch_output", data, owner)["id"]
        self._write(identity, about)
        _remove([output, errors])
        self._tasks.pop(identity, None)

    def _write(self, identity: str, about: dict[str, Any]) -> None:
        write_atomically(self.root / f"{identity}.json", json.dumps(about))


def _may_read(about: dict[str, Any], reader: Principal | None) -> bool:
    return reader is None or reader.is_admin or about.get("owner") == reader.account


def _remove(files: list[Path]) -> None:
    """Delete files durably.

    Raises:
        OSError: one of them is still there.
    """
    for file in files:
        file.unlink(missing_ok=True)
    fsync_dir(files[0].parent)
    left = [file.name for file in files if file.exists()]
    if left:
        raise OSError(f"not deleted: {', '.join(left)}")


def add_batches(app: FastAPI, store: BatchStore) -> None:
    """Add the routes."""

    @app.post("/v1/files")
    async def upload(request: Request, file: UploadFile, purpose: str = Form()) -> dict[str, Any]:
        principal = principal_of(request)
        owner = None if principal is None else principal.account
        return store.add_file(file.filename or "file.jsonl", purpose, await file.read(), owner)

    @app.get("/v1/files/{identity}")
    async def about_file(identity: str, request: Request) -> dict[str, Any]:
        return store.read(identity, "file", principal_of(request))

    @app.delete("/v1/files/{identity}")
    async def delete_file(identity: str, request: Request) -> dict[str, Any]:
        return store.delete_file(identity, principal_of(request))

    @app.get("/v1/files/{identity}/content")
    async def content(identity: str, request: Request) -> Response:
        return FileResponse(store.content(identity, principal_of(request)), media_type="application/jsonl")

    @app.post("/v1/batches")
    async def create(body: BatchRequest, request: Request) -> dict[str, Any]:
        return store.create(body, principal_of(request))

    @app.get("/v1/batches")
    async def list_batches(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": store.all_batches(principal_of(request)), "has_more": False}

    @app.get("/v1/batches/{identity}")
    async def about_batch(identity: str, request: Request) -> dict[str, Any]:
        return store.read(identity, "batch", principal_of(request))

    @app.post("/v1/batches/{identity}/cancel")
    async def cancel(identity: str, request: Request) -> dict[str, Any]:
        return store.cancel(identity, principal_of(request))


@asynccontextmanager
async def running_batches(store: BatchStore) -> AsyncIterator[None]:
    """Go on with unfinished batches within the block, and delete what is too old."""
    store.resume()
    sweeper = asyncio.create_task(_sweep(store))
    try:
        yield
    finally:
        sweeper.cancel()
        with suppress(asyncio.CancelledError):
            await store.stop()


async def _sweep(store: BatchStore) -> None:
    while True:
        try:
            await store.delete_expired()
        except (ApiError, OSError) as error:  # the audit log cannot be written: the next sweep deletes
            tell(f"files at the end of their lifetime are not deleted yet: {error}")
        await asyncio.sleep(SWEEP_S)
