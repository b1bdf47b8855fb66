"""Contradictions in the settings of rollouts with several turns."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from trainer.config.finding import Finding
from trainer.config.recipe import RFTRecipe
from trainer.config.reward_place import importable
from trainer.config.rft_sections import McpTools, RolloutSettings, VerifiersEnvironment

ONLY_WITH_TURNS = ("max_turns", "max_tokens", "max_time_s", "tool_errors", "environment_limits", "deterministic")


def turn_findings(recipe: RFTRecipe, recipe_dir: Path) -> list[Finding]:
    """Return the contradictions around `rollout.environment` and `rollout.tools`.

    Args:
        recipe: The recipe.
        recipe_dir: Its directory; `file.py:Class` is relative to it.
    """
    rollout = recipe.rollout
    if not rollout.has_turns:
        unset = RolloutSettings()
        names = [name for name in ONLY_WITH_TURNS if getattr(rollout, name) != getattr(unset, name)]
        text = "has no effect without `rollout.environment` or `rollout.tools`"
        return [Finding(("rollout", name), text) for name in names]
    findings = []
    if isinstance(rollout.environment, VerifiersEnvironment):
        findings += _verifiers(rollout, rollout.environment)
    elif rollout.environment is not None:
        findings += _place(("rollout", "environment"), rollout.environment, recipe_dir, "environment", "class")
    for index, tool in enumerate(rollout.tools):
        path = ("rollout", "tools", index)
        if isinstance(tool, McpTools):
            findings += _server((*path, "mcp"), tool, recipe_dir)
        else:
            findings += _place(path, tool, recipe_dir, "tool", "function")
    limit = recipe.data.max_seq_tokens
    if rollout.max_tokens is not None and rollout.max_tokens > limit:
        text = f"more than data.max_seq_tokens ({limit:,}), which bounds the memory of a step; raise that"
        findings.append(Finding(("rollout", "max_tokens"), text))
    if rollout.deterministic and rollout.max_time_s is not None:
        findings.append(Finding(("rollout", "max_time_s"), "contradicts `deterministic: true`: it depends on timing"))
    return findings


def _verifiers(rollout: RolloutSettings, environment: VerifiersEnvironment) -> list[Finding]:
    findings = []
    if shutil.which(environment.python) is None:
        text = f"{environment.python} is no interpreter; make one with `python -m venv verifiers-venv`"
        findings.append(Finding(("rollout", "environment", "python"), text))
    if rollout.tools:
        text = "a taskset of verifiers has tools of its own, and none beside them"
        findings.append(Finding(("rollout", "tools"), text))
    return findings


def _server(path: tuple[str | int, ...], tool: McpTools, recipe_dir: Path) -> list[Finding]:
    """Whether the server's command can be run here; it is not run."""
    try:
        command = tool.command
    except ValueError as error:
        return [Finding(path, f"{tool.mcp!r} cannot be split into words: {error}")]
    if not command:
        return [Finding(path, "is empty; name the command that starts the server, such as `python server.py`")]
    if find_spec("mcp") is None:
        return [Finding(path, 'the package `mcp` is not installed; pip install "tunesmith[mcp]"')]
    places = os.pathsep.join([str(recipe_dir), tool.env.get("PATH", os.environ.get("PATH", os.defpath))])
    program = str(recipe_dir / command[0]) if "/" in command[0] else command[0]
    if shutil.which(program, path=places) is None:
        return [Finding(path, f"there is no program {command[0]!r}, neither in {recipe_dir} nor on the PATH")]
    return [
        Finding(path, f"the server's file {word} is not in {recipe_dir}")
        for word in command[1:]
        if word.endswith((".py", ".js", ".mjs")) and not (recipe_dir / word).is_file()
    ][:1]


def _place(path: tuple[str | int, ...], use: str, recipe_dir: Path, kind: str, what: str) -> list[Finding]:
    problem = importable(use, recipe_dir) if ":" in use else f"name a {what} as `module:{what}` or `file.py:{what}`"
    if problem is None:
        return []
    text = (
        problem.removeprefix(f"reward {use}: ")
        .replace(f"reward {use}", f"{kind} {use}")
        .replace("function `", f"{what} `")
    )
    return [Finding(path, text.replace("\n", " "))]
