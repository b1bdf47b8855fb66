"""The journal of rollouts: a file per chunk, written whole or not at all, replayed whole or not at all. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.run import RunDir, write_atomically
from trainer.types import Group, Rollout, Row

FORMAT = 1


def write_chunk(
    run: RunDir,
    step: int,
    number: int,
    header: Mapping[str, Any],
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float | None]],
) -> None:
    """Write one chunk.

    Args:
        run: the run directory.
        step: the step that the rollouts are trained on next, from 0.
        number: of the chunk in its step.
        header: what a replay must find equal.
        groups: the chunk's groups, scored.
        advantages: of each rollout, for people; a replay computes them again.
    """
    lines = [json.dumps({"format": FORMAT, **header})]
    for group, of_group in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, of_group, strict=True):
            record = {"row": group.row.index, "where": str(group.row), "advantage": advantage, **rollout.__dict__}
            record["trained"] = "".join("1" if flag else "0" for flag in rollout.trained)
            lines.append(json.dumps(record, ensure_ascii=False))
    lines.append(json.dumps({"end": len(lines) - 1}))
    file = run.journal_chunk(step, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "\n".join(lines) + "\n")


def read_chunk(
    run: RunDir, step: int, number: int, header: Mapping[str, Any], rows: Sequence[Row]
) -> list[Group] | None:
    """Read one chunk back; None where it is missing, cut off, or of other rows, ranks or weights.

    Args:
        run: the run directory.
        step: the step.
        number: of the chunk in its step.
        header: as it was written with.
        rows: the chunk's rows, in order.
    """
    try:
        records = [
            json.loads(line) for line in run.journal_chunk(step, number).read_text(encoding="utf-8").splitlines()
        ]
    except (FileNotFoundError, ValueError):
        return None
    if len(records) < 2 or records[0] != json.loads(json.dumps({"format": FORMAT, **header})):
        return None
    if records[-1] != {"end": len(records) - 2}:
        return None
    rollouts: dict[int, list[Rollout]] = {row.index: [] for row in rows}
    for record in records[1:-1]:
        index = record.pop("row")
        del record["where"], record["advantage"]
        if index not in rollouts:
            return None
        rollouts[index].append(_rollout(record))
    return [Group(row, tuple(rollouts[row.index])) for row in rows]


def read_step(run: RunDir, step: int) -> list[dict[str, Any]]:
    """Every rollout record of a step, for people; empty where there is none."""
    found = []
    for file in sorted(run.journal(step).glob("chunk-*.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found += records[1:-1]
    return found


def _rollout(record: dict[str, Any]) -> Rollout:
    record["token_ids"] = tuple(record["token_ids"])
    record["trained"] = tuple(flag == "1" for flag in record["trained"])
    record["sampler_logprobs"] = tuple(record["sampler_logprobs"])
    return Rollout(**record)
