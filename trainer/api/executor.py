"""The executor: one thread that does the requests of all models, and the front that accepts them.

Requests of a model run in the order of their numbers. Passes of several models share a pack where it has room; see
`slots`. A request is written to the model's journal before it is acknowledged, and its result before it is told: after
a crash, models are rebuilt from checkpoints and journals, and a repeated request gets the first answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from trainer.api.limits import Limits, check_count
from trainer.api.protocol import Refused, ResultKind, request_id
from trainer.api.requests import Request, failure
from trainer.api.sessions import Sessions
from trainer.api.slots import Base
from trainer.api.store import Store
from trainer.api.tenants import Tenant
from trainer.errors import TrainerError
from trainer.run.console import tell

KINDS: Final = frozenset({"pass", "optim", "save", "save_sampler", "load"})
HOUSEKEEPING_S: Final = 1.0
EXPIRY_S: Final = 60.0
"""How often states are looked for whose time is over."""
GATHER_S: Final = (0.005, 0.05)
"""Least and most time that a pass waits for a model that has just got an answer and may ask again at once."""
GATHER_FRAC: Final = 0.25
"""The same as a fraction of the last pass."""
AHEAD: Final = 4096
"""How far a request's number may be ahead of the next in order."""


@final
class Executor:
    """All models of a server."""

    def __init__(self, base: Base, store: Store, limits: Limits) -> None:
        """Load sessions and models; slots are taken when requests come."""
        self.base, self.store, self.limits = base, store, limits
        self.sessions = Sessions(store)
        self.tenants: dict[str, Tenant] = {}
        for name, files in store.load_models().items():
            session = self.sessions.by_name.get(files.settings["session"])
            if session is not None:
                self.tenants[name] = Tenant(base, store, files, session)
        self._lock = threading.Condition()
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._pass_s = 0.0
        self._answered: dict[str, float] = {}
        self._expired = 0.0
        self.counters = {"passes": 0, "packed_parts": 0, "tokens": 0, "updates": 0, "recoveries": 0}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; results are told on this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End after the request in progress; nothing is lost, since the journal has what was accepted."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify_all()
        self._thread.join()
        self._writer.shutdown()

    # ---- front: any thread

    def tenant(self, owner: str, model: str, *, is_use: bool = True) -> Tenant:
        """A model of an owner.

        Raises:
            Refused: there is none, or it could not be created.
        """
        tenant = self.tenants.get(model)
        if tenant is None or not tenant.owner_may(owner):
            raise Refused(404, f"no model {model!r}")
        if is_use:
            if tenant.session.is_finished:
                raise Refused(410, f"the session of model {model} has finished; continue from a saved state")
            tenant.session.seen = time.monotonic()
        return tenant

    def create(
        self, owner: str, session: str, number: int, lora: Mapping[str, Any], begin: Mapping[str, Any] | None,
        metadata: Any, most_models: int | None = None,
    ) -> str:  # fmt: skip
        """Accept the creation of a model; returns the id of the request. The same again returns the same id.

        Args:
            owner: account.
            session: its session.
            number: of the model in the session.
            lora: rank, seed, and which layers.
            begin: path of a state, and whether to take its optimizer; None begins anew.
            metadata: of the client.
            most_models: that the owner may train at once; None is any number.

        Raises:
            Refused: it cannot be created.
        """
        state = self.sessions.get(owner, session)
        model = f"{session}:train:{number}"
        with self._lock:
            if model in self.tenants:
                return request_id(model, 0)
        settings = self.sessions.adapter_of(owner, self.base, self.limits.max_rank, lora, begin)
        document = {
            "owner": owner,
            "session": session,
            "lora": settings.model_dump(),
            "seed": secrets.randbits(31) if lora.get("seed") is None else int(lora["seed"]),
            "begin": begin,
            "base": self.base.digest,
            "user_metadata": metadata,
            "time": time.time(),
        }
        with self._lock:
            if model not in self.tenants:
                check_count(self._models_of(owner, self._is_open), most_models)
                self.tenants[model] = Tenant(self.base, self.store, self.store.create_model(model, document), state)
                self._lock.notify_all()
        return request_id(model, 0)

    def _is_open(self, tenant: Tenant) -> bool:
        """Whether a model's client may still use it: it counts among the models that an account trains at once."""
        session = tenant.session
        is_here = time.monotonic() - session.seen <= self.limits.lease_s
        return not tenant.is_broken and not session.is_finished and (is_here or tenant.slot is not None)

    def _models_of(self, owner: str, counts: Callable[[Tenant], bool]) -> int:
        return sum(each.session.owner == owner and counts(each) for each in self.tenants.values())

    def submit(self, owner: str, model: str, request: Request, most_models: int | None = None) -> tuple[Tenant, bool]:
        """Accept a request: it is in the journal, but perhaps not on disk yet; see `Journal.sync`.

        Args:
            owner: account.
            model: its model.
            request: what to do.
            most_models: that the owner may train at once; one whose slot was freed is not taken up beyond it.

        Returns:
            The model, and whether the request came for the first time.

        Raises:
            Refused: the model is unknown, or the number cannot be.
        """
        tenant = self.tenant(owner, model)
        if tenant.is_broken:
            raise Refused(400, f"model {model} was not created; see the result of its creation")
        digest = hashlib.sha256(request.kind.encode() + request.body).hexdigest()[:32]
        with self._lock:
            if request.kind not in KINDS or not 1 <= request.seq <= tenant.next_seq + AHEAD + len(tenant.pending):
                raise Refused(400, f"request {request.seq} of model {model}: no such kind, or too far ahead")
            if tenant.slot is None and tenant.is_created and not tenant.pending:
                check_count(self._models_of(owner, lambda each: each.slot is not None or each.has_work), most_models)
            known = tenant.files.request(request.seq)
            if known is not None and known.head["digest"] != digest:
                raise Refused(400, f"request {request.seq} of model {model} was another one; numbers are used once")
            is_new = known is None and tenant.files.result(request.seq) is None
            if is_new:
                tenant.files.requests.append({"seq": request.seq, "kind": request.kind, "digest": digest}, request.body)
                tenant.pending[request.seq] = request
                self._lock.notify_all()
        return tenant, is_new

    async def wait(self, owner: str, request: str, timeout_s: float) -> tuple[str, str | None, bytes]:
        """State (`done`, `pending`, `paused`), kind and body of a result.

        Raises:
            Refused: there is no such request.
        """
        model, _, number = request.rpartition("/")
        tenant = self.tenant(owner, model, is_use=False)
        if not number.isdigit():
            raise Refused(404, f"no request {request!r}")
        tenant.session.seen = time.monotonic()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._waiters.setdefault(request, []).append(ready)
        try:
            result = tenant.files.result(int(number))
            seq = int(number)
            is_now = seq == 0 or (tenant.slot is not None and seq in {tenant.next_seq - 1, tenant.next_seq})
            if result is None and seq not in tenant.pending and not is_now:
                raise Refused(410, f"there is no request {request}, or its result is no longer kept")
            if result is None:
                try:
                    await asyncio.wait_for(ready, timeout_s)
                except TimeoutError:
                    has_no_slot = tenant.slot is None and bool(tenant.pending)
                    return ("paused" if has_no_slot else "pending"), None, b""
                result = tenant.files.result(int(number))
            assert result is not None
            return "done", *result
        finally:
            self._waiters[request].remove(ready)
            if not self._waiters[request]:
                del self._waiters[request]

    def stats(self) -> dict[str, Any]:
        """Gauges and counters."""
        live = sum(tenant.slot is not None for tenant in self.tenants.values())
        return {"models": len(self.tenants), "slots": self.limits.slots, "slots_used": live, **self.counters}

    # ---- the executor's thread

    def _run(self) -> None:
        last_kept = time.monotonic()
        while not self._is_stopping:
            with self._lock:
                ready = self._ready()
                if not ready:
                    self._lock.wait(HOUSEKEEPING_S)
            for tenant in ready:
                self._advance(tenant)
            passing = [tenant for tenant in ready if tenant.work is not None]
            if passing:
                self._gather(passing)
                self._pass(passing)
            if time.monotonic() - last_kept > HOUSEKEEPING_S:
                self._keep_house()
                last_kept = time.monotonic()

    def _ready(self) -> list[Tenant]:
        """Models with work, the one first that waits longest."""
        ready = [tenant for tenant in self.tenants.values() if tenant.has_work]
        free = self.limits.slots - sum(tenant.slot is not None for tenant in self.tenants.values())
        able = [tenant for tenant in ready if tenant.slot is not None]
        able += [tenant for tenant in ready if tenant.slot is None][: max(0, free)]
        return sorted(able, key=lambda tenant: tenant.last_used)

    def _advance(self, tenant: Tenant) -> None:
        """Do a model's requests up to its next pass."""
        try:
            if tenant.slot is None and not tenant.is_created:
                self._publish(tenant, 0, tenant.create())
                return
            if tenant.slot is None:
                tenant.revive()
        except Exception as error:
            self._fail_all(tenant, error)
            return
        while tenant.work is None and not tenant.is_broken:
            with self._lock:
                request = tenant.pending.pop(tenant.next_seq, None)
            if request is None:
                return
            try:
                result = tenant.begin(request)
            except Exception as error:
                traceback.print_exc()
                result = failure(f"{type(error).__name__}: {str(error)[:500]}", "server")
            if tenant.work is None:
                tenant.next_seq = request.seq + 1
                if result is not None:
                    self._publish(tenant, request.seq, result)
                if request.kind == "optim":
                    self.counters["updates"] += 1
                    tenant.checkpoint_if_due(self.limits.checkpoint_s, self.limits.journal_bytes, self._writer)

    def _gather(self, passing: list[Tenant]) -> None:
        """Wait a moment for models that have just got an answer: the next pass may be theirs, too."""
        low, high = GATHER_S
        window = min(high, max(low, GATHER_FRAC * self._pass_s))
        begin = time.monotonic()
        while time.monotonic() - begin < window:
            now = time.monotonic()
            with self._lock:
                expected = [
                    tenant
                    for name, tenant in self.tenants.items()
                    if tenant.slot is not None
                    and tenant not in passing
                    and not tenant.has_work
                    and now - self._answered.get(name, 0.0) < window
                ]
                come = [tenant for tenant in self._ready() if tenant not in passing]
                if not expected and not come:
                    return
                if not come:
                    self._lock.wait(window / 4)
            for tenant in come:
                self._advance(tenant)
                if tenant.work is not None:
                    passing.append(tenant)

    def _pass(self, passing: list[Tenant]) -> None:
        """One pass over a micro-batch of the first model, and of others where they fit."""
        first = passing[0]
        assert first.work is not None
        chosen: list[Tenant] = []
        room = self.base.micro_batch_tokens
        for tenant in passing:
            assert tenant.work is not None
            size = tenant.work.left[0][1].num_tokens
            is_mixed = tenant.work.backward != first.work.backward or (tenant.is_alone or first.is_alone)
            if not chosen or (size <= room and not is_mixed):
                chosen.append(tenant)
                room -= size
        begin = time.monotonic()
        parts = [tenant.work.left[0] for tenant in chosen if tenant.work is not None]
        try:
            results = self.base.run([part for _, part in parts], backward=first.work.backward)
        except Exception as error:
            self._recover(chosen, error)
            return
        self._pass_s = time.monotonic() - begin
        self.counters["passes"] += 1
        self.counters["packed_parts"] += len(parts)
        self.counters["tokens"] += sum(part.num_tokens for _, part in parts)
        for tenant, (indices, _), result in zip(chosen, parts, results, strict=True):
            assert tenant.work is not None
            tenant.cost_s += self._pass_s
            tenant.last_used = time.monotonic()
            tenant.work.left.pop(0)
            tenant.work.done.append((indices, result))
            if not tenant.work.left:
                seq, found = tenant.finish_pass()
                tenant.next_seq = seq + 1
                self._publish(tenant, seq, found)

    def _recover(self, chosen: list[Tenant], error: Exception) -> None:
        """A pass failed half way, perhaps with gradients added: rebuild its models, and let each run alone."""
        traceback.print_exception(error)
        self.counters["recoveries"] += 1
        for tenant in chosen:
            assert tenant.work is not None
            if len(chosen) == 1:
                message = f"{type(error).__name__}: {str(error)[:500]}"
                self._publish(tenant, tenant.work.request.seq, failure(message, "server"))
                tenant.next_seq, tenant.work = tenant.work.request.seq + 1, None
            else:
                tenant.alone_until = tenant.work.request.seq
            tenant.park()

    def _fail_all(self, tenant: Tenant, error: Exception) -> None:
        """A model cannot be rebuilt: its requests fail."""
        traceback.print_exception(error)
        tenant.is_broken = True
        with self._lock:
            waiting = sorted(tenant.pending)
        for seq in waiting:
            self._publish(tenant, seq, failure(f"model {tenant.name} cannot be loaded: {error}", "server"))

    def _publish(self, tenant: Tenant, seq: int, result: tuple[ResultKind, bytes]) -> None:
        """Store a result and tell who waits."""
        tenant.files.keep_result(seq, *result)
        self._answered[tenant.name] = time.monotonic()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._tell, request_id(tenant.name, seq))

    def _tell(self, request: str) -> None:
        for ready in self._waiters.get(request, ()):
            if not ready.done():
                ready.set_result(None)

    def _keep_house(self) -> None:
        """Free the slots of clients that are gone, and delete states whose time is over."""
        now = time.monotonic()
        is_expiry_due = now - self._expired > EXPIRY_S
        if is_expiry_due:
            self._expired = now
        for tenant in list(self.tenants.values()):
            is_over = tenant.session.is_finished or now - tenant.session.seen > self.limits.lease_s
            if tenant.slot is not None and is_over and not tenant.has_work:
                try:
                    tenant.save_and_park()
                    tell(f"model {tenant.name}: its client is gone; the state is saved and the slot is free")
                except TrainerError as error:
                    tell(f"model {tenant.name}: {error}; its slot stays taken")
                    tenant.session.seen = now
            for state in tenant.files.states() if is_expiry_due else ():
                if state["expires_at"] is not None and state["expires_at"] < time.time():
                    tenant.files.delete_state(*str(state["checkpoint_id"]).split("/"))
