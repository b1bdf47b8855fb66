"""Limits of requests in flight and per minute: exact within one server, in memory."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Final, TypeAlias, final

from trainer.control.quotas import ALL, COUNTS

WINDOW_S: Final = 60.0
Place: TypeAlias = tuple[str, str]
"""Account, and a model or `*`."""
Limits: TypeAlias = Mapping[str, Mapping[str, int]]
"""Value by limit by model, or `*`, of one account."""


@final
class OverLimitError(Exception):
    """A request beyond a limit."""

    def __init__(self, limit: str, message: str, retry_s: int | None) -> None:
        """Keep what the client is told.

        Args:
            limit: its name.
            message: what was reached.
            retry_s: seconds after which the request can succeed; None where it never can as it is.
        """
        super().__init__(message)
        self.limit, self.message, self.retry_s = limit, message, retry_s


@final
@dataclass
class _Counted:
    """A request within the last minute."""

    at: float
    tokens: int


@final
@dataclass
class _State:
    """Of one account and model."""

    in_flight: int = 0
    recent: deque[_Counted] = field(default_factory=deque)
    tokens: int = 0
    """Of `recent`."""

    def expire(self, now: float) -> None:
        while self.recent and self.recent[0].at <= now - WINDOW_S:
            self.tokens -= self.recent.popleft().tokens


@final
@dataclass
class Permit:
    """A request that was let through; to be closed once."""

    places: tuple[Place, ...]
    counted: _Counted
    is_open: bool = True


@final
class Limiter:
    """Counts requests and tokens of accounts in a window of one minute that moves. Belongs to one thread.

    A request counts with the most tokens that it can have until it ends, and with those that it had from then on.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Begin with nothing counted.

        Args:
            clock: seconds.
        """
        self._clock = clock
        self._states: defaultdict[Place, _State] = defaultdict(_State)

    def admit(self, account: str, model: str, tokens: int, limits: Limits) -> Permit:
        """Count a request, if no limit is reached: of the model, and of all models together.

        Args:
            account: whose limits.
            model: that is asked.
            tokens: the most that prompt and completion can have.
            limits: of the account.

        Raises:
            OverLimitError: with the first limit that is reached; nothing is counted.
        """
        now = self._clock()
        places = ((account, model), (account, ALL))
        for place in places:
            self._check(self._states[place], limits.get(place[1], {}), tokens, now, place[1])
        counted = _Counted(now, tokens)
        for place in places:
            state = self._states[place]
            state.in_flight += 1
            state.recent.append(counted)
            state.tokens += tokens
        return Permit(places, counted)

    def close(self, permit: Permit, tokens: int) -> None:
        """Count a request that ended with the tokens that it had; a second call does nothing.

        Args:
            permit: from `admit`.
            tokens: of its prompt and completion.
        """
        if not permit.is_open:
            return
        permit.is_open = False
        now = self._clock()
        for place in permit.places:
            state = self._states[place]
            state.in_flight -= 1
            state.expire(now)
            if permit.counted.at > now - WINDOW_S:
                state.tokens += tokens - permit.counted.tokens
        permit.counted.tokens = tokens
        for place in permit.places:
            state = self._states[place]
            if not state.in_flight and not state.recent:
                del self._states[place]

    def _check(self, state: _State, limits: Mapping[str, int], tokens: int, now: float, model: str) -> None:
        state.expire(now)
        whose = "of all models" if model == ALL else f"of {model}"
        requests, most_tokens, in_flight = (limits.get(name) for name in COUNTS)
        if in_flight is not None and state.in_flight >= in_flight:
            raise OverLimitError("concurrent_requests", f"{in_flight} requests {whose} are in flight, the limit", 1)
        if requests is not None and len(state.recent) >= requests:
            wait = self._wait(state, now, len(state.recent) - requests + 1) if requests else None
            raise OverLimitError("requests_per_minute", f"{requests} requests {whose} per minute is the limit", wait)
        if most_tokens is not None and state.tokens + tokens > most_tokens:
            left = f"{state.tokens:,} of {most_tokens:,} tokens {whose} per minute are used"
            if tokens > most_tokens:
                left = f"{most_tokens:,} tokens {whose} per minute is the limit"
            text = f"{left}; this request may have {tokens:,}: a lower max_tokens counts less"
            wait = None if tokens > most_tokens else self._wait_tokens(state, now, tokens - most_tokens)
            raise OverLimitError("tokens_per_minute", text, wait)

    def _wait(self, state: _State, now: float, count: int) -> int:
        """Seconds until so many requests have left the window."""
        return max(1, math.ceil(state.recent[count - 1].at + WINDOW_S - now))

    def _wait_tokens(self, state: _State, now: float, excess: int) -> int:
        """Seconds until so few tokens are left in the window that the excess is negative or 0."""
        left = state.tokens
        for counted in state.recent:
            left -= counted.tokens
            if left + excess <= 0:
                return max(1, math.ceil(counted.at + WINDOW_S - now))
        raise AssertionError("an empty window has room for every request below the limit")
