"""An engine on another machine: who may connect, when it counts as lost, and when it ends by itself."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from trainer.config.recipe import ModelSettings
from trainer.engine.connections import Connections, Listening
from trainer.engine.handshake import HandshakeError
from trainer.engine.protocol import Sampling
from trainer.serve import engine_client
from trainer.serve.engine_client import Address, EngineClient, End, LostError, Token
from trainer.serve.ray_actor import ReplicaActor


def listening(secret: str) -> Address:
    """A connection thread of an engine, without the engine."""
    taken = socket.create_server(("127.0.0.1", 0))
    address: Address = taken.getsockname()[:2]
    Connections(Listening(handle=taken.detach(), secret=secret), {"hello": "here"})
    return address


def test_who_knows_the_secret_is_greeted_and_gets_its_pings_back() -> None:
    async def talk() -> tuple[object, object]:
        client = EngineClient()
        connection = await client.connect_tcp(listening("right"), "right", 20)
        reply = await client.ask("ping")
        client.disconnect()
        await connection
        return client.hello, reply

    hello, reply = asyncio.run(talk())
    assert hello == {"hello": "here"}
    assert reply == {"reply": "1", "ok": True}


def test_a_client_with_another_secret_is_not_greeted() -> None:
    with pytest.raises(OSError, match="closed the connection"):
        asyncio.run(EngineClient().connect_tcp(listening("right"), "wrong", 20))


def test_a_program_that_does_not_know_the_secret_gets_no_request() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def pretend() -> None:
        connection, _ = taken.accept()
        with connection, taken:
            connection.sendall(b"0" * 64)
            heard.append(connection.recv(1 << 12))
            connection.sendall(b"f" * 64 + b'{"hello": "trainer.engine"}\n')
            heard.append(connection.recv(1 << 12))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(HandshakeError, match="not the engine that was placed"):
        asyncio.run(EngineClient().connect_tcp(taken.getsockname()[:2], "right", 20))
    thread.join()
    assert b"right" not in heard[0]  # the secret is not sent
    assert heard[1] == b""


def test_an_engine_whose_machine_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It greets and then says nothing, as a machine without power: the connection stays open."""
    monkeypatch.setattr(engine_client, "SILENT_S", 0.3)

    class Silent(Connections):  # type: ignore[misc]  # final, but for this
        async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from trainer.engine.handshake import prove_engine

            await prove_engine(reader, writer, "s")
            writer.write(b'{"hello": "here"}\n')
            await asyncio.sleep(600)

    taken = socket.create_server(("127.0.0.1", 0))
    address: Address = taken.getsockname()[:2]
    Silent(Listening(handle=taken.detach(), secret="s"), {})

    async def wait() -> None:
        client = EngineClient()
        connection = await client.connect_tcp(address, "s", 20)
        client.set_ready()
        with pytest.raises(LostError):
            async for _ in client.attempt([1], Sampling(max_tokens=1, seed=0), None):
                pass
        await connection

    asyncio.run(wait())


@contextmanager
def actor(directory: Path, *words: str) -> Iterator[ReplicaActor]:
    """What Ray runs on a node, without Ray."""
    settings = ModelSettings(path="model", compute_dtype="float32")
    arguments = ["--model", settings.model_dump_json(), "--kv-cache-tokens", "512", *words]
    found = ReplicaActor(arguments, str(directory), "secret")
    try:
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_an_actor_starts_an_engine_that_answers_and_ends_without_clients(tmp_path: Path) -> None:
    tiny_model_dir(tmp_path / "model")

    async def draw(address: Address) -> list[object]:
        client = EngineClient()
        connection = await client.connect_tcp(address, "secret", 100)
        client.set_ready()
        events = [event async for event in client.attempt([5, 6], Sampling(max_tokens=3, seed=0), None)]
        stats = await client.ask("stats")
        assert stats["memory_bytes"] > 1e7
        client.disconnect()
        await connection
        return events

    with actor(tmp_path, "--orphan-s", "0.5") as placed:
        about = placed.start("127.0.0.1")
        assert placed.start("127.0.0.1")["pid"] == about["pid"]  # asked again: the same engine
        events = asyncio.run(draw(about["address"]))
        assert [type(event) for event in events] == [Token] * 3 + [End]
        assert placed._process is not None
        assert placed._process.wait(240) == 0  # nobody is connected any more
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(about["address"])


@pytest.mark.slow
def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    with actor(tmp_path) as placed:
        placed.start("127.0.0.1")
        assert placed._process is not None
        assert placed._process.wait(240) == 2
        assert "model" in placed.about()["said"]
    with actor(tmp_path / "elsewhere") as placed:
        missing = placed.start("127.0.0.1")
    assert "every node must see it at the same path" in missing["problem"]
