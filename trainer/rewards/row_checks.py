"""Refuses rows that a built-in reward could not score, before anything is sampled."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from trainer.errors import RewardError
from trainer.types import Row

CHECKED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "last_number": "trainer.rewards.builtin.last_number",
        "exact_match": "trainer.rewards.builtin.text",
        "json_schema": "trainer.rewards.builtin.structured",
        "code_tests": "trainer.rewards.builtin.code_tests",
    }
)
"""Built-in rewards whose module has a `check_row(row, **args)` that needs no completion."""
MAX_SHOWN: Final = 5


class Spec(Protocol):
    """A reward as the recipe names it."""

    @property
    def use(self) -> str:
        """The built-in's name, or a function's place."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


def refuse_unscorable_rows(specs: Sequence[Spec], rows: Iterable[Row]) -> None:
    """Check every row with every built-in reward that can judge a row alone.

    Args:
        specs: the recipe's rewards; functions of users are not asked.
        rows: training or held-out rows.

    Raises:
        RewardError: names the first rows that have no usable answer, and why.
    """
    checks = [(spec, importlib.import_module(CHECKED[spec.use]).check_row) for spec in specs if spec.use in CHECKED]
    problems = [problem for row in rows for spec, check in checks if (problem := _problem(check, row, spec))]
    if problems:
        more = f"\nand {len(problems) - MAX_SHOWN:,} more" if len(problems) > MAX_SHOWN else ""
        raise RewardError("\n".join(problems[:MAX_SHOWN]) + more)


def _problem(check: Any, row: Row, spec: Spec) -> str | None:
    try:
        check(row, **spec.args)
    except KeyError as error:
        return f"{row}: no field {error}, which the reward {spec.use} reads (the row has: {', '.join(row)})"
    except ValueError as error:
        return str(error)
    return None
