"""Limits of accounts on training: tokens of a day, in a real SQLite store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text
from stores import ACTOR, with_team

from trainer.control.limiter import OverLimitError
from trainer.control.meter import Meter
from trainer.control.prices import Prices
from trainer.control.quotas import set_quota
from trainer.control.store import Store
from trainer.control.usage import today, trained, usage_by


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return with_team(tmp_path / "state")


def test_training_tokens_of_a_day_are_limited_and_counted_once(store: Store) -> None:
    set_quota(store, ACTOR, "team", {"training_tokens_per_day": "100", "training_models": "2"})

    async def run() -> None:
        meter = Meter(store, Prices())
        assert await meter.most_training_models("team") == 2
        first = await meter.train("team", "m", 60)
        with pytest.raises(
            OverLimitError, match=r"60 of 100 training tokens of .* are used; this request has 41"
        ) as found:
            await meter.train("team", "m", 41)
        assert found.value.limit == "training_tokens_per_day"
        assert found.value.retry_s is not None
        assert 1 <= found.value.retry_s <= 86400
        with pytest.raises(OverLimitError) as found:
            await meter.train("team", "m", 101)
        assert found.value.retry_s is None, "it can never succeed"
        first.close(is_counted=False)  # a request that was repeated, or refused
        (await meter.train("team", "m", 70)).close(is_counted=True)
        for _ in range(2):  # counted, stored, and read again: the same
            with pytest.raises(OverLimitError, match="70 of 100"):
                await meter.train("team", "m", 31)
            await meter.flush()
            meter.forget()
        await meter.train("team", "m", 30)

    asyncio.run(run())
    (row,) = usage_by(store, ["account", "model"])
    assert (row["account"], row["model"], row["requests"], row["training_tokens"]) == ("team", "m", 1, 70)
    assert trained(store, "team", today()) == 70


def test_a_store_of_the_first_version_gets_the_new_column(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'old.sqlite'}").open()
    with store.write() as connection:
        connection.execute(text("ALTER TABLE usage DROP COLUMN training_tokens"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
        connection.execute(text("INSERT INTO usage VALUES ('2026-11-26', 'team', 'm', '', 1, 10, 5, 7, 0, 100)"))
    again = Store(f"sqlite:///{tmp_path / 'old.sqlite'}").open()
    (row,) = usage_by(again, ["account"])
    assert (row["prompt_tokens"], row["training_tokens"]) == (10, 0)
