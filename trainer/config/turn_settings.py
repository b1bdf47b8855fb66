"""Contradictions in the settings of rollouts with several turns."""

from __future__ import annotations

from pathlib import Path

from trainer.config.finding import Finding
from trainer.config.recipe import RFTRecipe
from trainer.config.reward_place import importable
from trainer.config.rft_sections import RolloutSettings

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
    if rollout.environment is not None:
        findings += _place(("rollout", "environment"), rollout.environment, recipe_dir, "environment", "class")
    for index, tool in enumerate(rollout.tools):
        findings += _place(("rollout", "tools", index), tool, recipe_dir, "tool", "function")
    limit = recipe.data.max_seq_tokens
    if rollout.max_tokens is not None and rollout.max_tokens > limit:
        text = f"more than data.max_seq_tokens ({limit:,}), which bounds the memory of a step; raise that"
        findings.append(Finding(("rollout", "max_tokens"), text))
    if rollout.deterministic and rollout.max_time_s is not None:
        findings.append(Finding(("rollout", "max_time_s"), "contradicts `deterministic: true`: it depends on timing"))
    return findings


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
