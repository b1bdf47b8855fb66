"""What accounts used: tokens, device time and cost, added up by day, account, model and addon (UTC)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, final

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite

from trainer.control.accounts import AccountError
from trainer.control.store import Store
from trainer.control.tables import USAGE

GROUPS: Final = ("day", "account", "model", "addon")
SUMS: Final = ("requests", "prompt_tokens", "completion_tokens", "device_us", "replica_us", "cost", "training_tokens")


@final
@dataclass(frozen=True)
class Used:
    """Use of one account, model and addon on one day."""

    day: str
    account: str
    model: str
    addon: str
    """Empty for the base model, or where sums are over all."""
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    device_us: int = 0
    """Share of requests in the engine's time, in microseconds: while k sequences run, each has 1/k of it."""
    replica_us: int = 0
    """Lifetime of a deployment's replicas times their devices, in microseconds."""
    cost: int = 0
    """In 1e-9 units."""
    training_tokens: int = 0
    """Of the passes of the training API that were accepted."""


def today() -> str:
    """The day in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def add_usage(store: Store, used: Iterable[Used]) -> None:
    """Add to the sums, all or nothing."""
    insert = sqlite.insert if store.is_sqlite else postgresql.insert
    with store.write() as connection:
        for each in used:
            query = insert(USAGE).values(**vars(each))
            added = {name: USAGE.c[name] + query.excluded[name] for name in SUMS}
            connection.execute(query.on_conflict_do_update(index_elements=list(GROUPS), set_=added))


def usage_by(
    store: Store, groups: Sequence[str], *, account: str | None = None, since: str | None = None
) -> list[dict[str, Any]]:
    """Sums, one dictionary for each combination of the groups.

    Args:
        store: where they are.
        groups: of GROUPS.
        account: only this one.
        since: only days from this one on, as 2026-11-26.

    Raises:
        AccountError: no such group, or no such date.
    """
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise AccountError(f"usage by {', '.join(unknown)}: there are {', '.join(GROUPS)}")
    columns = [USAGE.c[name] for name in groups]
    query = select(*columns, *(func.sum(USAGE.c[name]).label(name) for name in SUMS))
    if account is not None:
        query = query.where(USAGE.c.account == account)
    if since is not None:
        try:
            datetime.strptime(since, "%Y-%m-%d").replace(tzinfo=UTC)
        except ValueError:
            raise AccountError(f"--since {since}: write a day as 2026-11-26") from None
        query = query.where(USAGE.c.day >= since)
    with store.read() as connection:
        rows = connection.execute(query.group_by(*columns).order_by(*columns)) if columns else connection.execute(query)
        return [
            {name: row._mapping[name] for name in groups} | {name: int(row._mapping[name] or 0) for name in SUMS}
            for row in rows
        ]


def spent(store: Store, account: str) -> int:
    """Cost of everything that an account used so far, in 1e-9 units."""
    with store.read() as connection:
        return int(connection.execute(select(func.sum(USAGE.c.cost)).where(USAGE.c.account == account)).scalar() or 0)


def trained(store: Store, account: str, day: str) -> int:
    """Tokens that an account trained on, on one day."""
    query = select(func.sum(USAGE.c.training_tokens)).where((USAGE.c.account == account) & (USAGE.c.day == day))
    with store.read() as connection:
        return int(connection.execute(query).scalar() or 0)


def device_seconds(store: Store, account: str) -> float:
    """Lifetime of all replicas of an account's deployments times their devices."""
    query = select(func.sum(USAGE.c.replica_us)).where(USAGE.c.account == account)
    with store.read() as connection:
        return int(connection.execute(query).scalar() or 0) / 1e6
