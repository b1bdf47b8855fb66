"""Find a run by its name or directory."""

from __future__ import annotations

from pathlib import Path

from trainer.errors import LaunchError
from trainer.run.directory import RunDir


def find_run(target: str) -> RunDir:
    """The run of this directory or name.

    Raises:
        LaunchError: there is none; names those that are.
    """
    for place in (Path(target), Path("runs") / target):
        if (place / "plan.json").is_file():
            return RunDir(place)
    known = sorted(entry.name for entry in Path("runs").glob("*") if (entry / "plan.json").is_file())
    raise LaunchError(f"{target}: no such run. There are: {', '.join(known) or 'none'}")
