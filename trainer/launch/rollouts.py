"""`trainer rollouts`: prompts, completions, rewards and advantages of a step, best and worst first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trainer.errors import LaunchError
from trainer.journal import read_step
from trainer.launch.status import find_run
from trainer.run import RunDir

WIDTH = 100


def rollouts(arguments: argparse.Namespace) -> int:
    """Print a step's rollouts."""
    run = find_run(arguments.target)
    steps = sorted(int(entry.name.removeprefix("step-")) + 1 for entry in run.rollouts.glob("step-*"))
    if not steps:
        raise LaunchError(f"{run.root}: has no rollouts; only rft runs do, after their first chunk")
    step = arguments.step if arguments.step is not None else steps[-1]
    if step not in steps:
        raise LaunchError(f"{run.root}: no rollouts of step {step}; there are {steps[0]} to {steps[-1]}")
    groups = _groups(run, step)
    if arguments.json:
        sys.stdout.write(json.dumps({"run": str(run.root), "step": step, "groups": groups}, ensure_ascii=False) + "\n")
        return 0
    sys.stdout.write(f"{run.root}, step {step}: {len(groups)} prompts\n")
    for group in groups[: arguments.groups]:
        _show(group)
    if len(groups) > arguments.groups:
        sys.stdout.write(f"\n{len(groups) - arguments.groups} more prompts: --groups {len(groups)}\n")
    return 0


def _groups(run: RunDir, step: int) -> list[dict[str, Any]]:
    """Groups with the widest spread of rewards first, each with its best rollouts first."""
    by_row: dict[int, list[dict[str, Any]]] = {}
    for record in read_step(run, step - 1):
        by_row.setdefault(record["row"], []).append(record)
    plan = run.read_plan()
    prompts = _prompts(plan.recipe.data.train.path)
    groups = []
    for row, records in by_row.items():
        records.sort(key=lambda record: -(record["reward"] if record["reward"] is not None else float("-inf")))
        scored = [record["reward"] for record in records if record["reward"] is not None]
        kept = ("text", "reward", "rewards", "advantage", "finish_reason", "failure")
        groups.append(
            {
                "row": row,
                "where": records[0]["where"],
                "prompt": prompts.get(row, ""),
                "spread": max(scored) - min(scored) if scored else 0.0,
                "rollouts": [
                    {name: record[name] for name in kept} | {"tokens": record["trained"].count("1")}
                    for record in records
                ],
            }
        )
    return sorted(groups, key=lambda group: (-group["spread"], group["row"]))


def _prompts(path: str | None) -> dict[int, str]:
    """The last user turn of each row, where the file is still there."""
    if path is None or not Path(path).is_file():
        return {}
    with Path(path).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {
        index: str(row["messages"][-1]["content"] if "messages" in row else row.get("prompt", ""))
        for index, row in enumerate(rows)
    }


def _show(group: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{group['where']}  {' '.join(group['prompt'].split())[:WIDTH]}\n")
    for rollout in group["rollouts"]:
        reward = f"{rollout['reward']:6.3f}" if rollout["reward"] is not None else "failed"
        advantage = f"{rollout['advantage']:+6.2f}" if rollout["advantage"] is not None else "      "
        cut = " ..." if rollout["finish_reason"] == "length" else ""
        text = " ".join(rollout["text"].split())
        sys.stdout.write(f"  {reward} {advantage} {rollout['tokens']:4d}  {text[:WIDTH]}{cut}\n")
        if rollout["failure"]:
            sys.stdout.write(f"         {rollout['failure'].strip().splitlines()[-1][:WIDTH]}\n")
