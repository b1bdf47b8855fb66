"""The metrics of a run as columns, of bounded length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from trainer.run.metrics_reader import Record

MAX_POINTS: Final = 1000
"""Points of a curve; more steps are averaged."""
SIGNIFICANT: Final = 6
"""Digits of a value."""
HELD_OUT: Final = "eval/"
Column = list[float | None]


@final
@dataclass(frozen=True)
class Points:
    """Values by metric at some steps; None where a step has no value, or none that is finite."""

    steps: list[int]
    times: Column
    """Seconds since the run began."""
    values: dict[str, Column]


@final
@dataclass(frozen=True)
class Curves:
    """What metrics.jsonl says, as columns."""

    train: Points
    low: dict[str, Column]
    """Smallest value of the steps behind each point; empty where a point is one step."""
    high: dict[str, Column]
    held_out: Points
    """Each evaluation, never averaged."""
    steps_per_point: int
    """Steps that each point is the mean of; 1 where every step has its point."""
    num_steps: int
    not_finite: dict[str, int]
    """Number of values of a metric that are NaN or infinite, which a curve cannot show."""


def read_curves(records: Sequence[Record], began: float) -> Curves:
    """Turn records into columns.

    Args:
        records: of metrics.jsonl.
        began: when the run began, in seconds since 1970.
    """
    trained = [record for record in records if any(_is_trained(name, record[name]) for name in record)]
    evaluated = [record for record in records if any(name.startswith(HELD_OUT) for name in record)]
    per_point = max(1, math.ceil(len(trained) / MAX_POINTS))
    bins = [trained[begin : begin + per_point] for begin in range(0, len(trained), per_point)]
    names = sorted({name for record in trained for name in record if _is_trained(name, record[name])})
    held_out_names = sorted({name for record in evaluated for name in record if name.startswith(HELD_OUT)})
    return Curves(
        train=Points(
            steps=[records[-1]["step"] for records in bins],
            times=[_elapsed(records[-1], began) for records in bins],
            values={name: [_mean(records, name) for records in bins] for name in names},
        ),
        low=_extremes(bins, names, min) if per_point > 1 else {},
        high=_extremes(bins, names, max) if per_point > 1 else {},
        held_out=Points(
            steps=[record["step"] for record in evaluated],
            times=[_elapsed(record, began) for record in evaluated],
            values={name: [_mean([record], name) for record in evaluated] for name in held_out_names},
        ),
        steps_per_point=per_point,
        num_steps=len(trained),
        not_finite=_not_finite(records),
    )


def _is_trained(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and name not in {"step", "time"} and not name.startswith(HELD_OUT)


def _elapsed(record: Record, began: float) -> float | None:
    moment = record.get("time")
    return round(moment - began, 1) if isinstance(moment, int | float) else None


def _finite(records: Sequence[Record], name: str) -> list[float]:
    values = (record.get(name) for record in records)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = _finite(records, name)
    return rounded(math.fsum(values) / len(values)) if values else None


def _extremes(bins: Sequence[Sequence[Record]], names: Sequence[str], choose: Any) -> dict[str, Column]:
    columns = {name: [_finite(records, name) for records in bins] for name in names}
    return {
        name: [rounded(choose(values)) if values else None for values in column] for name, column in columns.items()
    }


def _not_finite(records: Sequence[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                counts[name] = counts.get(name, 0) + 1
    return counts


def rounded(value: float) -> float:
    """The value with few digits, so that the page is small.

    >>> rounded(0.123456789), rounded(1234567.8)
    (0.123457, 1234570.0)
    """
    return float(f"{value:.{SIGNIFICANT}g}")
