"""The audit log: append-only, each entry hashed together with the hash of the one before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from time import time
from typing import Any, Final, final

from sqlalchemy import Connection, delete, func, insert, select, text, update

from trainer.control.store import Store
from trainer.control.tables import AUDIT, AUDIT_ANCHOR
from trainer.errors import TrainerError, UserError

CHAIN_LOCK: Final = 7305542
"""Advisory lock of PostgreSQL: one transaction extends the chain at a time."""
DAY_S: Final = 86400.0


@final
class AuditError(TrainerError):
    """The chain is broken: an entry was changed, removed or inserted."""


@final
@dataclass(frozen=True)
class Actor:
    """Who acted."""

    name: str
    """`key tsk_...` or `cli USER@HOST`."""
    account: str = ""
    address: str = ""
    """Of the client."""


@final
@dataclass(frozen=True)
class Entry:
    """One action of the control plane. Never holds a prompt, a completion or a key."""

    number: int
    """From 1, without gaps."""
    time: float
    """Seconds since 1970."""
    actor: str
    account: str
    """Of the actor."""
    address: str
    action: str
    """For example `keys.create`."""
    target: str
    details: Mapping[str, Any]
    previous: str
    """Hash of the entry before."""

    def to_json(self) -> str:
        """The text that is hashed and stored."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=True, separators=(",", ":"))


@final
@dataclass(frozen=True)
class Head:
    """The end of the chain. Kept elsewhere, it also proves that no entry was cut off at the end."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, words: str) -> Head:
        """Read NUMBER:HASH.

        Raises:
            UserError: it is not of this form.
        """
        if not re.fullmatch(r"\d+:[0-9a-f]{64}", words):
            raise UserError(f"{words}: write NUMBER:HASH, as `trainer audit verify` prints it")
        number, _, digest = words.partition(":")
        return cls(int(number), digest)


def record(connection: Connection, actor: Actor, action: str, target: str, details: Mapping[str, Any]) -> Entry:
    """Append an entry within the transaction of the action itself: both are committed, or neither.

    Args:
        connection: of `Store.write`.
        actor: who acted.
        action: what was done.
        target: to what.
        details: values for JSON.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": CHAIN_LOCK})
    head = _head(connection)
    entry = Entry(
        number=head.number + 1,
        time=round(time(), 6),
        actor=actor.name,
        account=actor.account,
        address=actor.address,
        action=action,
        target=target,
        details=dict(details),
        previous=head.hash,
    )
    stored = entry.to_json()
    connection.execute(insert(AUDIT).values(number=entry.number, entry=stored, hash=_hash(stored)))
    return entry


def entries(store: Store, *, since: int = 0, limit: int | None = None) -> Iterator[Entry]:
    """The entries, oldest first.

    Args:
        store: where they are.
        since: only entries with a higher number.
        limit: only the newest ones.
    """
    query = select(AUDIT.c.entry).where(AUDIT.c.number > since).order_by(AUDIT.c.number.desc()).limit(limit)
    with store.read() as connection:
        found = [row.entry for row in connection.execute(query)]
    for stored in reversed(found):
        yield Entry(**json.loads(stored))


def verify(store: Store, expected: Head | None = None) -> Head:
    """Recompute the chain from its anchor; returns its end.

    Args:
        store: where it is.
        expected: an end that was noted earlier; the chain must still contain it.

    Raises:
        AuditError: names the first entry that is not what was written.
    """
    with store.read() as connection:
        anchor = connection.execute(select(AUDIT_ANCHOR.c.number, AUDIT_ANCHOR.c.hash)).one()
        head = Head(anchor.number, anchor.hash)
        if expected is not None and expected.number < head.number:
            raise AuditError(f"entry {expected.number} was removed by retention; the log begins after {head.number}")
        is_met = expected is None or expected == head
        rows = connection.execution_options(yield_per=1000).execute(
            select(AUDIT.c.number, AUDIT.c.entry, AUDIT.c.hash).order_by(AUDIT.c.number)
        )
        for row in rows:
            head = _checked(head, row.number, row.entry, row.hash)
            is_met = is_met or head == expected
    if not is_met:
        raise AuditError(f"the chain ends at {head} and does not contain {expected}: entries were cut off or rewritten")
    return head


def _checked(head: Head, number: int, stored: Any, digest: str) -> Head:
    where = f"audit entry {number}"
    if number != head.number + 1:
        raise AuditError(f"{where} follows entry {head.number}: entries between them are missing")
    if not isinstance(stored, str) or _hash(stored) != digest:
        raise AuditError(f"{where} does not have its hash: its bytes were changed")
    try:
        entry = json.loads(stored)
        is_next = entry["previous"] == head.hash and entry["number"] == number
    except (ValueError, KeyError, TypeError):
        is_next = False
    if not is_next:
        raise AuditError(f"{where} does not continue the chain from entry {head.number}")
    return Head(number, digest)


def prune(store: Store, actor: Actor, keep_days: float) -> int:
    """Remove entries that are older, which is itself recorded; returns their number.

    Args:
        store: where they are.
        actor: who asked for it.
        keep_days: age in days of the oldest entry that stays.
    """
    verify(store)
    before = time() - keep_days * DAY_S
    old = list(entries(store))
    last = max((entry.number for entry in old if entry.time < before), default=0)
    if not last:
        return 0
    with store.write() as connection:
        record(connection, actor, "audit.prune", f"entries to {last}", {"keep_days": keep_days})
        digest = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.number == last)).scalar_one()
        connection.execute(update(AUDIT_ANCHOR).values(number=last, hash=digest))
        return connection.execute(delete(AUDIT).where(AUDIT.c.number <= last)).rowcount


def _head(connection: Connection) -> Head:
    newest = connection.execute(select(func.max(AUDIT.c.number))).scalar()
    table = AUDIT_ANCHOR if newest is None else AUDIT
    query = select(table.c.number, table.c.hash)
    row = connection.execute(query if newest is None else query.where(AUDIT.c.number == newest)).one()
    return Head(row.number, row.hash)


def _hash(stored: str) -> str:
    return hashlib.sha256(stored.encode("utf-8", "surrogateescape")).hexdigest()
