"""Who may use the training API: the place where accounts, quotas and audit come in.

Every route calls `enter` before it does anything and `leave` after it, with what it was and how it ended.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Protocol, final

from starlette.requests import Request

from trainer.serve.access import keys_of, principal_of
from trainer.serve.api_errors import ApiError


class TrainingGuard(Protocol):
    """Decides about requests."""

    async def enter(self, request: Request, action: str, *, num_bytes: int = 0) -> str:
        """The account of a request.

        Args:
            request: with its headers.
            action: such as `forward_backward`.
            num_bytes: of its body.

        Raises:
            ApiError: 401 without a valid key, 403 where the key may not do this, 429 beyond a quota.
        """

    async def leave(self, account: str, action: str, *, status: int, subject: str = "", tokens: int = 0) -> None:
        """Note what was done, for usage and audit.

        Args:
            account: as `enter` returned it.
            action: as given to `enter`.
            status: of the answer.
            subject: model, session or state that it was done to.
            tokens: that were accepted.
        """


@final
@dataclass(frozen=True)
class KeyGuard:
    """Keys of a file: each is an account of its own. Without keys all clients are one account."""

    digests: frozenset[bytes]
    """SHA-256 of each key."""

    async def enter(self, request: Request, action: str, *, num_bytes: int = 0) -> str:
        """The account of a request; see `TrainingGuard`."""
        del action, num_bytes
        if not self.digests:
            return ""
        for key in keys_of(request):
            digest = hashlib.sha256(key.encode()).digest()
            if any(hmac.compare_digest(digest, each) for each in self.digests):
                return digest.hex()[:16]
        raise ApiError(
            401, "no valid API key: set TINKER_API_KEY=tml-KEY, or send `X-API-Key: KEY`", code="invalid_api_key"
        )

    async def leave(self, account: str, action: str, *, status: int, subject: str = "", tokens: int = 0) -> None:
        """Nothing is kept."""


@final
class AccountGuard:
    """Accounts: the server's own guard has found the key, its scope and its account, and records control actions."""

    async def enter(self, request: Request, action: str, *, num_bytes: int = 0) -> str:
        """The account of a request; see `TrainingGuard`."""
        del action, num_bytes
        principal = principal_of(request)
        assert principal is not None, "the server's guard lets no request through without a key"
        return principal.account

    async def leave(self, account: str, action: str, *, status: int, subject: str = "", tokens: int = 0) -> None:
        """Nothing is kept here."""
