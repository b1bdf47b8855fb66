"""Adapters and replicas that change at the same time; the engine's side of the socket is written here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import LaunchError
from trainer.serve.backend import NoPlaceError
from trainer.serve.engine_client import EngineClient
from trainer.serve.replicas import ReplicaPool


class Engine:
    """A host whose engine loads what it is told, and waits for `goes_on` before its first load."""

    def __init__(self, directory: Path, *, refuses: str = "", place: Exception | None = None) -> None:
        self.has: dict[str, str] = {}
        self.is_loading, self.goes_on = asyncio.Event(), asyncio.Event()
        self.goes_on.set()
        self._socket, self._refuses, self._place = directory / f"{id(self)}.sock", refuses, place
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def about(self) -> Mapping[str, Any]:
        return {"pid": 1}

    async def place(self) -> None:
        if self._place is not None:
            raise self._place

    async def connect(self, client: EngineClient) -> asyncio.Task[None]:
        self._server = await asyncio.start_unix_server(self._converse, str(self._socket))
        return await client.connect(self._socket)

    async def end(self) -> None:
        for writer in self._writers:
            writer.close()
        if self._server is not None:
            self._server.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        writer.write(b'{"hello": "test", "vocab": 8, "window": 8}\n')
        while received := await reader.readline():
            message = json.loads(received)
            reply: dict[str, Any] = {"reply": message["id"], "ok": True}
            if message["op"] == "load":
                self.is_loading.set()
                await self.goes_on.wait()
                reply |= {"ok": message["path"] != self._refuses, "error": "refused", "version": message["path"]}
                if reply["ok"]:
                    self.has[message["name"]] = message["path"]
            elif message["op"] == "unload":
                del self.has[message["name"]]
            else:
                end = {"end": message["id"], "reason": "length", "cached_tokens": 0, "version": None}
                writer.write(json.dumps({"tokens": [[message["id"], 1, None]]}).encode() + b"\n")
                reply = end
            writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()


def test_a_replica_that_starts_has_what_was_asked_for_meanwhile(tmp_path: Path) -> None:
    async def run() -> dict[str, str]:
        engine = Engine(tmp_path)
        pool = ReplicaPool(lambda: engine, 5)
        pool.adapters |= {"kept": "a", "changed": "old", "gone": "c"}
        engine.goes_on.clear()
        start = asyncio.create_task(pool.start(pool.new()))
        await engine.is_loading.wait()
        await pool.ask("load", name="changed", path="new")
        await pool.ask("load", name="added", path="d")
        await pool.ask("unload", name="gone")
        engine.goes_on.set()
        assert await start
        has = dict(engine.has)
        await pool.stop(pool.replicas[0], 0)
        return has

    assert asyncio.run(run()) == {"kept": "a", "changed": "new", "added": "d"}


def test_a_refused_adapter_leaves_the_old_one_and_a_lost_replica_refuses_nothing(tmp_path: Path) -> None:
    async def run() -> tuple[bool, dict[str, str], bool]:
        engines = [Engine(tmp_path, refuses="bad"), Engine(tmp_path, refuses="bad")]
        waiting = list(engines)
        pool = ReplicaPool(lambda: waiting.pop(0), 5)
        for _ in engines:
            await pool.start(pool.new())
        await pool.ask("load", name="a", path="good")
        refused = await pool.ask("load", name="a", path="bad")
        after = dict(pool.adapters)
        engines[0].goes_on.clear()
        engines[0].is_loading.clear()
        load = asyncio.create_task(pool.ask("load", name="a", path="better"))
        await engines[0].is_loading.wait()
        await engines[0].end()  # lost while it loads
        engines[0].goes_on.set()
        reply = await load
        for replica in list(pool.replicas):
            await pool.stop(replica, 0)
        return refused["ok"], after, reply["ok"]

    assert asyncio.run(run()) == (False, {"a": "good"}, True)


def test_a_replica_that_is_ended_while_it_starts_did_not_fail(tmp_path: Path) -> None:
    async def run() -> bool:
        engine = Engine(tmp_path)
        pool = ReplicaPool(lambda: engine, 5)
        pool.adapters["a"] = "b"
        engine.goes_on.clear()
        replica = pool.new()
        start = asyncio.create_task(pool.start(replica))
        await engine.is_loading.wait()
        stop = asyncio.create_task(pool.stop(replica, 0))
        has_started = await start
        engine.goes_on.set()
        await stop
        assert pool.replicas == []
        return has_started

    assert asyncio.run(run()) is False


@pytest.mark.parametrize("error", [LaunchError("it ended"), NoPlaceError("no room")])
def test_a_replica_without_an_engine_is_not_kept(tmp_path: Path, error: Exception) -> None:
    async def run() -> None:
        pool = ReplicaPool(lambda: Engine(tmp_path, place=error), 5)
        with pytest.raises(type(error), match=str(error)):
            await pool.start(pool.new())
        assert pool.replicas == []

    asyncio.run(run())
