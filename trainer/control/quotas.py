"""Quotas as they are stored: which limit an account has for a model, or for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from typing import Final, final

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

from trainer.control.accounts import AccountError, need_account
from trainer.control.audit import Actor, record
from trainer.control.prices import NANO, amount
from trainer.control.store import Store
from trainer.control.tables import QUOTAS

ALL: Final = "*"
"""All models of an account together."""
COUNTS: Final = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
TRAINING: Final = ("training_tokens_per_day", "training_models")
WHOLE: Final = ("replicas", "device_hours", "credit", *TRAINING)
"""Limits of the account alone, not of one model."""
LIMITS: Final = (*COUNTS, *WHOLE)
SCALE: Final[Mapping[str, int]] = {"credit": NANO, "device_hours": 3600}
"""Stored integers per unit: 1e-9 of a credit, seconds of a device-hour."""
MAX_STORED: Final = 2**63 - 1


@final
@dataclass(frozen=True)
class Quota:
    """One limit."""

    account: str
    model: str
    limit: str
    value: int
    """As stored; see SCALE."""

    @property
    def shown(self) -> str:
        """The value for people, in units, hours or as a count."""
        return shown_value(self.limit, self.value)


def shown_value(limit: str, value: int) -> str:
    """A stored value for people."""
    if limit == "device_hours":
        return f"{value / 3600:.4f}".rstrip("0").rstrip(".")
    return amount(value) if limit == "credit" else str(value)


def parse_value(limit: str, words: str) -> int:
    """A value as people write it, as stored.

    Raises:
        AccountError: no such limit, or the value is no number of it.
    """
    if limit not in LIMITS:
        raise AccountError(f"no limit {limit!r}; there are {', '.join(LIMITS)}")
    try:
        value = Decimal(words.replace("_", "").replace(",", "")) * SCALE.get(limit, 1)
        if limit == "device_hours":
            value = value.to_integral_value(ROUND_CEILING)  # counted in whole seconds: a third of an hour has 1,200
        is_whole = value == value.to_integral_value()
    except InvalidOperation:
        raise AccountError(f"{limit}={words}: must be a number") from None
    if not is_whole or not 0 <= value <= MAX_STORED:
        raise AccountError(f"{limit}={words}: must be {'a whole number' if limit not in SCALE else 'a number'} >= 0")
    return int(value)


def set_quota(store: Store, actor: Actor, account: str, changes: Mapping[str, str | None], *, model: str = ALL) -> None:
    """Set or remove limits of an account.

    Args:
        store: keeps them.
        actor: who does it.
        account: whose limits.
        changes: value by limit, as people write it; None removes the limit; `+N` and `-N` change a credit.
        model: only for requests to this model; `*` for all together.

    Raises:
        AccountError: no such account or limit, or no number.
    """
    for limit in changes:
        if limit in WHOLE and model != ALL:
            raise AccountError(f"{limit} is a limit of the whole account, not of {model}")
    with store.write() as connection:
        need_account(connection, account)
        for limit, words in changes.items():
            where = (QUOTAS.c.account == account) & (QUOTAS.c.model == model) & (QUOTAS.c.limit == limit)
            before = connection.execute(select(QUOTAS.c.value).where(where)).scalar()
            if words is None:
                parse_value(limit, "0")
                connection.execute(delete(QUOTAS).where(where))
            else:
                value = _changed(limit, words, before)
                insert = sqlite.insert if store.is_sqlite else postgresql.insert
                query = insert(QUOTAS).values(account=account, model=model, limit=limit, value=value)
                connection.execute(
                    query.on_conflict_do_update(index_elements=["account", "model", "limit"], set_={"value": value})
                )
                words = shown_value(limit, value)
            old = None if before is None else shown_value(limit, before)
            details = {"limit": limit, "model": model, "before": old, "after": words}
            record(connection, actor, "quota.set", account, details)


def _changed(limit: str, words: str, before: int | None) -> int:
    if limit != "credit" or words[:1] not in ("+", "-"):
        return parse_value(limit, words)
    change = parse_value(limit, words[1:])
    value = (before or 0) + (change if words[0] == "+" else -change)
    if not 0 <= value <= MAX_STORED:
        raise AccountError(f"credit={words}: the credit was {shown_value(limit, before or 0)}")
    return value


def quotas_of(store: Store, account: str) -> list[Quota]:
    """The limits of an account.

    Raises:
        AccountError: no such account.
    """
    query = select(QUOTAS).where(QUOTAS.c.account == account).order_by(QUOTAS.c.model, QUOTAS.c.limit)
    with store.read() as connection:
        need_account(connection, account)
        return [Quota(row.account, row.model, row.limit, row.value) for row in connection.execute(query)]
