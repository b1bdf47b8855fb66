"""Replicas of one model version: engines, and the choice among them for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import count
from time import monotonic
from typing import Any, Final, final

from trainer.engine.protocol import Sampling
from trainer.errors import LaunchError
from trainer.run.console import tell
from trainer.serve.api_errors import ApiError
from trainer.serve.backend import Host
from trainer.serve.engine_client import End, EngineClient, LostError, Token, can_continue, rest_of, untold_end

ATTEMPTS: Final = 6
"""Replicas that a request is sent to, one after the other, as they are lost: one that kills them ends there."""
_NUMBERS: Final = count(1)


@final
class Replica:
    """One engine. It is not started again: the deployment starts another one."""

    def __init__(self, host: Host) -> None:
        """Prepare; `start` starts it.

        Args:
            host: its process.
        """
        self.client, self.host = EngineClient(), host
        self.number = next(_NUMBERS)
        self.cold_start: dict[str, float] = {}
        """Seconds by part: place, load, warm."""
        self.num_live, self.is_draining, self.begun = 0, False, monotonic()
        self._connection: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.client.is_ready and not self.is_draining

    @property
    def is_gone(self) -> bool:
        """Whether its process went away after it was ready."""
        return self._connection is not None and self._connection.done()

    async def start(self, adapters: dict[str, str]) -> None:
        """Start it and wait until it has drawn a token.

        Args:
            adapters: path by name, loaded before the first request.

        Raises:
            LaunchError: it ended, or refuses an adapter.
            NoPlaceError: there is no room for it now.
        """
        await self.host.place()
        placed = monotonic()
        self._connection = await self.host.connect(self.client)
        loaded = monotonic()
        for name, path in adapters.items():
            reply = await self.client.ask("load", name=name, path=path)
            if not reply["ok"]:
                raise LaunchError(f"addon {name}: {reply['error']}")
        try:
            async for _ in self.client.attempt([0], Sampling(max_tokens=1, seed=0), None):
                pass
        except (LostError, ApiError) as error:
            raise LaunchError(f"the engine did not draw its first token: {str(error) or 'it went away'}") from None
        self.client.set_ready()
        parts = {"place": placed - self.begun, "load": loaded - placed, "warm": monotonic() - loaded}
        self.cold_start = {name: round(seconds, 3) for name, seconds in parts.items()}

    async def stop(self, drain_s: float) -> None:
        """End it, after the requests in flight.

        Args:
            drain_s: longest time for them; what is left then goes on elsewhere, or is an error.
        """
        self.is_draining = True
        deadline = monotonic() + drain_s
        while self.num_live and not self.is_gone and monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.client.disconnect()
        await self.host.end()
        if self._connection is not None:
            await self._connection


@final
class ReplicaPool:
    """An engine for the gateway that is made of replicas: requests wait for one, and go on where one is lost."""

    def __init__(self, new_host: Callable[[], Host], max_wait_s: float) -> None:
        """Begin without replicas.

        Args:
            new_host: a process that is not started yet.
            max_wait_s: how long a request waits for a replica.
        """
        self.replicas: list[Replica] = []
        self.adapters: dict[str, str] = {}
        """Path by name; every new replica loads them."""
        self.hello: dict[str, Any] = {}
        self.max_wait_s = max_wait_s
        self.num_waiting = 0
        self.last_used = monotonic()
        self.num_continued = 0
        """Streams that went on elsewhere after their replica was lost."""
        self._new_host = new_host
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether a replica takes requests."""
        return any(replica.is_ready for replica in self.replicas)

    @property
    def num_live(self) -> int:
        """Sequences in flight, those that wait for a replica included."""
        return self.num_waiting + sum(replica.num_live for replica in self.replicas)

    def new(self, host: Host | None = None) -> Replica:
        """A replica that `start` is called for.

        Args:
            host: an engine that runs already.
        """
        replica = Replica(host or self._new_host())
        self.replicas.append(replica)
        return replica

    async def start(self, replica: Replica) -> bool:
        """Start a replica of `new`; one that does not start is not kept. False: it was ended meanwhile.

        Raises:
            LaunchError: says why.
            NoPlaceError: there is no room for it now.
        """
        try:
            await replica.start(dict(self.adapters))
        except BaseException as error:
            was_unwanted = replica.is_draining and isinstance(error, Exception)
            await self.stop(replica, 0.0)
            if was_unwanted:
                return False
            raise
        self.hello = replica.client.hello
        self._changed.set()
        return True

    async def stop(self, replica: Replica, drain_s: float) -> None:
        """End a replica and forget it."""
        await replica.stop(drain_s)
        if replica in self.replicas:
            self.replicas.remove(replica)

    async def wait_ready(self) -> Replica:
        """The replica with the fewest sequences; waits for one.

        Raises:
            ApiError: 503, there was none in time.
        """
        self.last_used = monotonic()
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self.max_wait_s):
                while not (ready := [replica for replica in self.replicas if replica.is_ready]):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise ApiError(503, f"no replica was ready within {self.max_wait_s:g} s", retry_s=10) from None
        finally:
            self.num_waiting -= 1
        return min(ready, key=lambda replica: replica.num_live)

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """`load`, `unload` or `stats` of all replicas; sums where they are numbers."""
        if op == "load":
            self.adapters[fields["name"]] = fields["path"]
        if op == "unload":
            self.adapters.pop(fields["name"], None)
        ready = [replica.client for replica in self.replicas if replica.is_ready]
        replies = await asyncio.gather(*(client.ask(op, **fields) for client in ready))
        wrong = next((reply for reply in replies if not reply["ok"]), None)
        if wrong is not None:
            if op == "load":
                self.adapters.pop(fields["name"], None)
            return wrong
        merged: dict[str, Any] = {"ok": True, "version": "not loaded yet"}
        for reply in replies:
            for name, value in reply.items():
                is_number = isinstance(value, int) and not isinstance(value, bool)
                merged[name] = merged.get(name, 0) + value if is_number else value
        return merged

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, adapter: str | None
    ) -> AsyncGenerator[Token | End, None]:
        """Yield the tokens of a sequence, then its end; closing the iterator cancels it.

        A replica that goes away is replaced: a sequence without tokens is sent again, one with tokens goes on from
        them at the same noise positions.

        Args:
            prompt: token ids.
            sampling: how tokens are drawn.
            adapter: None is the base.

        Raises:
            ApiError: the engine refuses the request, or there is no replica.
        """
        drawn: list[int] = []
        for _ in range(ATTEMPTS):
            replica = await self.wait_ready()
            replica.num_live += 1
            try:
                rest = rest_of(sampling, drawn)
                async with aclosing(replica.client.attempt([*prompt, *drawn], rest, adapter)) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            drawn.append(event.token)
                        yield event
                return
            except LostError:
                tell(f"replica {replica.number} was lost with a sequence of {len(drawn)} tokens, which goes on")
                if drawn and not can_continue(sampling):
                    raise ApiError(503, "the replica was lost during this request; send it again", retry_s=1) from None
                if (end := untold_end(sampling, drawn)) is not None:
                    yield end
                    return
                self.num_continued += 1
            finally:
                replica.num_live -= 1
                self.last_used = monotonic()
        raise ApiError(503, f"{ATTEMPTS} replicas were lost during this request; send it again", retry_s=10)
