"""Names of the directories of steps; for run/directory.py and the mirror."""

from __future__ import annotations

from pathlib import Path


def step_name(step: int) -> str:
    """Name of a step's directory.

    >>> step_name(20)
    'step-000020'
    """
    return f"step-{step:06d}"


def step_number(name: str) -> int | None:
    """The step of a directory; None for any other name.

    >>> step_number("step-000020"), step_number("step-000020.broken-1")
    (20, None)
    """
    digits = name.removeprefix("step-")
    return int(digits) if digits != name and digits.isdigit() else None


def steps_in(directory: Path, prefix: str = "") -> list[int]:
    """Steps that a directory has directories of, ascending.

    Args:
        directory: may be missing.
        prefix: in front of each name.
    """
    entries = (entry.name for entry in directory.glob("*/") if entry.name.startswith(prefix))
    numbers = (step_number(name.removeprefix(prefix)) for name in entries)
    return sorted(number for number in numbers if number is not None)


def step_files_in(directory: Path) -> list[int]:
    """Steps that a directory has a file of JSON lines for, ascending."""
    numbers = (step_number(file.stem) for file in directory.glob("*.jsonl"))
    return sorted(number for number in numbers if number is not None)
