"""`trainer rollouts`: prompts, completions, rewards and advantages of a step."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from trainer.config.recipe import DataSettings
from trainer.data.forms import row_messages
from trainer.data.sources import read_rows
from trainer.errors import DataError, LaunchError
from trainer.run.directory import RunDir
from trainer.run.find import find_run
from trainer.run.journal import read_step

WIDTH: Final = 100
"""Characters of a completion that are shown."""


def rollouts(arguments: argparse.Namespace) -> int:
    """Print the rollouts of a step."""
    run = find_run(arguments.target)
    steps = [step + 1 for step in run.journal_steps()]  # rollouts of step k are trained on in step k + 1
    if not steps:
        raise LaunchError(f"{run.root}: has no rollouts. Only rft runs have them, after their first chunk")
    step = arguments.step if arguments.step is not None else steps[-1]
    if step not in steps:
        raise LaunchError(f"{run.root}: no rollouts of step {step}; there are {steps[0]} to {steps[-1]}")
    groups = _groups(run, step)
    if arguments.json:
        sys.stdout.write(json.dumps({"run": str(run.root), "step": step, "groups": groups}) + "\n")
        return 0
    sys.stdout.write(f"{run.root}, step {step}: {len(groups)} prompts\n")
    for group in groups[: arguments.groups]:
        _show(group)
    if len(groups) > arguments.groups:
        sys.stdout.write(f"\n{len(groups) - arguments.groups} more prompts: --groups {len(groups)}\n")
    return 0


def _groups(run: RunDir, step: int) -> list[dict[str, Any]]:
    """Groups by falling spread of rewards, each with its rollouts by falling reward."""
    prompts = _prompts(run.read_plan().recipe.data)
    groups = []
    for records in read_step(run, step - 1):
        records.sort(key=lambda record: -(record["reward"] if record["reward"] is not None else float("-inf")))
        scored = [record["reward"] for record in records if record["reward"] is not None]
        fields = ("text", "reward", "rewards", "advantage", "finish_reason", "failure")
        groups.append(
            {
                "row": records[0]["row"],
                "where": records[0]["where"],
                "prompt": prompts.get(records[0]["row"], ""),
                "spread": max(scored) - min(scored) if scored else 0.0,
                "rollouts": [
                    {name: record[name] for name in fields} | {"tokens": record["trained"].count("1")}
                    for record in records
                ],
            }
        )
    return sorted(groups, key=lambda group: (-group["spread"], group["row"]))


def _prompts(data: DataSettings) -> dict[int, str]:
    """The last turn of each row's prompt by row index; empty where the rows cannot be read any more."""
    if data.train.path is None or not Path(data.train.path).is_file():
        return {}
    try:
        rows = read_rows(data.train, data)
        return {row.index: row_messages(row, data, with_completion=False)[-1]["content"] for row in rows}
    except DataError:
        return {}


def _show(group: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{group['where']}  {_plain(group['prompt'])}\n")
    for rollout in group["rollouts"]:
        reward = f"{rollout['reward']:6.3f}" if rollout["reward"] is not None else "failed"
        advantage = f"{rollout['advantage']:+6.2f}" if rollout["advantage"] is not None else "      "
        ellipsis = " ..." if rollout["finish_reason"] == "length" else ""
        sys.stdout.write(f"  {reward} {advantage} {rollout['tokens']:4d}  {_plain(rollout['text'])}{ellipsis}\n")
        if rollout["failure"]:
            sys.stdout.write(f"         {_plain(rollout['failure'].strip().splitlines()[-1])}\n")


def _plain(text: str) -> str:
    """The text on one line without control characters: a model may write terminal escapes."""
    line = " ".join(text.split())[:WIDTH]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
