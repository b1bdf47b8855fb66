"""Find a reward by name without importing it.

`trainer check` must finish in under a second, and a reward may import torch. So reward files are only parsed, and
modules are only located.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Final, final

from trainer.errors import RewardError

BUILT_IN: Final[Mapping[str, str]] = {
    "last_number": "trainer.rewards.builtin.last_number:last_number",
    "exact_match": "trainer.rewards.builtin.text:exact_match",
    "regex_match": "trainer.rewards.builtin.text:regex_match",
    "json_schema": "trainer.rewards.builtin.structured:json_schema",
    "math_verify": "trainer.rewards.builtin.mathematics:math_verify",
    "soft_overlong": "trainer.rewards.builtin.length:soft_overlong",
    "code_tests": "trainer.rewards.builtin.code_tests:code_tests",
    "llm_judge": "trainer.rewards.judges.llm_judge:LLMJudge",
    "http_reward": "trainer.rewards.judges.http_reward:HTTPReward",
}
"""Built-in rewards: the name in a recipe, and where the function is defined."""
JUDGE_NAMES: Final = ("llm_judge", "http_reward")
"""Built-in rewards that a server computes; they are no functions and run in no reward worker."""
WHERE_ONLY: Final = (
    "url",
    "timeout_s",
    "num_retries",
    "on_outage",
    "max_wait_s",
    "concurrency",
    "cache",
    "api_key_env",
    "use_proxies",
    "response_format",
    "num_repairs",
)
"""Arguments of `llm_judge` that say where and how it is asked, not what: a resumed run may change them."""


@final
@dataclass(frozen=True)
class Place:
    """Where a reward function is defined: in an installed module, or in a file of the user."""

    module: str
    function: str
    file: Path | None = None

    def __str__(self) -> str:
        return str(self.file or self.module)


def locate(use: str, base_dir: Path) -> Place:
    """Split the name of a reward into its location and function; neither needs to exist.

    >>> locate("last_number", Path()).module
    'trainer.rewards.builtin.last_number'
    >>> str(locate("mine.py:score", Path("recipes")))
    'recipes/mine.py'
    """
    name = BUILT_IN.get(use, use)
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        near = difflib.get_close_matches(use, BUILT_IN, n=1, cutoff=0.5)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        raise RewardError(
            f"reward {use}: no built-in reward of this name{meant}\n"
            f"Use one of {', '.join(BUILT_IN)}; or name your own as `module:function` or `file.py:function`."
        )
    if place.endswith(".py"):
        return Place(f"reward_file_{Path(place).stem}", function, base_dir / place)
    return Place(place, function)


def importable(use: str, base_dir: Path) -> str | None:
    """Return the problem with a reward's name, or None; imports nothing.

    Functions that a module defines dynamically cannot be detected, so in doubt there is no problem.

    >>> importable("exact_match", Path())
    >>> importable("exact_mach", Path()).splitlines()[0]
    'reward exact_mach: no built-in reward of this name; did you mean `exact_match`?'
    """
    try:
        place = locate(use, base_dir)
    except RewardError as error:
        return str(error)
    if use in BUILT_IN:
        return None
    if place.file is not None:
        return _file_mistake(use, place.file, place.function)
    spec = _find_module(place.module, base_dir)
    if spec is None:
        remedy = f"install it, or put it beside the recipe in {base_dir}"
        return f"reward {use}: no module `{place.module}` is installed; {remedy}"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    source = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    if place.function in source or "__getattr__" in source or "import *" in source:
        return None
    return f"reward {use}: {spec.origin} has no function `{place.function}`"


def source_of_reward(use: str, base_dir: Path) -> Path | None:
    """Return the source file of a reward that is not built in; None if it has none that can be found.

    Args:
        use: `file.py:function` or `module:function`.
        base_dir: directory of the recipe.
    """
    if use in BUILT_IN:
        return None
    place = locate(use, base_dir)
    if place.file is not None:
        return place.file
    spec = _find_module(place.module, base_dir)
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.has_location else None


def _file_mistake(use: str, file: Path, function: str) -> str | None:
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [each.name for each in file.parent.glob("*.py")], n=1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        return f"reward {use}: no file {file}{meant}"
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except SyntaxError as error:
        return f"{file}:{error.lineno}: {error.msg} (reward {use})"
    except ValueError as error:
        return f"{file}: {error} (reward {use})"
    names = _names(tree)
    if function in names or "*" in names:
        return None
    near = difflib.get_close_matches(function, names, n=1)
    meant = f"; did you mean `{near[0]}`?" if near else ""
    return f"reward {use}: {file} has no function `{function}`{meant}"


def _names(tree: ast.Module) -> set[str]:
    """Return every name that the module may bind, including inside `if` and `try`."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # names bound inside belong to another scope
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return names


def _find_module(name: str, base_dir: Path) -> ModuleSpec | None:
    """Find a module as `importlib.util.find_spec` does, but without importing its parent packages."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(base_dir)])
    except ValueError:  # `__main__` and other modules without a spec
        return None
    path = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, spec.submodule_search_locations)
    return spec
