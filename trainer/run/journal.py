"""The journal of rollouts: a file per chunk, written whole or not at all, replayed whole or not at all. No torch."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from trainer.files import make_directory, write_atomically
from trainer.run.directory import RunDir
from trainer.types import Group, Rollout, Row

FORMAT: Final = 1


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
        header: what a replay must find equal; its `rows` are the indices of the groups' rows.
        groups: the chunk's groups, scored.
        advantages: of each rollout, for people; a replay computes them again.
    """
    lines = [json.dumps({"format": FORMAT, **header})]
    for group, of_group in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, of_group, strict=True):
            record = {"row": group.row.index, "where": str(group.row), "advantage": advantage, **rollout.__dict__}
            record["trained"] = "".join("1" if flag else "0" for flag in rollout.trained)
            lines.append(_line(record))
    lines.append(json.dumps({"end": len(lines) - 1}))
    file = run.journal_chunk(step, number)
    make_directory(file.parent)
    write_atomically(file, "\n".join(lines) + "\n")


def note_begun(run: RunDir, step: int, number: int) -> None:
    """Note that a chunk is about to be sampled; one that is noted twice was paid for twice (`count_sampled`)."""
    make_directory(run.rollouts)
    with run.begun_file.open("a") as file:
        file.write(json.dumps({"step": step, "chunk": number}) + "\n")


def count_sampled(run: RunDir) -> tuple[int, int]:
    """Tokens in the journal, and tokens of chunks that were sampled more than once, each further time counted.

    A chunk that was interrupted counts whole, so the second number is an upper bound.
    """
    begun: Counter[tuple[int, int]] = Counter()
    with suppress(FileNotFoundError):
        for line in run.begun_file.read_text().splitlines():
            with suppress(ValueError, KeyError):  # cut off by a kill
                record = json.loads(line)
                begun[record["step"], record["chunk"]] += 1
    total = twice = 0
    for (step, number), times in begun.items():
        records = _whole(run.journal_chunk(step, number))
        tokens = sum(record["trained"].count("1") for record in records[1:-1]) if records else 0
        total += tokens
        twice += tokens * (times - 1)
    return total, twice


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
    records = _whole(run.journal_chunk(step, number))
    if records is None or records[0] != json.loads(json.dumps({"format": FORMAT, **header})):
        return None
    found = _by_group(records)
    if [of_group[0]["row"] for of_group in found] != [row.index for row in rows]:
        return None
    return [Group(row, tuple(map(_rollout, of_group))) for row, of_group in zip(rows, found, strict=True)]


def read_step(run: RunDir, step: int) -> list[list[dict[str, Any]]]:
    """The rollout records of each group of a step, for people; empty where there is none."""
    chunks = [_whole(file) for file in run.journal_chunks(step)]
    return [of_group for records in chunks if records is not None for of_group in _by_group(records)]


def set_aside(run: RunDir, step: int) -> Path:
    """Move a step's chunks out of the way of a replay; returns where to."""
    directory = run.journal(step)
    aside = directory.with_name(f"refused-{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    return aside


def _line(record: Mapping[str, Any]) -> str:
    """JSON that people can read; half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _whole(file: Path) -> list[dict[str, Any]] | None:
    """The records of a chunk, header first and end last; None where it is missing or cut off."""
    try:
        # not splitlines(): texts hold U+2028 and the like, which are no ends of lines in JSON
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    except (FileNotFoundError, ValueError):
        return None
    return records if len(records) > 1 and records[-1] == {"end": len(records) - 2} else None


def _by_group(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rollout records group by group; a row may have several groups, all groups of a chunk are of one size."""
    header, *rollouts, _end = records
    size = len(rollouts) // len(header["rows"])
    return [rollouts[begin : begin + size] for begin in range(0, len(rollouts), size)]


def _rollout(record: dict[str, Any]) -> Rollout:
    fields = {name: value for name, value in record.items() if name not in {"row", "where", "advantage"}}
    fields["token_ids"] = tuple(record["token_ids"])
    fields["trained"] = tuple(flag == "1" for flag in record["trained"])
    fields["sampler_logprobs"] = tuple(record["sampler_logprobs"])
    return Rollout(**fields)
