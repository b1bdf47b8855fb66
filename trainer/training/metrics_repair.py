"""Finds damage in metrics.jsonl when an attempt begins, and rebuilds what journal and checkpoints still know."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.checkpoints.manifest import MANIFEST, Manifest
from trainer.run.directory import RunDir
from trainer.run.journal import read_step
from trainer.run.metrics_reader import Record

REBUILT: Final = "rebuilt"
"""Field of a record that is not the original one."""


@final
@dataclass(frozen=True)
class Damage:
    """What is wrong with metrics.jsonl, for example `Damage(lines=(4, 5), steps=(3,))`."""

    lines: tuple[int, ...]
    """Numbers from 1 of lines that are no records."""
    steps: tuple[int, ...]
    """Steps without a record."""

    def __str__(self) -> str:
        damaged = f"damaged lines: {ranges(self.lines)}" if self.lines else ""
        missing = f"steps without a record: {ranges(self.steps)}" if self.steps else ""
        return "; ".join(part for part in (damaged, missing) if part)


def find_damage(run: RunDir, step: int) -> Damage | None:
    """Damage before the end of a step; None if every step has its record.

    Args:
        run: whose metrics.jsonl is read.
        step: the last one that must have a record.
    """
    try:
        lines = run.metrics_file.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = [b""]
    # What follows the last line end is no damage: a kill may cut a record that is being written.
    damaged = tuple(number for number, line in enumerate(lines[:-1], start=1) if not _is_record(line))
    logged = {record["step"] for record in run.read_metrics()}
    missing = tuple(number for number in range(1, step + 1) if number not in logged)
    return Damage(damaged, missing) if damaged or missing else None


def quarantine(run: RunDir) -> Path | None:
    """Keep a copy of the damaged file as metrics.jsonl.broken-N; None where there is no file."""
    file, number = run.metrics_file, 1
    if not file.exists():
        return None
    while (copy := file.with_name(f"{file.name}.broken-{number}")).exists():
        number += 1
    shutil.copyfile(file, copy)
    return copy


def rebuilt_records(run: RunDir, steps: Iterable[int], time: float) -> list[Record]:
    """Records of steps that have none: what the journal of rollouts, held-out answers and checkpoints say.

    Args:
        run: the run directory.
        steps: from 1.
        time: of the records, in seconds since 1970.
    """
    return [
        {
            "step": step,
            "time": time,
            **_of_journal(run, step),
            **_held_out(run, step),
            **_counters(run, step),
            REBUILT: 1,
        }
        for step in steps
    ]


def _of_journal(run: RunDir, step: int) -> dict[str, float]:
    """The rollout/ values of a step; empty for sft. The journal counts steps from 0."""
    rollouts = [rollout for group in read_step(run, step - 1) for rollout in group.rollouts]
    rewards = [rollout["reward"] for rollout in rollouts if rollout["reward"] is not None]
    if not rollouts:
        return {}
    return {
        **({"rollout/reward": math.fsum(rewards) / len(rewards)} if rewards else {}),
        "rollout/completion_tokens": sum(rollout["trained"].count("1") for rollout in rollouts) / len(rollouts),
        "rollout/truncated_frac": sum(rollout["finish_reason"] == "length" for rollout in rollouts) / len(rollouts),
    }


def _held_out(run: RunDir, step: int) -> dict[str, float]:
    """The mean held-out reward, if the step was evaluated."""
    try:
        lines = run.evaluation(step).read_text(encoding="utf-8").split("\n")[:-1]
        rewards = [answer["reward"] for line in lines for answer in json.loads(line)["answers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"eval/reward": math.fsum(reward or 0.0 for reward in rewards) / len(rewards)} if rewards else {}


def _counters(run: RunDir, step: int) -> dict[str, float]:
    """The number of updates, if the step was saved."""
    with suppress(OSError, ValueError):
        manifest = Manifest.parse((run.checkpoint(step) / MANIFEST).read_bytes())
        return {f"train/{name}": value for name, value in manifest.counters.items()}
    return {}


def _is_record(line: bytes) -> bool:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int)


def ranges(numbers: Sequence[int]) -> str:
    """Numbers for people.

    >>> ranges([3, 4, 5, 9])
    '3-5, 9'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
