"""Limits, credit and use of requests while a server runs; sums go to the store twice a second."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, final

from trainer.control.accounts import list_accounts
from trainer.control.limiter import Limiter, OverLimitError, Permit
from trainer.control.prices import Prices, amount
from trainer.control.quotas import ALL, TRAINING, quotas_of
from trainer.control.store import Store, StoreDownError
from trainer.control.usage import SUMS, Used, add_usage, spent, today, trained

FLUSH_S: Final = 0.5
"""A server that is killed loses the use of at most this time; of requests in flight, all."""
FRESH_S: Final = 2.0
"""For this long limits and credit are not read again."""
CACHE_S: Final = 30.0
"""For this long they are used while the store is down."""
TOKENS_PER_DAY, TRAINING_MODELS = TRAINING
RETRY_CREDIT_S: Final = 3600
"""Retry-After of an account without credit: somebody must add some."""


@final
@dataclass(frozen=True)
class _Policy:
    """What an account may do."""

    read: float
    limits: dict[str, dict[str, int]]
    spent: int
    is_disabled: bool
    day: str
    trained: int
    """Tokens of the training API on that day."""

    @property
    def credit(self) -> int | None:
        return self.limits.get(ALL, {}).get("credit")

    def trained_on(self, day: str) -> int:
        """Training tokens of a day; a new day begins with none."""
        return self.trained if self.day == day else 0


@final
class SharedClock:
    """Shares the time of one engine among the sequences that run: while k do, each gets 1/k of it."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Begin with none.

        Args:
            clock: seconds.
        """
        self._clock, self._running = clock, 0
        self._each, self._seen = 0.0, clock()

    def begin(self, count: int) -> float:
        """Sequences begin; returns a mark for `end`."""
        self._advance()
        self._running += count
        return self._each

    def end(self, mark: float, count: int) -> float:
        """Sequences end; returns their seconds.

        Args:
            mark: from `begin`.
            count: as in `begin`.
        """
        self._advance()
        self._running -= count
        return (self._each - mark) * count

    def _advance(self) -> None:
        now = self._clock()
        if self._running:
            self._each += (now - self._seen) / self._running
        self._seen = now


@final
@dataclass
class Ticket:
    """A request that was let through. `close` counts it; one that is dropped without is counted as it stands."""

    meter: Meter
    account: str
    model: str
    addon: str
    prompt_tokens: int
    num_sequences: int
    permit: Permit
    reserved: int
    mark: float
    is_open: bool = field(default=True)

    def close(self, completion_tokens: int) -> None:
        """Count what the request used; a second call does nothing.

        Args:
            completion_tokens: that were drawn, also where the request failed or its client left.
        """
        if self.is_open:
            self.is_open = False
            self.meter._close(self, completion_tokens)

    def __del__(self) -> None:
        """Give the places of a request back that ended before its first token was asked for."""
        self.close(0)


@final
@dataclass
class TrainingTicket:
    """A pass of the training API that was let through; to be closed once."""

    meter: Meter
    account: str
    model: str
    tokens: int
    day: str

    def close(self, *, is_counted: bool) -> None:
        """Count the pass, or give its tokens back.

        Args:
            is_counted: whether it was accepted, and for the first time.
        """
        self.meter._close_training(self, is_counted=is_counted)


@final
class Meter:
    """Belongs to one event loop. Limits hold for this server; credit is shared by all that use the store."""

    def __init__(self, store: Store, prices: Prices) -> None:
        """Begin with nothing counted.

        Args:
            store: has limits and sums.
            prices: of tokens.
        """
        self._store, self._prices, self._limiter = store, prices, Limiter()
        self._policies: dict[str, _Policy] = {}
        self._clocks: defaultdict[str, SharedClock] = defaultdict(SharedClock)
        self._pending: dict[tuple[str, str, str, str], Used] = {}
        self._unspent: defaultdict[str, int] = defaultdict(int)
        """Cost that is not yet part of `spent` of a policy, or reserved by requests in flight."""
        self._untrained: defaultdict[tuple[str, str], int] = defaultdict(int)
        """The same for training tokens, by account and day."""
        self._lock = asyncio.Lock()

    async def open(
        self, account: str, model: str, addon: str, *, prompt_tokens: int, most_tokens: int, num_sequences: int = 1
    ) -> Ticket:
        """Let a request through and count it.

        Args:
            account: of its key.
            model: the base model's name.
            addon: the adapter's name; empty is the base.
            prompt_tokens: of all prompts.
            most_tokens: that all completions together can have.
            num_sequences: of the request.

        Raises:
            OverLimitError: with the limit that is reached; nothing is counted.
            StoreDownError: limits are not known, or too old.
        """
        policy = await self._policy(account)
        if policy.is_disabled:  # a batch goes on without a key
            raise OverLimitError("account", f"the account {account} is disabled", None)
        reserved = self._prices.of_model(model).cost(prompt_tokens, most_tokens)
        if policy.credit is not None:
            left = policy.credit - policy.spent - self._unspent[account]
            if reserved > left or left <= 0:
                unit = self._prices.unit
                text = f"the credit has {amount(max(0, left))} {unit} left; this request may cost {amount(reserved)}"
                raise OverLimitError("credit", text, RETRY_CREDIT_S)
        permit = self._limiter.admit(account, model, prompt_tokens + most_tokens, policy.limits)
        self._unspent[account] += reserved
        mark = self._clocks[model].begin(num_sequences)
        return Ticket(self, account, model, addon, prompt_tokens, num_sequences, permit, reserved, mark)

    def _close(self, ticket: Ticket, completion_tokens: int) -> None:
        self._limiter.close(ticket.permit, ticket.prompt_tokens + completion_tokens)
        seconds = self._clocks[ticket.model].end(ticket.mark, ticket.num_sequences)
        cost = self._prices.of_model(ticket.model).cost(ticket.prompt_tokens, completion_tokens)
        self._unspent[ticket.account] += cost - ticket.reserved
        self.add(
            Used(
                day=today(),
                account=ticket.account,
                model=ticket.model,
                addon=ticket.addon,
                requests=1,
                prompt_tokens=ticket.prompt_tokens,
                completion_tokens=completion_tokens,
                device_us=round(seconds * 1e6),
                cost=cost,
            )
        )

    async def train(self, account: str, model: str, tokens: int) -> TrainingTicket:
        """Let a pass of the training API through.

        Args:
            account: of its key.
            model: the base model's name.
            tokens: of its data.

        Raises:
            OverLimitError: with the limit that is reached; nothing is counted.
            StoreDownError: limits are not known, or too old.
        """
        policy, now = await self._policy(account), datetime.now(UTC)
        day = today()
        most = policy.limits.get(ALL, {}).get(TOKENS_PER_DAY)
        used = policy.trained_on(day) + self._untrained[account, day]
        if most is not None and used + tokens > most:
            text = f"{used:,} of {most:,} training tokens of {day} (UTC) are used; this request has {tokens:,}"
            tomorrow = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
            wait = None if tokens > most else max(1, math.ceil((tomorrow - now).total_seconds()))
            raise OverLimitError(TOKENS_PER_DAY, text, wait)
        self._untrained[account, day] += tokens
        return TrainingTicket(self, account, model, tokens, day)

    def _close_training(self, ticket: TrainingTicket, *, is_counted: bool) -> None:
        if is_counted:
            self.add(Used(ticket.day, ticket.account, ticket.model, "", requests=1, training_tokens=ticket.tokens))
        else:
            self._untrained[ticket.account, ticket.day] -= ticket.tokens

    async def most_training_models(self, account: str) -> int | None:
        """How many models an account may train at once; None is any number.

        Raises:
            StoreDownError: limits are not known, or too old.
        """
        return (await self._policy(account)).limits.get(ALL, {}).get(TRAINING_MODELS)

    def add(self, used: Used) -> None:
        """Add to the sums that are stored next."""
        key = (used.day, used.account, used.model, used.addon)
        before = self._pending.get(key)
        if before is not None:
            used = Used(*key, **{name: getattr(before, name) + getattr(used, name) for name in SUMS})
        self._pending[key] = used

    def forget(self) -> None:
        """Read limits again, after this process changed one."""
        self._policies.clear()

    async def _policy(self, account: str) -> _Policy:
        known = self._policies.get(account)
        if known is not None and monotonic() - known.read < FRESH_S:
            return known
        async with self._lock:  # no flush meanwhile: its cost would be counted twice, or not at all
            latest = self._policies.get(account)
            if latest is not None and monotonic() - latest.read < FRESH_S:
                return latest
            try:
                found = await asyncio.to_thread(self._read, account)
            except StoreDownError:
                if latest is not None and monotonic() - latest.read < CACHE_S:
                    return latest
                raise
            self._policies[account] = found
            return found

    def _read(self, account: str) -> _Policy:
        limits: dict[str, dict[str, int]] = {}
        is_disabled = any(each.name == account and each.is_disabled for each in list_accounts(self._store))
        for quota in quotas_of(self._store, account):
            limits.setdefault(quota.model, {})[quota.limit] = quota.value
        day = today()
        used = trained(self._store, account, day)
        return _Policy(monotonic(), limits, spent(self._store, account), is_disabled, day, used)

    async def flush(self) -> int:
        """Store what was counted; returns the number of requests that are not stored because the store is down."""
        async with self._lock:
            batch, self._pending = self._pending, {}
            if not batch:
                return 0
            try:
                await asyncio.to_thread(add_usage, self._store, list(batch.values()))
            except StoreDownError:
                for used in batch.values():
                    self.add(used)
                return sum(used.requests for used in self._pending.values())
            for used in batch.values():
                self._unspent[used.account] -= used.cost
                left = self._untrained.pop((used.account, used.day), 0) - used.training_tokens
                if left:
                    self._untrained[used.account, used.day] = left
                policy = self._policies.get(used.account)
                if policy is not None:
                    on_day = policy.trained + (used.training_tokens if used.day == policy.day else 0)
                    policy = replace(policy, spent=policy.spent + used.cost, trained=on_day)
                    self._policies[used.account] = policy
            return 0

    async def run(self) -> None:
        """Store sums until it is cancelled."""
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(FLUSH_S)
                await self.flush()
