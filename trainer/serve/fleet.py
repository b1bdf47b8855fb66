"""The control process of deployments: carries out what the store asks for, and goes on where a process was killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from trainer.control.audit import Actor
from trainer.control.deployments import (
    Deployment,
    Spec,
    advance,
    change_deployment,
    lead,
    list_deployments,
    resign,
    save_status,
)
from trainer.control.lifecycle import Event, State
from trainer.control.meter import Meter
from trainer.control.prices import Prices
from trainer.control.quotas import quotas_of
from trainer.control.store import Store, StoreDownError
from trainer.control.usage import Used, device_seconds, today
from trainer.errors import LaunchError, TrainerError
from trainer.run.console import tell
from trainer.serve.api_errors import ApiError
from trainer.serve.backend import Backend
from trainer.serve.deployed import DRAIN_S, Deployed, Version
from trainer.serve.gateway import Gateway, Metrics

if TYPE_CHECKING:
    from trainer.serve.traces import Traces

TICK_S: Final = 0.2
LEAD_S: Final = 2.0
"""Between two signs of life in the store."""
BUSY: Final[frozenset[State]] = frozenset({"DEPLOYING", "SCALING"})
T = TypeVar("T")


@final
class Fleet:
    """All deployments of a store. Belongs to one event loop."""

    def __init__(self, store: Store, meter: Meter, backend: Backend, prices: Prices, traces: Traces | None = None) -> None:
        """Begin without deployments; `run` takes them over.

        Args:
            store: what was asked for.
            meter: counts the lifetime of replicas.
            backend: starts engines.
            prices: of devices.
            traces: makes spans; None makes none.
        """
        self.live: dict[str, Deployed] = {}
        self.metrics = Metrics()
        self._store, self._meter, self._backend, self._prices = store, meter, backend, prices
        self._traces = traces
        self._states: dict[str, Deployment] = {}
        self._working: dict[str, asyncio.Task[None]] = {}
        self._saved: dict[str, dict[str, Any]] = {}
        self._counted, self._led = monotonic(), float("-inf")

    @property
    def is_leading(self) -> bool:
        """Whether this process carries deployments out."""
        return self._led > float("-inf")

    async def of(self, name: str) -> tuple[Gateway, dict[str, float] | None]:
        """The gateway of a deployment once a replica is ready, and the cold start that the request waited for.

        Raises:
            ApiError: there is no such deployment, it failed, its account has no device-hours, or the wait was too long.
        """
        row, live = self._states.get(name), self.live.get(name)
        if row is None or row.state in ("DELETING", "DELETED"):
            known = ", ".join(sorted(self.live)) or "none"
            raise ApiError(404, f"no deployment {name!r}; there are: {known}", param="model", code="model_not_found")
        if row.state == "FAILED":
            raise ApiError(503, f"deployment {name} has failed: {row.problem}", code="deployment_failed", retry_s=30)
        if live is None:
            raise ApiError(503, f"deployment {name} is being created", code="deployment_creating", retry_s=1)
        if live.is_blocked:
            raise ApiError(429, f"the device-hours of {row.account} are used", code="device_hours", retry_s=3600)
        was_ready, begin = live.version.pool.is_ready, monotonic()
        with nullcontext() if self._traces is None else self._traces.span("replica wait", deployment=name):
            await live.version.pool.wait_ready()
        self.metrics.by_model.wait_s.labels(name).observe(monotonic() - begin)
        return live.version.gateway, None if was_ready else live.cold_start

    async def run(self) -> None:
        """Carry out what is asked for, until it is cancelled."""
        await self._wait_for_the_lead()
        for row in await self._ask(lambda: list_deployments(self._store)):
            await self._move(row.name, "resume", row.problem)
        while True:
            begin = monotonic()
            try:
                await self._tick()
            except StoreDownError as error:  # replicas go on as they are
                tell(str(error))
                await asyncio.sleep(1.0)
            await asyncio.sleep(max(0.0, TICK_S - (monotonic() - begin)))

    async def _wait_for_the_lead(self) -> None:
        said = False
        while (other := await self._ask(lambda: lead(self._store))) is not None:
            if not said:
                tell(f"the process {other} carries out the deployments of this store; waiting for its end")
            said = True
            await asyncio.sleep(1.0)

    async def _tick(self) -> None:
        if monotonic() - self._led >= LEAD_S:
            other = await self._ask(lambda: lead(self._store))
            if other is not None:
                raise LaunchError(f"the process {other} has taken the deployments of this store over")
            self._led = monotonic()
            await self._check_device_hours()
        rows = await self._ask(lambda: list_deployments(self._store))
        self._states = {row.name: row for row in rows}
        self._count_replicas()
        for row in rows:
            if row.name not in self._working:
                await self._carry_out(row)
        await self._save()

    async def _carry_out(self, row: Deployment) -> None:
        """One look at one deployment; what takes long goes on beside."""
        live = self.live.get(row.name)
        if row.state == "DELETING":
            self._begin(row.name, self._delete(row.name, live))
        elif row.state == "FAILED" and row.generation == row.observed:
            return
        elif live is None or row.state == "FAILED":
            self._begin(row.name, self._create(row))
        elif row.generation > live.generation:
            self._begin(row.name, self._change(row, live))
        else:
            live.wanted = live.want()
            live.act()
            await self._follow(row, live)

    async def _follow(self, row: Deployment, live: Deployed) -> None:
        """Let the state say what the replicas are."""
        if live.has_failed and not live.num_ready and row.state in BUSY:
            await self._move(row.name, "fail", live.problem, live.generation)
        elif row.state in BUSY and live.is_settled:
            await self._move(row.name, "ready", live.problem, live.generation)
        elif row.state == "DEPLOYED" and not live.is_settled:
            await self._move(row.name, "scale", live.problem)

    def _begin(self, name: str, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._working[name] = task
        task.add_done_callback(lambda _: self._working.pop(name, None))

    async def _create(self, row: Deployment) -> None:
        is_new = row.state in ("CREATING", "FAILED")
        if is_new:
            await self._move(row.name, "place" if row.state == "CREATING" else "update", "")
        old = self.live.pop(row.name, None)
        if old is not None:
            await old.close(0.0)
        try:
            version = await asyncio.to_thread(Version, row.name, row.spec, self._backend, self.metrics, self._traces)
        except TrainerError as error:
            await self._move(row.name, "fail", str(error), row.generation)
            return
        if not is_new:
            await version.adopt(row.status.get("replicas", []))
        # a new one begins with a replica, which shows that its model can be served
        least = max(row.spec.min_replicas, int(is_new), len(version.pool.replicas))
        self.live[row.name] = Deployed(row, version, least)

    async def _change(self, row: Deployment, live: Deployed) -> None:
        """Carry out a new specification."""
        is_update = (row.spec.model, row.spec.shape) != (live.spec.model, live.spec.shape)
        old, live.spec, live.generation = live.spec, row.spec, row.generation
        live.version.pool.max_wait_s = row.spec.max_wait_s
        live.num_failures = 0
        if not is_update:
            await self._change_addons(old.addons, row, live)
            return
        if row.state in ("DEPLOYED", "SCALING"):
            await self._move(row.name, "update", "")
        try:
            version = await asyncio.to_thread(Version, row.name, row.spec, self._backend, self.metrics, self._traces)
            await live.update(version)
        except TrainerError as error:
            await self._revert(old, live, str(error))
        else:
            await self._move(row.name, "ready", "", row.generation)

    async def _revert(self, old: Spec, live: Deployed, problem: str) -> None:
        """Ask for the old version again, so that the next control process does not try what failed."""
        changes = {"model": old.model, "shape": old.shape}
        found = await self._ask(lambda: change_deployment(self._store, Actor("server"), live.name, "revert", changes))
        live.spec, live.generation, live.problem = found.spec, found.generation, problem
        await self._move(live.name, "keep", problem, found.generation)

    async def _change_addons(self, old: Any, row: Deployment, live: Deployed) -> None:
        problem = ""
        gateway = live.version.gateway
        try:
            for name, target in row.spec.addons.items():
                if old.get(name) != target or name not in gateway.models.adapters:
                    await gateway.load_adapter(name, target)
            for name in set(old) - set(row.spec.addons):
                if name in gateway.models.adapters:
                    await gateway.unload_adapter(name)
        except ApiError as error:
            problem = f"addon: {error.message}"
        live.problem = problem
        await self._move(row.name, "scale", problem, row.generation)

    async def _delete(self, name: str, live: Deployed | None) -> None:
        if live is not None:
            await live.close(DRAIN_S)
        await self._move(name, "gone", "")
        self.live.pop(name, None)

    async def _check_device_hours(self) -> None:
        """Stop the replicas of accounts whose device-hours are used."""

        def used_up(account: str) -> bool:
            most = next((q.value for q in quotas_of(self._store, account) if q.limit == "device_hours"), None)
            return most is not None and device_seconds(self._store, account) >= most

        for account in {live.account for live in self.live.values()}:
            is_used = await self._ask(lambda account=account: used_up(account))  # type: ignore[misc]
            for live in self.live.values():
                if live.account == account:
                    live.is_blocked = is_used

    def _count_replicas(self) -> None:
        """Add the time since the last look to the use of each deployment."""
        now = monotonic()
        seconds, self._counted = now - self._counted, now
        for name, live in self.live.items():
            devices = len(live.version.pool.replicas) * live.version.devices
            if devices:
                cost = self._prices.device_cost(live.version.device, seconds * devices)
                used = Used(today(), live.account, name, "", replica_us=round(seconds * devices * 1e6), cost=cost)
                self._meter.add(used)

    async def _save(self) -> None:
        for name, live in list(self.live.items()):
            status = live.status()
            if self._saved.get(name) != status:
                await self._ask(lambda name=name, status=status: save_status(self._store, name, status))  # type: ignore[misc]
                self._saved[name] = status

    async def _move(self, name: str, event: Event, problem: str, observed: int | None = None) -> None:
        await self._ask(lambda: advance(self._store, name, event, problem, observed=observed))

    async def _ask(self, work: Callable[[], T]) -> T:
        return await asyncio.to_thread(work)

    async def close(self, drain_s: float) -> None:
        """End all replicas; the next control process starts them again."""
        for task in list(self._working.values()):
            task.cancel()
        await asyncio.gather(*(live.close(drain_s) for live in self.live.values()), return_exceptions=True)
        await self._backend.close()
        with suppress(StoreDownError):
            await self._ask(lambda: resign(self._store))
