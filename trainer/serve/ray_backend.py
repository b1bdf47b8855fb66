"""Replicas on the nodes of a Ray cluster: Ray places them, tokens go from here to each of them directly.

What survives what: a replica and its node by the fleet, which replaces it; `ray_placer.py`, which is started again; the
head of the cluster (GCS) and this process by replicas that do not depend on them, and are found again by their names.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Final, final

from trainer.config.deployment_shape import DeploymentShape
from trainer.control.deployments import Spec
from trainer.engine.handshake import HandshakeError
from trainer.errors import LaunchError
from trainer.run.console import tell
from trainer.serve.backend import START_S, Host, NoPlaceError
from trainer.serve.engine_client import EngineClient

ORPHAN_S: Final = 300
"""A replica that no control process is connected to for this long ends by itself."""
ASK_S: Final = 150.0
"""How long one question to the cluster may take, restarts of the placer included."""
END_S: Final = 600.0
"""How long the end of a replica is tried while the cluster does not answer."""
OPEN_S: Final = 60.0
"""How long the cluster may take to answer at first."""
CLOSE_S: Final = 20.0
"""How long the end of this process waits for that of its replicas."""
NAMESPACE: Final = "tunesmith"
"""Of the actors in Ray."""
PAUSE_S: Final = 1.0
"""Between two starts of the placer."""


class ClusterAwayError(Exception):
    """The placer ended, or the cluster does not answer."""


@final
class Placer:
    """Runs `ray_placer.py`; starts it again when it ends, and asks again what it did not answer."""

    def __init__(self, address: str) -> None:
        """Begin without a process.

        Args:
            address: of the cluster, HOST:PORT, or auto.
        """
        self._address = address
        self._process: asyncio.subprocess.Process | None = None
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number, self._said = 0, ""
        self._starting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, op: str, patience_s: float, **fields: Any) -> dict[str, Any]:
        """One question; it must be one that can be asked twice.

        Args:
            op: `place`, `find` or `end`.
            patience_s: how long it is asked again.
            **fields: of the question.

        Raises:
            NoPlaceError: there is no place now, or the cluster did not answer.
            LaunchError: it can never be carried out.
        """
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    reply = await self._ask_once(op, fields)
            except (ClusterAwayError, TimeoutError) as error:
                if asyncio.get_running_loop().time() + PAUSE_S >= deadline:
                    words = f": {self._said or error}" if self._said or str(error) else ""
                    raise NoPlaceError(f"the Ray cluster at {self._address} does not answer{words}") from None
                await asyncio.sleep(PAUSE_S)
                continue
            if reply["ok"]:
                return reply
            raise (NoPlaceError if reply["kind"] == "place" else LaunchError)(reply["error"])

    async def _ask_once(self, op: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        process = await self._running()
        assert process.stdin is not None
        self._number += 1
        number = self._number
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            process.stdin.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
            await process.stdin.drain()
            return await reply
        except ConnectionError:
            raise ClusterAwayError("the placer ended") from None
        finally:
            self._replies.pop(number, None)

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                if self._process is not None:
                    tell("the process that speaks to Ray ended; it is started again, replicas go on")
                await self._start()
            assert self._process is not None
            return self._process

    async def _start(self) -> None:
        words = [sys.executable, "-m", "trainer.serve.ray_placer", "--address", self._address]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if not await self._process.stdout.readline():
            self._said = (await self._process.stderr.read()).decode(errors="replace").strip()[-500:]
            await self._process.wait()
            raise ClusterAwayError("the placer did not start")
        self._said = ""
        self._reading = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())  # Ray's words; drained, or it would stop at a full pipe
        while received := await process.stdout.readline():
            message = json.loads(received)
            reply = self._replies.get(message["id"])
            if reply is not None and not reply.done():
                reply.set_result(message)
        await errors
        await process.wait()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ClusterAwayError("the placer ended"))

    async def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()
        if self._reading is not None:
            await self._reading


@final
class RayHost:
    """An engine on a node of the cluster."""

    def __init__(
        self, placer: Placer, ends: Ends, question: Mapping[str, Any], found: Mapping[str, Any] | None = None
    ) -> None:
        """Prepare.

        Args:
            placer: asks the cluster.
            ends: of replicas.
            question: to place it.
            found: its answer, where it runs already.
        """
        self._placer, self._ends, self._question = placer, ends, question
        self._found = dict(found or {})

    @property
    def about(self) -> Mapping[str, Any]:
        """Process and node, and the name by which the next control process finds it."""
        found, asked = self._found, self._question
        return {"pid": found.get("pid"), "node": found.get("node"), "name": asked["name"]}

    async def place(self) -> None:
        """Let Ray choose a node of the region with room, and start the engine there.

        Raises:
            LaunchError: it cannot be started there.
            NoPlaceError: there is no room, or the cluster does not answer.
        """
        if not self._found:
            self._found = await self._placer.ask("place", ASK_S, **self._question)

    async def connect(self, client: EngineClient) -> asyncio.Task[None]:
        """Wait until the engine has loaded its model.

        Raises:
            LaunchError: it ended, or took too long.
            NoPlaceError: its node was lost meanwhile.
        """
        host, port = self._found["address"]
        try:
            return await client.connect_tcp((host, int(port)), self._found["secret"], START_S)
        except HandshakeError as error:
            raise LaunchError(f"{host}:{port}: {error}") from None
        except TimeoutError:
            raise LaunchError(f"the engine at {host}:{port} did not load its model within {START_S:.0f} s") from None
        except (OSError, ValueError) as error:
            raise await self._why(error) from None

    async def _why(self, error: Exception) -> Exception:
        """The engine ended by itself, which is its fault, or its node did."""
        try:
            about = await self._placer.ask("find", ASK_S, name=self._question["name"], namespace=NAMESPACE)
        except (LaunchError, NoPlaceError):
            return NoPlaceError(f"its node was lost as it began: {error}")
        return LaunchError(f"the engine ended with exit code {about['code']}: {about['said'] or error}")

    async def end(self) -> None:
        """End actor and engine, beside: the cluster may be away."""
        self._ends.begin(self._question)


@final
class Ends:
    """Replicas whose end the cluster was or will be asked for."""

    def __init__(self, placer: Placer) -> None:
        """Begin with none."""
        self._placer, self._tasks = placer, set[asyncio.Task[None]]()

    def begin(self, question: Mapping[str, Any]) -> None:
        """Ask for the end of one, until the cluster answers."""
        task = asyncio.get_running_loop().create_task(self._end(question["name"]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, name: str) -> None:
        try:
            await self._placer.ask("end", END_S, name=name, namespace=NAMESPACE)
        except (LaunchError, NoPlaceError) as error:
            tell(f"replica {name} could not be ended, and ends by itself {ORPHAN_S} s after its last request: {error}")

    async def close(self) -> None:
        """Wait for them, for a while."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)


@final
class RayBackend:
    """Starts engines on the nodes of a cluster."""

    def __init__(self, address: str) -> None:
        """Begin without a connection; see `open`.

        Args:
            address: of the cluster, HOST:PORT, or auto.
        """
        self._placer = Placer(address)
        self._ends = Ends(self._placer)

    async def open(self) -> None:
        """Connect to the cluster.

        Raises:
            LaunchError: it does not answer.
        """
        try:
            await self._placer.ask("find_nodes", OPEN_S)
        except NoPlaceError as error:
            raise LaunchError(f"{error}\nStart a node here: ray start --address=HEAD:6379 --num-cpus=0") from None

    def check(self, spec: Spec) -> None:
        """Refuse nothing: nodes of a region may join later."""

    def new(self, name: str, shape: DeploymentShape, region: str, words: Sequence[str]) -> Host:
        """An engine that is not started yet."""
        is_cpu = shape.device == "cpu"
        question = {
            "name": f"{name}-{secrets.token_hex(8)}",
            "namespace": NAMESPACE,
            "words": _with_lease(words),
            "directory": str(Path.cwd()),
            "secret": secrets.token_hex(32),
            "region": region,
            "cpus": shape.devices if is_cpu else 1,
            "gpus": 0 if is_cpu else shape.devices,
        }
        return RayHost(self._placer, self._ends, question)

    async def adopt(self, saved: Mapping[str, Any], words: Sequence[str]) -> Host | None:
        """The replica that an earlier control process started, if it lives and is what is wanted now."""
        if not saved.get("name"):
            return None
        question = {"name": saved["name"], "namespace": NAMESPACE}
        try:
            found = await self._placer.ask("find", ASK_S, **question)
        except (LaunchError, NoPlaceError):
            return None
        if found.get("words") != _with_lease(words) or found["code"] is not None:
            self._ends.begin(question)
            return None
        return RayHost(self._placer, self._ends, question, {**found, "node": saved.get("node")})

    async def close(self) -> None:
        """End the placer, after what was to be ended."""
        await self._ends.close()
        await self._placer.close()


def _with_lease(words: Sequence[str]) -> list[str]:
    return [*words, "--orphan-s", str(ORPHAN_S)]
