"""API keys: create, list, revoke, rotate and check. A key is shown once; its SHA-256 is stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from time import time
from typing import Final, final

from sqlalchemy import Connection, insert, select, update

from trainer.control.accounts import AccountError, need_account
from trainer.control.audit import Actor, record
from trainer.control.store import Store
from trainer.control.tables import ACCOUNTS, KEYS

SCOPES: Final = ("inference", "training", "admin", "metrics")
"""What a key may be used for. `admin` includes the others; `metrics` reads /metrics and nothing else."""
KEY: Final = re.compile(r"tsk_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
"""`tsk_`, the id of the key, 256 random bits."""
MAX_NOTE: Final = 200


@final
@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    id: str
    account: str
    scopes: frozenset[str]
    note: str
    created: float
    expires: float | None
    """Seconds since 1970; None never."""
    revoked: float | None
    is_disabled: bool
    """Whether the account is."""

    def allows(self, scope: str) -> bool:
        """Whether the key may be used for a route of this scope."""
        return scope in self.scopes or "admin" in self.scopes

    def problem(self, now: float) -> str | None:
        """Why the key is not valid now; None where it is."""
        if self.revoked is not None and self.revoked <= now:
            return "the key is revoked"
        if self.expires is not None and self.expires <= now:
            return "the key has expired"
        return "the account is disabled" if self.is_disabled else None


def create_key(
    store: Store,
    actor: Actor,
    account: str,
    scopes: Collection[str],
    *,
    expires_s: float | None = None,
    note: str = "",
) -> str:
    """Make a key; returns it, the only time that it can be seen.

    Args:
        store: keeps its digest.
        actor: who makes it.
        account: its owner.
        scopes: of SCOPES.
        expires_s: seconds from now on; None never.
        note: for people, up to 200 characters.

    Raises:
        AccountError: no such account or scope.
    """
    _check(scopes, expires_s, note)
    with store.write() as connection:
        need_account(connection, account)
        expires = None if expires_s is None else time() + expires_s
        key, identity = _insert(connection, account, scopes, expires, note)
        details = {"account": account, "scopes": sorted(scopes), "expires": expires}
        record(connection, actor, "keys.create", identity, details)
        return key


def rotate_key(store: Store, actor: Actor, identity: str, *, grace_s: float = 0.0) -> str:
    """Replace a key by one with its scopes and lifetime; returns the new one.

    Args:
        store: keeps the digests.
        actor: who does it.
        identity: of the old key.
        grace_s: seconds that the old key stays valid.

    Raises:
        AccountError: no such key, or it is not valid any more.
    """
    with store.write() as connection:
        old = _one(connection, identity)
        now = time()
        problem = old.problem(now)
        if problem is not None:
            raise AccountError(f"key {identity}: {problem}")
        if grace_s < 0:
            raise AccountError(f"a grace of {grace_s} s: must not be negative")
        expires = None if old.expires is None else now + (old.expires - old.created)
        key, new = _insert(connection, old.account, old.scopes, expires, old.note)
        ends = min(now + grace_s, old.expires or float("inf"))
        values = {"revoked": now} if grace_s == 0 else {"expires": ends}
        connection.execute(update(KEYS).where(KEYS.c.id == identity).values(**values))
        record(connection, actor, "keys.rotate", identity, {"account": old.account, "new": new, "old_ends": ends})
        return key


def revoke_key(store: Store, actor: Actor, identity: str) -> None:
    """Refuse a key from now on.

    Raises:
        AccountError: no such key.
    """
    with store.write() as connection:
        old = _one(connection, identity)
        if old.revoked is None:
            connection.execute(update(KEYS).where(KEYS.c.id == identity).values(revoked=time()))
        record(connection, actor, "keys.revoke", identity, {"account": old.account})


def list_keys(store: Store, account: str | None = None) -> list[Key]:
    """All keys, or those of one account, the oldest first."""
    query = _QUERY.order_by(KEYS.c.created)
    if account is not None:
        query = query.where(KEYS.c.account == account)
    with store.read() as connection:
        return [_key(row) for row in connection.execute(query)]


def find_key(store: Store, key: str) -> Key | None:
    """The key that a client sent, valid or not; None where there is no such key."""
    match = KEY.fullmatch(key)
    if match is None:
        return None
    with store.read() as connection:
        row = connection.execute(_QUERY.where(KEYS.c.id == match[1])).first()
    if row is None or not hmac.compare_digest(str(row.digest), digest_of(key)):
        return None
    return _key(row)


def has_admin(store: Store) -> bool:
    """Whether a valid key with the scope admin exists."""
    now = time()
    return any("admin" in key.scopes and key.problem(now) is None for key in list_keys(store))


def digest_of(key: str) -> str:
    """SHA-256 in hexadecimal. A key has 256 random bits, which need no slow hash."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


_QUERY: Final = select(KEYS, ACCOUNTS.c.is_disabled).join_from(KEYS, ACCOUNTS, KEYS.c.account == ACCOUNTS.c.name)


def _check(scopes: Collection[str], expires_s: float | None, note: str) -> None:
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise AccountError(f"scopes {', '.join(unknown) or 'none'}: there are {', '.join(SCOPES)}")
    if expires_s is not None and expires_s <= 0:
        raise AccountError(f"a lifetime of {expires_s} s: must be positive")
    if len(note) > MAX_NOTE:
        raise AccountError(f"the note has {len(note)} characters; at most {MAX_NOTE}")


def _insert(
    connection: Connection, account: str, scopes: Collection[str], expires: float | None, note: str
) -> tuple[str, str]:
    """Store a new key; returns it and its id."""
    identity = secrets.token_hex(8)
    key = f"tsk_{identity}_{secrets.token_urlsafe(32)}"
    connection.execute(
        insert(KEYS).values(
            id=identity,
            account=account,
            digest=digest_of(key),
            scopes=",".join(sorted(scopes)),
            note=note,
            created=time(),
            expires=expires,
            revoked=None,
        )
    )
    return key, identity


def _one(connection: Connection, identity: str) -> Key:
    row = connection.execute(_QUERY.where(KEYS.c.id == identity)).first()
    if row is None:
        raise AccountError(f"no key {identity!r}; `trainer keys list` lists their ids")
    return _key(row)


def _key(row: object) -> Key:
    names = ("id", "account", "note", "created", "expires", "revoked", "is_disabled")
    values = {name: getattr(row, name) for name in names}
    return Key(**values, scopes=frozenset(str(getattr(row, "scopes")).split(",")))  # noqa: B009
