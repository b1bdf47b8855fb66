"""Accounts: create, list, disable, enable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from time import time
from typing import Final, final

from sqlalchemy import Connection, func, insert, select, update

from trainer.control.audit import Actor, record
from trainer.control.store import Store
from trainer.control.tables import ACCOUNTS, KEYS
from trainer.errors import UserError

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AccountError(UserError):
    """An account, key or quota that does not exist or cannot be made."""


@final
class MissingError(AccountError):
    """What a path of the API names is not there: answered with 404."""


@final
@dataclass(frozen=True)
class Account:
    """Who owns keys, files and deployments."""

    name: str
    created: float
    """Seconds since 1970."""
    is_disabled: bool
    num_keys: int
    """Keys that are not revoked."""


def create_account(store: Store, actor: Actor, name: str) -> None:
    """Add an account.

    Raises:
        AccountError: the name is taken or malformed.
    """
    if not NAME.fullmatch(name):
        raise AccountError(f"account {name!r}: 1 to 64 letters, digits, dots, dashes and underscores")
    with store.write() as connection:
        if connection.execute(select(ACCOUNTS.c.name).where(ACCOUNTS.c.name == name)).first() is not None:
            raise AccountError(f"account {name!r} exists")
        connection.execute(insert(ACCOUNTS).values(name=name, created=time(), is_disabled=False))
        record(connection, actor, "account.create", name, {})


def list_accounts(store: Store) -> list[Account]:
    """All accounts by name."""
    live = select(KEYS.c.account, func.count().label("num")).where(KEYS.c.revoked.is_(None)).group_by(KEYS.c.account)
    counts = live.subquery()
    query = (
        select(ACCOUNTS, func.coalesce(counts.c.num, 0).label("num"))
        .join_from(ACCOUNTS, counts, ACCOUNTS.c.name == counts.c.account, isouter=True)
        .order_by(ACCOUNTS.c.name)
    )
    with store.read() as connection:
        return [Account(row.name, row.created, row.is_disabled, row.num) for row in connection.execute(query)]


def set_disabled(store: Store, actor: Actor, name: str, *, is_disabled: bool) -> None:
    """Refuse, or accept again, all keys of an account; servers know it within the age of their cached keys.

    Raises:
        AccountError: there is no such account.
    """
    with store.write() as connection:
        need_account(connection, name)
        connection.execute(update(ACCOUNTS).where(ACCOUNTS.c.name == name).values(is_disabled=is_disabled))
        record(connection, actor, "account.disable" if is_disabled else "account.enable", name, {})


def need_account(connection: Connection, name: str) -> None:
    """Check that an account exists.

    Raises:
        AccountError: it does not.
    """
    if connection.execute(select(ACCOUNTS.c.name).where(ACCOUNTS.c.name == name)).first() is None:
        raise AccountError(
            f"no account {name!r}; `trainer account create {name}` makes it, `trainer account list` lists the others"
        )
