"""Imports the recipe's environment class and tool functions, in the environment process only."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from trainer.environments.tools import Tool, tools_of
from trainer.errors import RewardError
from trainer.rewards.contract import load_object


def load_environment(use: str, base_dir: Path) -> type[Any]:
    """The class that `use` names.

    Raises:
        RewardError: it cannot be imported, or has no `reset` and `step`.
    """
    found = load_object(use, base_dir, kind="environment")
    if not inspect.isclass(found):
        raise RewardError(f"environment {use}: is a {type(found).__name__}, not a class")
    environment: type[Any] = found
    for name, wanted in (("reset", ["row"]), ("step", ["turn"])):
        method = getattr(environment, name, None)
        if not callable(method):
            raise RewardError(f"environment {use}: has no method `{name}({', '.join(wanted)})`")
    if "seed" not in inspect.signature(environment.reset).parameters:
        raise RewardError(f"environment {use}: `reset` must take `(row, *, seed)`")
    return environment


def load_tools(uses: list[str], base_dir: Path) -> dict[str, Tool]:
    """The recipe's tools by name.

    Raises:
        RewardError: one cannot be imported or described.
    """
    functions = []
    for use in uses:
        function = load_object(use, base_dir, kind="tool")
        if not callable(function):
            raise RewardError(f"tool {use}: is a {type(function).__name__}, not a function")
        functions.append(function)
    return tools_of(functions)
