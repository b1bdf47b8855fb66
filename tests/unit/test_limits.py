"""Limits per minute and in flight, credit, and the share of a request in an engine's time."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
from stores import ACTOR, with_team

from trainer.control.accounts import set_disabled
from trainer.control.limiter import Limiter, OverLimitError, Permit
from trainer.control.meter import Meter, SharedClock
from trainer.control.prices import ModelPrice, Prices
from trainer.control.quotas import set_quota
from trainer.control.store import Store
from trainer.control.usage import spent, usage_by


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(clock)


def refused(
    limiter: Limiter, tokens: int, limits: dict[str, dict[str, int]], model: str = "m"
) -> tuple[str, int | None]:
    with pytest.raises(OverLimitError) as found:
        limiter.admit("team", model, tokens, limits)
    return found.value.limit, found.value.retry_s


def test_the_window_of_requests_moves(limiter: Limiter, clock: Clock) -> None:
    limits = {"*": {"requests_per_minute": 2}}
    for second in (0, 10):
        clock.now = 1000.0 + second
        limiter.close(limiter.admit("team", "m", 1, limits), 1)
    clock.now = 1020.0
    assert refused(limiter, 1, limits) == ("requests_per_minute", 40)  # the one of 1000 leaves at 1060
    clock.now = 1059.5
    assert refused(limiter, 1, limits) == ("requests_per_minute", 1)
    clock.now = 1060.0
    limiter.admit("team", "m", 1, limits)
    assert refused(limiter, 1, limits) == ("requests_per_minute", 10)  # the one of 1010
    limiter.admit("other", "m", 1, limits)  # has a window of its own


def test_tokens_count_with_the_most_until_the_end_and_as_they_were_after_it(limiter: Limiter, clock: Clock) -> None:
    limits = {"*": {"tokens_per_minute": 100}}
    first = limiter.admit("team", "m", 60, limits)
    assert refused(limiter, 50, limits) == ("tokens_per_minute", 60)
    limiter.close(first, 10)
    limiter.close(first, 10)  # a second time counts nothing
    clock.now += 5
    second = limiter.admit("team", "m", 90, limits)
    assert refused(limiter, 1, limits) == ("tokens_per_minute", 55)  # when the 10 leave
    assert refused(limiter, 11, limits) == ("tokens_per_minute", 60)  # when the 90 leave
    assert refused(limiter, 101, limits) == ("tokens_per_minute", None)  # never
    clock.now += 60
    limiter.admit("team", "m", 100, limits)
    limiter.close(second, 90)  # left the window before it ended


def test_limits_of_a_model_and_of_all_hold_together(limiter: Limiter) -> None:
    limits = {"*": {"concurrent_requests": 3}, "m": {"concurrent_requests": 1}}
    one = limiter.admit("team", "m", 1, limits)
    assert refused(limiter, 1, limits) == ("concurrent_requests", 1)
    others = [limiter.admit("team", "n", 1, limits) for _ in range(2)]
    assert refused(limiter, 1, limits, "n") == ("concurrent_requests", 1)
    limiter.close(one, 1)
    limiter.admit("team", "m", 1, limits)
    assert len(others) == 2


def test_a_refused_request_counts_nowhere(limiter: Limiter) -> None:
    limits = {"m": {"requests_per_minute": 5}, "*": {"tokens_per_minute": 10}}
    for _ in range(20):
        assert refused(limiter, 11, limits)[0] == "tokens_per_minute"
    permits: list[Permit] = [limiter.admit("team", "m", 2, limits) for _ in range(5)]
    assert len(permits) == 5


def test_sequences_share_the_time_of_their_engine(clock: Clock) -> None:
    shared = SharedClock(clock)
    first = shared.begin(1)
    clock.now += 4  # alone: 4 s
    second = shared.begin(3)
    clock.now += 8  # four sequences: 2 s each
    assert shared.end(second, 3) == 6
    clock.now += 1
    assert shared.end(first, 1) == 4 + 2 + 1
    clock.now += 100  # nobody runs
    third = shared.begin(1)
    assert shared.end(third, 1) == 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return with_team(tmp_path)


PRICES = Prices(models={"m": ModelPrice(input=1, output=2)})


def test_credit_is_never_overspent_by_requests_at_once(store: Store) -> None:
    # 10 prompt tokens and 20 of the completion cost 50e-6 at most; 0.000525 have room for 10 of them
    set_quota(store, ACTOR, "team", {"credit": "0.000525"})

    async def run() -> list[object]:
        meter = Meter(store, PRICES)

        async def one() -> int:
            ticket = await meter.open("team", "m", "", prompt_tokens=10, most_tokens=20)
            await asyncio.sleep(0)
            ticket.close(20)
            return 1

        first = await asyncio.gather(*(one() for _ in range(64)), return_exceptions=True)
        await meter.flush()
        later = await asyncio.gather(*(one() for _ in range(8)), return_exceptions=True)
        ticket = await meter.open("team", "m", "", prompt_tokens=5, most_tokens=10)  # 25e-6 are left
        ticket.close(0)
        await meter.flush()
        return [*first, *later]

    results = asyncio.run(run())
    errors = [each for each in results if isinstance(each, OverLimitError)]
    assert (results.count(1), len(errors)) == (10, 62)
    assert {each.limit for each in errors} == {"credit"}
    assert spent(store, "team") == 10 * 50_000 + 5_000  # in 1e-9 units
    assert [(row["requests"], row["completion_tokens"]) for row in usage_by(store, [])] == [(11, 200)]


def test_a_request_that_is_dropped_before_it_began_gives_its_place_back(store: Store) -> None:
    set_quota(store, ACTOR, "team", {"concurrent_requests": "1"})

    async def run() -> None:
        meter = Meter(store, PRICES)
        ticket = await meter.open("team", "m", "", prompt_tokens=1, most_tokens=1)
        with pytest.raises(OverLimitError):
            await meter.open("team", "m", "", prompt_tokens=1, most_tokens=1)
        del ticket
        gc.collect()
        await meter.open("team", "m", "", prompt_tokens=1, most_tokens=1)

    asyncio.run(run())


def test_use_waits_in_memory_while_the_store_is_down(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.file is not None
    file, away = store.file, store.file.with_name("away")

    async def run() -> None:
        meter = Meter(store, PRICES)
        (await meter.open("team", "m", "", prompt_tokens=3, most_tokens=3)).close(3)
        file.rename(away)
        assert await meter.flush() == 1
        (await meter.open("team", "m", "", prompt_tokens=4, most_tokens=3)).close(3)
        assert await meter.flush() == 2
        away.rename(file)
        assert await meter.flush() == 0

    asyncio.run(run())
    assert [row["prompt_tokens"] for row in usage_by(store, [])] == [7]


def test_a_disabled_account_is_refused_also_without_a_key(store: Store) -> None:
    set_disabled(store, ACTOR, "team", is_disabled=True)

    async def run() -> None:
        with pytest.raises(OverLimitError, match="is disabled"):
            await Meter(store, PRICES).open("team", "m", "", prompt_tokens=1, most_tokens=1)

    asyncio.run(run())
