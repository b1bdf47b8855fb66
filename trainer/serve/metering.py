"""Requests as the meter of accounts sees them; a server without accounts counts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, final

from trainer.serve.access import Principal
from trainer.serve.api_errors import ApiError
from trainer.serve.choices import Job

if TYPE_CHECKING:
    from trainer.control.meter import Meter

Answer = TypeVar("Answer")
BASE_SUFFIX: Final = ":base"
"""Ends the name of the base in a deployment whose model is a run's adapter: the adapter has the deployment's name."""
WAIT_S: Final = 5.0
"""Longest pause of a batch between two tries to get below its account's limits."""


class Counted(Protocol):
    """A request that was let through."""

    def close(self, completion_tokens: int) -> None:
        """Count what it used."""


class RequestMeter(Protocol):
    """Lets requests through."""

    async def open(self, principal: Principal | None, base: str, jobs: Sequence[Job], prompt_tokens: int) -> Counted:
        """Count a request.

        Args:
            principal: whose key it has.
            base: name of the base model.
            jobs: its sequences.
            prompt_tokens: of the distinct prompts.

        Raises:
            ApiError: 429 with the name of the limit, or 503 while the store is down.
        """


@final
class Uncounted:
    """A request of a server without accounts."""

    def close(self, completion_tokens: int) -> None:
        """Nothing to do."""


@final
class NoMeter:
    """Of a server without accounts."""

    async def open(self, principal: Principal | None, base: str, jobs: Sequence[Job], prompt_tokens: int) -> Counted:
        """Let every request through."""
        return Uncounted()


@final
class AccountMeter:
    """Of a server with accounts."""

    def __init__(self, meter: Meter) -> None:
        """Count by a meter.

        Args:
            meter: has limits, credit and sums.
        """
        self.meter = meter

    async def open(self, principal: Principal | None, base: str, jobs: Sequence[Job], prompt_tokens: int) -> Counted:
        """Count a request of an account."""
        assert principal is not None, "the guard lets no request through without a key"
        model, adapter = base.removesuffix(BASE_SUFFIX), jobs[0].served.adapter
        return await answered(
            self.meter.open(
                principal.account,
                model,
                "" if adapter is None or adapter == model else adapter,
                prompt_tokens=prompt_tokens,
                most_tokens=sum(job.sampling.max_tokens for job in jobs),
                num_sequences=len(jobs),
            )
        )


async def answered(asked: Awaitable[Answer]) -> Answer:
    """What a meter answers.

    Raises:
        ApiError: 429 with the name of the limit, 400 where the request is beyond it by itself, 503 while the store is
            down.
    """
    from trainer.control.limiter import OverLimitError
    from trainer.control.store import StoreDownError

    try:
        return await asked
    except OverLimitError as error:
        status = 400 if error.retry_s is None else 429
        raise ApiError(status, error.message, code=error.limit, retry_s=error.retry_s) from None
    except StoreDownError:
        raise ApiError(503, "limits cannot be checked now", code="store_down", retry_s=5) from None


async def open_patiently(
    meter: RequestMeter, principal: Principal | None, base: str, jobs: Sequence[Job], prompt_tokens: int
) -> Counted:
    """Count a request of a batch: it waits for limits per minute and for the store, but not for credit.

    Args:
        meter: counts.
        principal: owner of the batch.
        base: name of the base model.
        jobs: its sequences.
        prompt_tokens: of the distinct prompts.

    Raises:
        ApiError: it can never be let through, or there is no credit.
    """
    while True:
        try:
            return await meter.open(principal, base, jobs, prompt_tokens)
        except ApiError as error:
            if error.retry_s is None or error.code == "credit":
                raise
            await asyncio.sleep(min(WAIT_S, error.retry_s))
