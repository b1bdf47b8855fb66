"""The best held-out value of a run is decided from the records of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.run.best import BestValue, best_value, is_best


def losses(*values: float) -> list[dict[str, Any]]:
    """A record every fifth step with a loss, and one without in between."""
    records: list[dict[str, Any]] = []
    for number, value in enumerate(values):
        records += [{"step": 5 * number, "eval/loss": value}, {"step": 5 * number + 1, "train/loss": 0.0}]
    return records


@pytest.mark.parametrize(
    ("records", "best"),
    [
        (losses(3.0, 1.0, 2.0), BestValue(5, "eval/loss", 1.0)),
        (losses(3.0, 1.0, 1.0), BestValue(5, "eval/loss", 1.0)),  # a tie: the earlier
        (losses(1.0, 1.0, 1.0), BestValue(0, "eval/loss", 1.0)),
        (losses(math.nan, 2.0, math.inf), BestValue(5, "eval/loss", 2.0)),  # NaN is never better
        ([{"step": 0, "train/loss": 1.0}], None),  # never evaluated
        ([], None),
        (
            [{"step": 0, "eval/reward": 0.2}, {"step": 4, "eval/reward": 0.7}, {"step": 8, "eval/reward": 0.7}],
            BestValue(4, "eval/reward", 0.7),  # a higher reward is better, and a tie is decided alike
        ),
        (
            [{"step": 0, "eval/reward": 0.2, "eval/loss": 1.0}, {"step": 4, "eval/reward": 0.1, "eval/loss": 0.5}],
            BestValue(0, "eval/reward", 0.2),  # the reward decides where both are logged
        ),
    ],
)
def test_best_value(records: list[dict[str, Any]], best: BestValue | None) -> None:
    assert best_value(records) == best


@pytest.mark.parametrize(
    ("loss", "is_better"),
    [(0.9, True), (1.0, False), (1.1, False), (math.nan, False)],  # equal is not better: the earlier weights stay
)
def test_weights_are_replaced_only_by_better_ones(loss: float, is_better: bool) -> None:
    assert is_best(10, {"eval/loss": loss}, losses(3.0, 1.0)) is is_better


def test_the_first_evaluation_is_the_best_so_far() -> None:
    assert is_best(0, {"eval/loss": 9.0}, [])


def test_without_a_held_out_value_nothing_is_best() -> None:
    assert not is_best(3, {"train/loss": 0.1}, [])
