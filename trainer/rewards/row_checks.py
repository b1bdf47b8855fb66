"""Refuses rows that a built-in reward could not score, before anything is sampled."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from trainer.errors import RewardError
from trainer.rewards.choice import RewardChoice
from trainer.types import MissingFieldError, Row

CHECKED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "last_number": "trainer.rewards.builtin.last_number",
        "exact_match": "trainer.rewards.builtin.text",
        "json_schema": "trainer.rewards.builtin.structured",
        "code_tests": "trainer.rewards.builtin.code_tests",
        "llm_judge": "trainer.rewards.judges.question",
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

    @property
    def name(self) -> str:
        """By which rows choose it."""

    @property
    def every_row(self) -> bool:
        """Whether it judges every row, whatever the row chooses."""


def refuse_unscorable_rows(specs: Sequence[Spec], rows: Iterable[Row], column: str | None = None) -> None:
    """Check every row with every built-in reward that can judge a row alone.

    Args:
        specs: the recipe's rewards; functions of users are not asked.
        rows: training or held-out rows.
        column: field of the rows that names the rewards which judge it; None for all.

    Raises:
        RewardError: names the first rows that have no usable answer, and why.
    """
    checks = {
        index: importlib.import_module(CHECKED[spec.use]).check_row
        for index, spec in enumerate(specs)
        if spec.use in CHECKED
    }
    choice = RewardChoice(column, specs)
    problems = [problem for row in rows for problem in _problems(row, specs, choice, checks)]
    if problems:
        more = f"\nand {len(problems) - MAX_SHOWN:,} more" if len(problems) > MAX_SHOWN else ""
        raise RewardError("\n".join(problems[:MAX_SHOWN]) + more)


def _problems(row: Row, specs: Sequence[Spec], choice: RewardChoice, checks: Mapping[int, Any]) -> list[str]:
    try:
        chosen = choice.of_row(row)
    except RewardError as error:
        return [str(error)]
    found = (_problem(checks[index], row, specs[index]) for index in chosen if index in checks)
    return [problem for problem in found if problem is not None]


def _problem(check: Any, row: Row, spec: Spec) -> str | None:
    try:
        check(row, **spec.args)
    except MissingFieldError as error:
        return f"{row}: {error}, which the reward {spec.use} reads"
    except KeyError as error:
        return f"{row}: no field {error}, which the reward {spec.use} reads (the row has: {', '.join(row)})"
    except ValueError as error:
        return str(error)
    return None
