"""What runs were told: every resolved value of a plan, and where several plans differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from trainer.config.document import dotted, leaves
from trainer.planning.plan import Plan, RFTPlan, resolved_values


@final
@dataclass(frozen=True)
class Setting:
    """A resolved value with its origin, such as `steps`, 50, `recipe.yaml:14`."""

    field: str
    value: Any
    origin: str
    """`default`, or what set the value."""


@final
@dataclass(frozen=True)
class DifferingSetting:
    """A field that has not the same value in all runs."""

    field: str
    values: list[Any]
    """One per run; None where a run does not have the field."""


def flat_settings(plan: Plan) -> dict[str, Any]:
    """Every resolved value by its dotted name, and digests of rows and model: a file may change under its name."""
    values = {name: _in_project(value, plan) for name, value in _resolved(plan).items()}
    digests = {dotted(path): value for path, value in leaves(plan.identity) if path[-1] == "digest"}
    return values | digests | {"steps": plan.steps}


def _in_project(value: Any, plan: Plan) -> Any:
    """An absolute path inside the project by its part there: copies of a project do not differ by it."""
    is_inside = isinstance(value, str) and plan.working_dir and value.startswith(f"{plan.working_dir}/")
    return value[len(plan.working_dir) + 1 :] if is_inside else value


def settings_of(plan: Plan) -> list[Setting]:
    """Every resolved value, in the order of the recipe."""
    return [Setting(name, value, plan.origins.get(name, "default")) for name, value in _resolved(plan).items()]


def differing_settings(plans: Sequence[Plan]) -> list[DifferingSetting]:
    """The fields in which plans differ, by name."""
    flat = [flat_settings(plan) for plan in plans]
    names = sorted(set().union(*flat))
    rows = [DifferingSetting(name, [values.get(name) for values in flat]) for name in names]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def _resolved(plan: Plan) -> dict[str, Any]:
    values = resolved_values(plan.recipe, plan.algorithm if isinstance(plan, RFTPlan) else None)
    return {dotted(path): value for path, value in leaves(values) if path != ("name",)}
