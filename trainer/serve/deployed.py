"""One deployment as it runs: its version of the model, its replicas, and how many it wants."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, final

from trainer.config.deployment_shape import DeploymentShape, find_deployment_shape
from trainer.control.deployments import Deployment, Spec
from trainer.errors import LaunchError, TrainerError
from trainer.inference.source import base_of
from trainer.run.console import tell
from trainer.serve.backend import Backend, NoPlaceError
from trainer.serve.gateway import Gateway, Limits, Metrics, served_source
from trainer.serve.metering import BASE_SUFFIX
from trainer.serve.models import ServedModels
from trainer.serve.replicas import Replica, ReplicaPool

if TYPE_CHECKING:
    from trainer.serve.traces import Traces

DRAIN_S: Final = 600.0
"""Longest time that a replica of an old version, or one too many, finishes requests."""
MAX_FAILURES: Final = 3
"""Starts in a row that fail before a deployment is FAILED."""
NO_PLACE_S: Final = 1.0
"""Before a place is looked for again."""
LINGER_S: Final = 5.0
"""An old version ends when it had no request for this long: one may have been routed to it just before."""


def shape_for(spec: Spec) -> DeploymentShape:
    """The shape of a specification, if this machine can carry it out.

    Raises:
        UserError: it cannot, with the reason.
    """
    shape = find_deployment_shape(spec.shape)
    if spec.is_addons_enabled or spec.addons:
        shape.need_addons()
    shape.need_local()
    return shape


@final
class Version:
    """A model with its replicas."""

    def __init__(
        self, name: str, spec: Spec, backend: Backend, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        """Read the tokenizer; takes a second.

        Args:
            name: of the deployment.
            spec: what was asked for.
            backend: starts its engines.
            metrics: counters of the server.
            traces: makes spans; None makes none.

        Raises:
            TrainerError: the model cannot be served.
        """
        shape = shape_for(spec)
        backend.check(spec)
        source = served_source(spec.model)
        base = source if source.adapter is None else base_of(source)
        model = base.model
        if shape.precision != "auto":
            model = model.model_copy(update={"compute_dtype": shape.precision})
        models = ServedModels(base, name if source.adapter is None else name + BASE_SUFFIX)
        words = ["--model", model.model_dump_json(), "--kv-cache-tokens", str(shape.limits.kv_cache_tokens)]
        words += ["--max-rows", str(shape.limits.max_rows)]
        self.model, self.device, self.devices = spec.model, shape.device_name, shape.devices
        self._backend, self._words = backend, words
        self.pool = ReplicaPool(lambda: backend.new(name, shape, spec.region, words), spec.max_wait_s)
        self.gateway = Gateway(models, self.pool, Limits(shape.limits.max_queue), metrics, traces)
        if source.adapter is not None:
            self._add(name, spec.model)
        for addon, target in spec.addons.items():
            self._add(addon, target)

    def _add(self, name: str, target: str) -> None:
        served = self.gateway.models.add(name, served_source(target))
        self.gateway.models.put(served)
        self.pool.adapters[name] = str(served.path)

    async def adopt(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Take over engines that an earlier control process started and that live.

        Args:
            saved: what `Deployed.status` said of them.
        """
        for about in saved:
            host = await self._backend.adopt(about, self._words)
            if host is None:
                continue
            try:
                await self.pool.start(self.pool.new(host))
            except (LaunchError, NoPlaceError, OSError) as error:
                tell(f"a replica of the process before this one was not taken over: {error}")

    async def close(self, drain_s: float) -> None:
        """End all replicas."""
        await asyncio.gather(*(self.pool.stop(replica, drain_s) for replica in list(self.pool.replicas)))


@final
class Deployed:
    """Keeps as many replicas as are wanted."""

    def __init__(self, deployment: Deployment, version: Version, wanted: int) -> None:
        """Begin without replicas.

        Args:
            deployment: what was asked for.
            version: of its model.
            wanted: replicas at first.
        """
        self.name, self.account = deployment.name, deployment.account
        self.spec, self.generation = deployment.spec, deployment.generation
        self.version, self.wanted = version, wanted
        self.problem, self.num_failures, self.is_blocked = "", 0, False
        self.cold_start: dict[str, float] = {}
        self._low_since: float | None = None
        self._retry_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def has_failed(self) -> bool:
        """Whether starts have failed too often."""
        return self.num_failures >= MAX_FAILURES

    @property
    def num_ready(self) -> int:
        """Replicas that take requests."""
        return sum(replica.is_ready for replica in self.version.pool.replicas)

    @property
    def is_settled(self) -> bool:
        """Whether it has exactly the replicas that it wants, all ready."""
        return self.num_ready == self.wanted == len(self._kept())

    def want(self) -> int:
        """How many replicas it wants now, by load and idle time."""
        spec, pool, now = self.spec, self.version.pool, monotonic()
        live, current = pool.num_live, max(self.wanted, 0)
        if self.is_blocked:
            return 0
        if self.has_failed:
            if not self.num_ready or now < self._retry_at:
                return self.num_ready
            self.num_failures = MAX_FAILURES - 1  # one more try, beside those that work
        least = max(spec.min_replicas, 1 if live else 0)
        if live > current * spec.scale_up:
            self._low_since = None
            return min(spec.max_replicas, max(least, math.ceil(live / spec.scale_up)))
        if current > 1 and live <= (current - 1) * spec.scale_down:
            self._low_since = self._low_since or now
            if now - self._low_since >= spec.scale_down_s:
                self._low_since = now
                return max(least, 1, current - 1)
        else:
            self._low_since = None
        is_idle = not live and self.num_ready == self.wanted and now - pool.last_used >= spec.scale_to_zero_s
        if is_idle and spec.min_replicas == 0:
            return 0
        return min(spec.max_replicas, max(least, current))

    def act(self) -> None:
        """Start and stop replicas towards the wanted number; drop those that went away."""
        pool = self.version.pool
        for replica in [each for each in pool.replicas if each.is_gone and not each.is_draining]:
            tell(f"{self.name}: replica {replica.number} (process {replica.host.about['pid']}) went away")
            replica.is_draining = True
            self._run(pool.stop(replica, 0.0))
        kept = self._kept()
        for replica in sorted(kept, key=lambda each: (each.is_ready, each.num_live))[: max(0, len(kept) - self.wanted)]:
            replica.is_draining = True
            self._run(pool.stop(replica, DRAIN_S))
        if monotonic() >= self._retry_at:
            for _ in range(self.wanted - len(kept)):
                self._run(self._start(pool, pool.new()))

    def _kept(self) -> list[Replica]:
        return [replica for replica in self.version.pool.replicas if not replica.is_draining]

    async def _start(self, pool: ReplicaPool, replica: Replica) -> None:
        try:
            if not await pool.start(replica):
                return
        except NoPlaceError as error:  # no fault of the model: requests wait
            if self.problem != str(error):
                tell(f"{self.name}: replica {replica.number} waits for a place: {error}")
            self.problem, self._retry_at = str(error), monotonic() + NO_PLACE_S
        except (LaunchError, OSError) as error:
            self.num_failures += 1
            self.problem = str(error)
            self._retry_at = monotonic() + min(30.0, 2.0**self.num_failures)
            tell(f"{self.name}: replica {replica.number} did not start: {error}")
        else:
            self.num_failures, self.problem, self.cold_start = 0, "", replica.cold_start
            pool.last_used = monotonic()  # the time of its start is no idle time

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def update(self, version: Version) -> None:
        """Start a new version beside the old one, let it take over, and finish the requests of the old one.

        Args:
            version: without replicas yet.

        Raises:
            TrainerError: it does not start; the old one goes on.
        """
        count = min(self.spec.max_replicas, max(self.spec.min_replicas, 1 if self.wanted else 0, self.num_ready))
        try:
            await asyncio.gather(*(version.pool.start(version.pool.new()) for _ in range(count)))
        except (TrainerError, NoPlaceError, OSError) as error:
            await version.close(0.0)
            raise LaunchError(f"the update failed, {self.version.model} goes on: {error}") from None
        old, self.version, self.wanted = self.version, version, count
        if count:
            self.cold_start = version.pool.replicas[0].cold_start
        version.pool.last_used = old.pool.last_used
        self._run(self._retire(old))

    async def _retire(self, old: Version) -> None:
        """End an old version when its last request has ended."""
        deadline, begun = monotonic() + DRAIN_S, monotonic()
        while monotonic() < deadline:
            if not old.pool.num_live and monotonic() - max(begun, old.pool.last_used) > LINGER_S:
                break
            if not old.pool.is_ready:  # its last replica was lost: requests in flight need one
                try:
                    await old.pool.start(old.pool.new())
                except (LaunchError, NoPlaceError, OSError) as error:
                    tell(f"{self.name}: a replica of the old version was lost, and no new one starts: {error}")
                    await asyncio.sleep(NO_PLACE_S)
            await asyncio.sleep(0.05)
        await old.close(1.0)

    async def close(self, drain_s: float) -> None:
        """End everything."""
        self.wanted = 0
        for task in list(self._tasks):
            if not task.done():
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.version.close(drain_s)

    def status(self) -> dict[str, Any]:
        """For people, and for the store."""
        replicas = [
            {"number": each.number, **each.host.about, "is_ready": each.is_ready, "cold_start_s": each.cold_start}
            for each in self._kept()
        ]
        return {
            "replicas": replicas,
            "wanted": self.wanted,
            "problem": self.problem,
            "cold_start_s": self.cold_start,
            "model": self.version.model,
        }
