"""Who may use the training API: the place where accounts, quotas and audit come in.

Every route calls `enter` before it does anything and `leave` after it, with what it was and how it ended.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

from starlette.requests import Request

from trainer.api.wire import count_tokens
from trainer.serve.access import keys_of, principal_of
from trainer.serve.api_errors import ApiError
from trainer.serve.metering import Counted, Uncounted, answered

if TYPE_CHECKING:
    from trainer.control.meter import Meter


class PassTicket(Protocol):
    """A pass that was let through."""

    def close(self, *, is_counted: bool) -> None:
        """Count it, or give its tokens back."""


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

    async def leave(self, account: str, action: str, *, status: int, subject: str = "") -> None:
        """Note what was done, for usage and audit.

        Args:
            account: as `enter` returned it.
            action: as given to `enter`.
            status: of the answer.
            subject: model, session or state that it was done to.
        """

    async def admit_pass(self, account: str, body: bytes) -> PassTicket:
        """Let a pass through, by the tokens of its data.

        Args:
            account: as `enter` returned it.
            body: of the request, in protobuf.

        Raises:
            ApiError: 429 with the name of the limit, 400 where the request alone is beyond it, 503 while the store is
                down.
        """

    async def admit_sample(self, account: str, *, prompt_tokens: int, most_tokens: int, count: int) -> Counted:
        """Let a sample request through; it counts as one of inference.

        Args:
            account: as `enter` returned it.
            prompt_tokens: of its prompt.
            most_tokens: that all sequences together can have.
            count: of sequences.

        Raises:
            ApiError: as of `admit_pass`.
        """

    async def most_models(self, account: str) -> int | None:
        """How many models the account may train at once; None is any number.

        Raises:
            ApiError: 503 while the store is down.
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

    async def leave(self, account: str, action: str, *, status: int, subject: str = "") -> None:
        """Nothing is kept."""

    async def admit_pass(self, account: str, body: bytes) -> PassTicket:
        """Nothing is counted."""
        return _Free()

    async def admit_sample(self, account: str, *, prompt_tokens: int, most_tokens: int, count: int) -> Counted:
        """Nothing is counted."""
        return Uncounted()

    async def most_models(self, account: str) -> int | None:
        """Any number."""
        return None


@final
class AccountGuard:
    """Accounts: the server's own guard has found the key, its scope and its account, and records control actions."""

    def __init__(self, meter: Meter, model: str) -> None:
        """Count by a meter.

        Args:
            meter: has limits and sums.
            model: name of the base model.
        """
        self._meter, self._model = meter, model

    async def enter(self, request: Request, action: str, *, num_bytes: int = 0) -> str:
        """The account of a request; see `TrainingGuard`."""
        del action, num_bytes
        principal = principal_of(request)
        assert principal is not None, "the server's guard lets no request through without a key"
        return principal.account

    async def leave(self, account: str, action: str, *, status: int, subject: str = "") -> None:
        """Nothing is kept here."""

    async def admit_pass(self, account: str, body: bytes) -> PassTicket:
        """Let a pass through; see `TrainingGuard`."""
        return await answered(self._meter.train(account, self._model, count_tokens(body)))

    async def admit_sample(self, account: str, *, prompt_tokens: int, most_tokens: int, count: int) -> Counted:
        """Let a sample request through; see `TrainingGuard`."""
        return await answered(
            self._meter.open(
                account, self._model, "", prompt_tokens=prompt_tokens, most_tokens=most_tokens, num_sequences=count
            )
        )

    async def most_models(self, account: str) -> int | None:
        """How many models the account may train at once; see `TrainingGuard`."""
        return await answered(self._meter.most_training_models(account))


@final
class _Free:
    def close(self, *, is_counted: bool) -> None:
        """Nothing to do."""
