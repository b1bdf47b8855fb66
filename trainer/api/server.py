"""The executor's socket: operations of the gateway, each answered when it is done."""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from trainer.api.executor import Executor
from trainer.api.protocol import Refused, frame, read_frame, split_path
from trainer.api.requests import Request
from trainer.checkpoints.saved_state import FOLDERS, StateSettings

Reply: TypeAlias = "tuple[dict[str, Any], bytes]"
WAIT_S: Final = 30.0
"""Longest wait of one operation."""


@final
class Server:
    """Answers one gateway."""

    def __init__(self, executor: Executor, path: Path, hello: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            executor: does the work.
            path: of the socket, which only its owner may open.
            hello: the first message that a client gets.
        """
        self.executor, self._path, self._hello = executor, path, dict(hello)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End; called on the loop."""
        self._stop.set()

    async def serve(self) -> None:
        """Answer until `stop`."""
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._converse, str(self._path))
        finally:
            os.umask(mask)
        self.executor.start(asyncio.get_running_loop())
        async with server:
            await self._stop.wait()
        await asyncio.to_thread(self.executor.stop)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(self._hello))
        tasks: set[asyncio.Task[None]] = set()
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):  # the latter at the end
            while True:
                head, body = await read_frame(reader)
                task = asyncio.create_task(self._answer(writer, head, body))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, head: dict[str, Any], body: bytes) -> None:
        operation: Callable[[dict[str, Any], bytes], Awaitable[Reply]] | None = getattr(self, f"_do_{head['op']}", None)
        try:
            if operation is None:
                raise Refused(400, f"no operation {head['op']!r}")
            reply, content = await operation(head, body)
            message = frame({"id": head["id"], "ok": True, **reply}, content)
        except Refused as error:
            said = {"status": error.status, "error": error.message, "code": error.code, "retry_s": error.retry_s}
            message = frame({"id": head["id"], "ok": False, **said})
        except (OSError, KeyError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
            message = frame({"id": head["id"], "ok": False, "status": 500, "error": text})
        if not writer.is_closing():
            writer.write(message)

    async def _do_submit(self, head: dict[str, Any], body: bytes) -> Reply:
        """Begin at once, and acknowledge when the request is on disk."""
        request = Request(int(head["seq"]), str(head["kind"]), body)
        tenant, is_new = self.executor.submit(head["owner"], head["model"], request, head.get("most_models"))
        await asyncio.to_thread(tenant.files.requests.sync)
        return {"is_new": is_new}, b""

    async def _do_wait(self, head: dict[str, Any], _body: bytes) -> Reply:
        timeout_s = min(WAIT_S, float(head["timeout_s"]))
        state, kind, content = await self.executor.wait(head["owner"], head["request"], timeout_s)
        return {"state": state, "kind": kind}, content

    async def _do_session(self, head: dict[str, Any], _body: bytes) -> Reply:
        session = await asyncio.to_thread(self.executor.sessions.open, head["owner"], head["about"])
        return {"session": session.name}, b""

    async def _do_heartbeat(self, head: dict[str, Any], _body: bytes) -> Reply:
        self.executor.sessions.get(head["owner"], head["session"])
        return {}, b""

    async def _do_finish(self, head: dict[str, Any], _body: bytes) -> Reply:
        await asyncio.to_thread(self.executor.sessions.finish, head["owner"], head["session"])
        return {}, b""

    async def _do_create(self, head: dict[str, Any], _body: bytes) -> Reply:
        request = await asyncio.to_thread(
            self.executor.create, head["owner"], head["session"], int(head["number"]), head["lora"], head["begin"],
            head.get("user_metadata"), head.get("most_models"),
        )  # fmt: skip
        return {"request": request}, b""

    async def _do_info(self, head: dict[str, Any], _body: bytes) -> Reply:
        return await asyncio.to_thread(self.executor.tenant(head["owner"], head["model"], is_use=False).info), b""

    async def _do_models(self, head: dict[str, Any], _body: bytes) -> Reply:
        """All models of an owner."""
        tenants = [each for each in self.executor.tenants.values() if each.owner_may(head["owner"])]
        return {"models": await asyncio.to_thread(lambda: [each.info() for each in tenants])}, b""

    async def _do_sessions(self, head: dict[str, Any], _body: bytes) -> Reply:
        """All sessions of an owner."""
        found = [
            {
                "session": session.name,
                "about": session.about,
                "samplers": list(session.samplers),
                "models": [name for name, each in self.executor.tenants.items() if each.session is session],
            }
            for session in self.executor.sessions.by_name.values()
            if session.owner == head["owner"]
        ]
        return {"sessions": found}, b""

    async def _do_sampler(self, head: dict[str, Any], _body: bytes) -> Reply:
        """Open a sampling session on a state, or on the base."""
        session = self.executor.sessions.get(head["owner"], head["session"])
        if head["path"] is not None:
            self.executor.sessions.find_state(head["owner"], head["path"], FOLDERS)
        name = f"{session.name}:sample:{int(head['number'])}"
        session.samplers[name] = head["path"]
        await asyncio.to_thread(self.executor.sessions.store.save_session, session)
        return {"sampler": name}, b""

    async def _do_find_sampler(self, head: dict[str, Any], _body: bytes) -> Reply:
        """Directory of the adapter of a sampling session; None is the base."""
        name = str(head["sampler"])
        session = self.executor.sessions.get(head["owner"], name.partition(":")[0])
        if name not in session.samplers:
            raise Refused(404, f"no sampling session {name!r}")
        path = session.samplers[name]
        directory = None if path is None else str(self.executor.sessions.find_state(head["owner"], path, FOLDERS))
        return {"path": path, "directory": directory}, b""

    async def _do_find_state(self, head: dict[str, Any], _body: bytes) -> Reply:
        """Settings of a saved state."""
        directory = self.executor.sessions.find_state(head["owner"], head["path"], FOLDERS)
        settings = StateSettings.read(directory)
        return {"directory": str(directory), "lora": settings.lora.model_dump(), "updates": settings.updates}, b""

    async def _do_delete(self, head: dict[str, Any], _body: bytes) -> Reply:
        model, folder, name = split_path(head["path"])
        tenant = self.executor.tenant(head["owner"], model, is_use=False)
        await asyncio.to_thread(tenant.files.delete_state, folder, name)
        return {}, b""

    async def _do_archive(self, head: dict[str, Any], _body: bytes) -> Reply:
        """Write a state as a tar file beside it; returns its path."""
        directory = self.executor.sessions.find_state(head["owner"], head["path"], FOLDERS)
        target = directory.with_name(f".{directory.name}.tar")

        def write() -> None:
            temporary = target.with_suffix(".part")
            with tarfile.open(temporary, "w") as archive:
                for file in sorted(directory.iterdir()):
                    archive.add(file, arcname=file.name)
            temporary.rename(target)

        await asyncio.to_thread(write)
        return {"file": str(target)}, b""

    async def _do_stats(self, _head: dict[str, Any], _body: bytes) -> Reply:
        return self.executor.stats(), b""
