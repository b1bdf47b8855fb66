"""Deployments as they are stored: what was asked for, and what the control process has done about it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from time import time
from typing import Any, Final, final

from sqlalchemy import Connection, delete, insert, select, update

from trainer.control.accounts import NAME, AccountError, MissingError, need_account
from trainer.control.audit import Actor, record
from trainer.control.lifecycle import Event, State, TransitionError, after
from trainer.control.store import Store
from trainer.control.tables import CONTROLLER, DEPLOYMENTS, QUOTAS

STALE_S: Final = 10.0
"""A control process that was not seen for this long is gone."""


@final
@dataclass(frozen=True)
class Spec:
    """What was asked for."""

    model: str
    """Run, adapter directory, model directory or hub name, on the machine of the control process."""
    shape: str
    region: str = "local"
    """Fixed at creation."""
    is_addons_enabled: bool = False
    min_replicas: int = 0
    max_replicas: int = 1
    scale_to_zero_s: float = 300.0
    """Without a request for this long, a deployment whose minimum is 0 has no replicas."""
    scale_up: float = 8.0
    """Sequences in flight per replica above which one more is started."""
    scale_down: float = 2.0
    """Sequences in flight per remaining replica below which one is ended."""
    scale_down_s: float = 30.0
    """For how long."""
    max_wait_s: float = 120.0
    """Longest time that a request waits for a replica."""
    addons: Mapping[str, str] = field(default_factory=dict)
    """Run or adapter directory by name."""

    def problem(self) -> str | None:
        """What contradicts itself; None where nothing does."""
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            return f"replicas {self.min_replicas} to {self.max_replicas}: 0 <= minimum <= maximum, and a maximum of 1"
        if self.scale_down >= self.scale_up:
            return f"scale-down at {self.scale_down:g} must be below scale-up at {self.scale_up:g}"
        if min(self.scale_to_zero_s, self.scale_down_s, self.max_wait_s, self.scale_up) <= 0 or self.scale_down < 0:
            return "windows, waits and thresholds must be positive"
        return None


@final
@dataclass(frozen=True)
class Deployment:
    """One deployment."""

    name: str
    account: str
    spec: Spec
    state: State
    problem: str
    """Why it failed, or why it does not have what was asked for."""
    generation: int
    """Grows with each change of `spec`."""
    observed: int
    """The generation that the control process carried out."""
    status: Mapping[str, Any]
    """Replicas and the last cold start."""
    created: float
    changed: float


def create_deployment(store: Store, actor: Actor, account: str, name: str, spec: Spec) -> Deployment:
    """Ask for a deployment; the control process makes it.

    Raises:
        AccountError: the name is taken or malformed, the specification contradicts itself, or a quota forbids it.
    """
    if not NAME.fullmatch(name):
        raise AccountError(f"deployment {name!r}: 1 to 64 letters, digits, dots, dashes and underscores")
    with store.write() as connection:
        need_account(connection, account)
        row = connection.execute(select(DEPLOYMENTS.c.state).where(DEPLOYMENTS.c.name == name)).first()
        if row is not None and row.state != "DELETED":
            raise AccountError(f"deployment {name!r} exists, in state {row.state}")
        _check(connection, account, name, spec)
        connection.execute(delete(DEPLOYMENTS).where(DEPLOYMENTS.c.name == name))
        connection.execute(
            insert(DEPLOYMENTS).values(
                name=name,
                account=account,
                spec=json.dumps(asdict(spec)),
                state="CREATING",
                problem="",
                generation=1,
                observed=0,
                status="{}",
                created=time(),
                changed=time(),
            )
        )
        record(connection, actor, "deploy.create", name, {"account": account, **asdict(spec)})
    return get_deployment(store, name)


def change_deployment(store: Store, actor: Actor, name: str, action: str, changes: Mapping[str, Any]) -> Deployment:
    """Ask for another specification.

    Args:
        store: keeps it.
        actor: who asks.
        name: of the deployment.
        action: `scale`, `update` or `addons`, for the audit log.
        changes: new values by field of `Spec`.

    Raises:
        AccountError: no such deployment, it is being deleted, the region would change, or a quota forbids it.
    """
    with store.write() as connection:
        old = _one(connection, name)
        if old.state in ("DELETING", "DELETED"):
            raise AccountError(f"deployment {name!r} is in state {old.state}")
        if changes.get("region", old.spec.region) != old.spec.region:
            raise AccountError(f"deployment {name!r} is in region {old.spec.region}, which is fixed at creation")
        spec = replace(old.spec, **changes)
        _check(connection, old.account, name, spec)
        values = {"spec": json.dumps(asdict(spec)), "generation": old.generation + 1, "changed": time()}
        connection.execute(update(DEPLOYMENTS).where(DEPLOYMENTS.c.name == name).values(**values))
        record(connection, actor, f"deploy.{action}", name, dict(changes))
    return get_deployment(store, name)


def delete_deployment(store: Store, actor: Actor, name: str) -> Deployment:
    """Ask for its end; requests in flight are finished.

    Raises:
        AccountError: there is none.
    """
    with store.write() as connection:
        old = _one(connection, name)
        if old.state not in ("DELETING", "DELETED"):
            _move(connection, old, "delete", "")
        record(connection, actor, "deploy.delete", name, {})
    return get_deployment(store, name)


def get_deployment(store: Store, name: str) -> Deployment:
    """One deployment.

    Raises:
        AccountError: there is none.
    """
    with store.read() as connection:
        return _one(connection, name)


def list_deployments(store: Store, *, is_deleted_shown: bool = False) -> list[Deployment]:
    """All deployments by name."""
    query = select(DEPLOYMENTS).order_by(DEPLOYMENTS.c.name)
    if not is_deleted_shown:
        query = query.where(DEPLOYMENTS.c.state != "DELETED")
    with store.read() as connection:
        return [_deployment(row) for row in connection.execute(query)]


def advance(store: Store, name: str, event: Event, problem: str = "", *, observed: int | None = None) -> State:
    """Move to the state after an event; for the control process. A state without this event stays as it is.

    Args:
        store: keeps it.
        name: of the deployment.
        event: what happened.
        problem: shown with the state.
        observed: the generation that was carried out.
    """
    with store.write() as connection:
        old = _one(connection, name)
        try:
            return _move(connection, old, event, problem, observed)
        except TransitionError:  # it was deleted meanwhile
            return old.state


def save_status(store: Store, name: str, status: Mapping[str, Any]) -> None:
    """Keep what the replicas are; for the control process."""
    with store.write() as connection:
        connection.execute(
            update(DEPLOYMENTS).where(DEPLOYMENTS.c.name == name).values(status=json.dumps(dict(status)))
        )


def lead(store: Store) -> str | None:
    """Become, or stay, the control process; returns the other one, where there is one that lives."""
    owner, now = f"{socket.gethostname()} {os.getpid()}", time()
    with store.write() as connection:
        row = connection.execute(select(CONTROLLER)).first()
        if row is not None and row.owner != owner and now - row.seen < STALE_S and not _is_dead(str(row.owner)):
            return str(row.owner)
        connection.execute(delete(CONTROLLER))
        connection.execute(insert(CONTROLLER).values(id=1, owner=owner, seen=now))
        return None


def resign(store: Store) -> None:
    """Let another control process begin at once."""
    with store.write() as connection:
        connection.execute(delete(CONTROLLER))


def leader(store: Store) -> str | None:
    """The control process that lives; None where there is none."""
    with store.read() as connection:
        row = connection.execute(select(CONTROLLER)).first()
    is_alive = row is not None and time() - row.seen < STALE_S and not _is_dead(str(row.owner))
    return str(row.owner) if row is not None and is_alive else None


def _is_dead(owner: str) -> bool:
    """Whether a process of this machine has ended."""
    host, _, pid = owner.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _check(connection: Connection, account: str, name: str, spec: Spec) -> None:
    problem = spec.problem()
    if problem is not None:
        raise AccountError(problem)
    where = (QUOTAS.c.account == account) & (QUOTAS.c.limit == "replicas")
    most = connection.execute(select(QUOTAS.c.value).where(where)).scalar()
    if most is None:
        return
    others = [
        _deployment(row)
        for row in connection.execute(select(DEPLOYMENTS).where(DEPLOYMENTS.c.account == account))
        if row.name != name and row.state != "DELETED"
    ]
    total = spec.max_replicas + sum(each.spec.max_replicas for each in others)
    if total > most:
        raise AccountError(f"replicas: the deployments of {account} could have {total}, its quota is {most}")


def _move(connection: Connection, old: Deployment, event: Event, problem: str, observed: int | None = None) -> State:
    state = after(old.state, event)
    values: dict[str, Any] = {"state": state, "problem": problem, "changed": time()}
    if observed is not None:
        values["observed"] = observed
    connection.execute(update(DEPLOYMENTS).where(DEPLOYMENTS.c.name == old.name).values(**values))
    return state


def _one(connection: Connection, name: str) -> Deployment:
    row = connection.execute(select(DEPLOYMENTS).where(DEPLOYMENTS.c.name == name)).first()
    if row is None:
        raise MissingError(f"no deployment {name!r}; `trainer deploy list` lists them")
    return _deployment(row)


def _deployment(row: Any) -> Deployment:
    return Deployment(
        name=row.name,
        account=row.account,
        spec=Spec(**json.loads(row.spec)),
        state=row.state,
        problem=row.problem,
        generation=row.generation,
        observed=row.observed,
        status=json.loads(row.status),
        created=row.created,
        changed=row.changed,
    )
