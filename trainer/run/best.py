"""Which evaluated step is the best one, decided from the records of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

CRITERIA: Final = (("eval/reward", -1.0), ("eval/loss", 1.0))
"""Metric and sign; the smallest signed value wins. The first metric that a run logs decides."""


@final
@dataclass(frozen=True)
class BestValue:
    """The best held-out value, for example step 40, `eval/loss`, 0.8131."""

    step: int
    name: str
    value: float


def best_value(records: Iterable[Mapping[str, Any]]) -> BestValue | None:
    """Return the best held-out value; of equal values the earliest, and NaN only where there is nothing else.

    >>> best_value([{"step": 0, "eval/loss": 1.5}, {"step": 5, "eval/loss": 0.5}, {"step": 9, "eval/loss": 0.5}])
    BestValue(step=5, name='eval/loss', value=0.5)
    """
    records = list(records)
    for name, sign in CRITERIA:
        evaluated = [(record["step"], record[name]) for record in records if name in record]
        if evaluated:
            step, value = min(evaluated, key=lambda pair: (math.isnan(pair[1]), sign * pair[1], pair[0]))
            return BestValue(step, name, value)
    return None


def is_best(step: int, values: Mapping[str, float], earlier: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a step's held-out values are better than all before it.

    Args:
        step: the step that was just evaluated.
        values: its held-out values.
        earlier: records of the steps before it.
    """
    best = best_value([*earlier, {"step": step, **values}])
    return best is not None and best.step == step
