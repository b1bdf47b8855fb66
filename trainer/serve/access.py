"""Who may use which route: keys of a file, or accounts with scopes; and the record of control actions."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Final, Protocol, final

from starlette.requests import Request

from trainer.serve.api_errors import ApiError

if TYPE_CHECKING:
    from trainer.control.key_cache import KeyCache
    from trainer.control.keys import Key

OPEN_ROUTES: Final = frozenset({"/health"})
"""Routes that need no key."""
CLIENT_PREFIX: Final = "tml-"
"""The tinker client sends only keys that begin with this; it may be put before a key of this server."""
SCOPES: Final = (
    (re.compile(r"/metrics"), "metrics"),
    (re.compile(r"/v1/(chat/completions|completions|embeddings|models(/.*)?|files(/.*)?|batches(/.*)?)"), "inference"),
    (re.compile(r"/v1/(usage|quota)"), "inference"),
    (re.compile(r"/ready"), "any"),
    (re.compile(r"/api/v1/.*"), "training"),
)
"""Scope of each route; of any other `admin`."""
UNAUTHORIZED: Final = "no valid API key: send `Authorization: Bearer KEY`"


def scope_of(path: str) -> str:
    """The scope that a key needs for a route.

    >>> scope_of("/v1/models/a"), scope_of("/v1/keys"), scope_of("/v1/modelsx")
    ('inference', 'admin', 'admin')
    """
    return next((scope for pattern, scope in SCOPES if pattern.fullmatch(path)), "admin")


@final
@dataclass(frozen=True)
class Principal:
    """Whose key a request has."""

    account: str
    key: str
    """Its id."""
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """Whether the key sees what other accounts own."""
        return "admin" in self.scopes


class Access(Protocol):
    """Decides about requests."""

    async def principal(self, request: Request) -> Principal | None:
        """Whose key a request has; None where the server knows no accounts.

        Raises:
            ApiError: 401, 403, or 503 while the store is down.
        """


@final
class KeyFile:
    """Keys of a file, which may use every route; without keys everybody may."""

    def __init__(self, digests: Collection[bytes] = ()) -> None:
        """Accept keys.

        Args:
            digests: SHA-256 of each key; empty needs no key.
        """
        self._digests = tuple(digests)

    async def principal(self, request: Request) -> Principal | None:
        """None: there are no accounts.

        Raises:
            ApiError: 401.
        """
        if self._digests and request.scope["path"] not in OPEN_ROUTES:
            digests = [hashlib.sha256(key.encode()).digest() for key in keys_of(request)]
            if not any(hmac.compare_digest(digest, each) for digest in digests for each in self._digests):
                raise ApiError(401, UNAUTHORIZED, code="invalid_api_key")
        return None


@final
class AccountKeys:
    """Keys of accounts."""

    def __init__(self, cache: KeyCache) -> None:
        """Accept the keys of a store.

        Args:
            cache: looks them up.
        """
        self._cache = cache

    async def principal(self, request: Request) -> Principal | None:
        """The owner of the key; None for routes that need none.

        Raises:
            ApiError: 401, 403 where the key lacks the scope, or 503 while the store is down.
        """
        path = request.scope["path"]
        if path in OPEN_ROUTES:
            return None
        key = await self._find(bearer(request))
        scope = scope_of(path)
        if scope != "any" and not key.allows(scope):
            raise ApiError(403, f"{request.method} {path} needs a key with the scope {scope}", code="missing_scope")
        return Principal(key.account, key.id, key.scopes)

    async def _find(self, given: str) -> Key:
        from trainer.control.store import StoreDownError

        try:
            key = await self._cache.find(given)
        except StoreDownError:
            raise ApiError(503, "keys cannot be checked now", code="store_down", retry_s=5) from None
        problem = None if key is None else key.problem(time())
        if key is None or problem is not None:
            raise ApiError(401, problem or UNAUTHORIZED, code="invalid_api_key")
        return key


def bearer(request: Request) -> str:
    """The key of a request, without the prefix of the tinker client; empty where it has none."""
    return keys_of(request)[-1]


def keys_of(request: Request) -> tuple[str, str]:
    """The key of a request as it was sent, and without the prefix that the tinker client demands.

    The tinker client sends `X-API-Key: tml-KEY`.
    """
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    sent = key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
    return sent, sent.removeprefix(CLIENT_PREFIX)


def principal_of(request: Request) -> Principal | None:
    """Whose key a request has, after the guard let it through."""
    found: Principal | None = getattr(request.state, "principal", None)
    return found
