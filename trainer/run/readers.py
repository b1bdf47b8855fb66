"""Read and write the small files of a run directory: plan, outcome, heartbeat, excluded and held-out rows, attempts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from trainer.errors import LaunchError
from trainer.files import write_atomically
from trainer.planning.plan import Plan, parse_plan
from trainer.run.state import Outcome


@final
@dataclass(frozen=True)
class Heartbeat:
    """What an attempt was doing when it last gave notice."""

    attempt: int
    step: int
    phase: str
    """For people: `training`, `saving`, ..."""
    time: float
    """Seconds since 1970."""

    def age_s(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return time.time() - self.time


@final
@dataclass(frozen=True)
class HeldOut:
    """Which held-out rows are evaluated; `HeldOut("sha256:9f86...", 40)` if they were replaced at step 40."""

    digest: str
    since_step: int
    """Held-out values of later steps are comparable; -1 if the rows were never replaced."""


def read_plan(file: Path) -> Plan:
    """The frozen plan.

    Raises:
        LaunchError: there is none, or it cannot be read.
    """
    try:
        return parse_plan(file.read_bytes())
    except FileNotFoundError:
        raise LaunchError(f"{file.parent}: no {file.name}, not a run directory") from None
    except ValueError as error:
        raise LaunchError(
            f"{file}: not a plan of this version: {_first_problem(error)}. The file may be cut off. Restore it from a "
            "copy, or train the recipe again with --overwrite, which keeps this directory under another name."
        ) from None


def _first_problem(error: ValueError) -> str:
    """One line: the first of the problems that pydantic lists, or the message."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    return str(error).partition("\n")[0]


def read_outcome(file: Path) -> Outcome | None:
    """How the last attempt ended; None while one runs or before the first.

    Raises:
        LaunchError: the file is damaged.
    """
    try:
        return Outcome(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LaunchError(f"{file}: damaged ({error}). Delete it and run the same command again.") from None


def write_outcome(file: Path, outcome: Outcome) -> None:
    """Write how an attempt ended."""
    write_atomically(file, json.dumps(asdict(outcome)) + "\n")


def read_heartbeat(file: Path) -> Heartbeat | None:
    """The last heartbeat; None before the first, and where it is damaged."""
    try:
        return Heartbeat(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_heartbeat(file: Path, attempt: int, step: int, phase: str) -> None:
    """Write a heartbeat of now."""
    write_atomically(file, json.dumps(asdict(Heartbeat(attempt, step, phase, time.time()))) + "\n", durable=False)


def read_excluded(file: Path) -> frozenset[str]:
    """Source (file:line) of each row that the run leaves out."""
    try:
        return frozenset(json.loads(file.read_text())["rows"])
    except FileNotFoundError:
        return frozenset()


def write_excluded(file: Path, rows: Iterable[str], step: int) -> None:
    """Leave rows out from the newest checkpoint on.

    Args:
        file: where the run keeps them.
        rows: source (file:line) of each.
        step: at which that was decided.
    """
    write_atomically(file, json.dumps({"rows": sorted(rows), "decided_at_step": step}, indent=1))


def read_held_out(file: Path) -> HeldOut | None:
    """Which held-out rows are evaluated; None where nothing readable says so."""
    try:
        return HeldOut(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_held_out(file: Path, held_out: HeldOut) -> None:
    """Write which held-out rows are evaluated."""
    write_atomically(file, json.dumps(asdict(held_out)) + "\n")


def read_attempts(file: Path) -> list[dict[str, Any]]:
    """One record per process start: number, shape, ranks, host, versions, ...; damaged lines are left out."""
    records = []
    with suppress(FileNotFoundError):
        for line in file.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return records


def ended(outcome: Outcome) -> dict[str, Any]:
    """What the record of an attempt gets when it ends: the next attempt deletes outcome.json."""
    return {"ended": {**asdict(outcome), "time": round(time.time(), 3)}}


def note_attempt(file: Path, attempt: int, facts: Mapping[str, Any]) -> None:
    """Add facts to the record of an attempt; all other lines stay as they are.

    Args:
        file: the attempts.jsonl of a run that this process holds.
        attempt: number of the record.
        facts: what to add.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for index, line in enumerate(lines):
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("attempt") == attempt:
                lines[index] = json.dumps(record | dict(facts))
    write_atomically(file, "".join(f"{line}\n" for line in lines))
