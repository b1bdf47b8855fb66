"""Where a run's relative paths start, also after its project was moved or copied."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trainer.planning.plan import Plan, anchored_plan, moved_plan
from trainer.run.console import tell
from trainer.run.directory import RunDir

RUNS_NAME = "runs"
"""Name of the directory that holds runs, in the working directory of the project."""


@final
@dataclass(frozen=True)
class Place:
    """A project directory, for example `Place(Path("/new/project"), Path("/old/project"), is_copy=True)`."""

    directory: Path
    """Absolute; the run's relative paths start here."""
    moved_from: Path | None = None
    """Where they started when the plan was made, if that is another directory."""
    is_copy: bool = False
    """Whether the run is still there, too."""

    def notice(self, run: RunDir) -> str | None:
        """A line for people; None if the run is where it was."""
        if self.moved_from is None:
            return None
        what = "a copy of the run in" if self.is_copy else "moved from"
        return f"note: {run.root} is {what} {self.moved_from}; its paths now start in {self.directory}"


def place_of(run: RunDir, recorded: str | None) -> Place:
    """Where the run's relative paths start.

    That is the directory that holds runs/<name>; for a run elsewhere, the recorded directory.

    Args:
        run: any run.
        recorded: absolute working directory in which the plan was made, if that is known.
    """
    before = Path(recorded) if recorded else None
    if before is not None and _is_same(before / RUNS_NAME, run.root.parent):
        return Place(before)  # before the next rule, since `runs` may be a symbolic link
    absolute = Path.cwd() / run.root
    if absolute.parent.name != RUNS_NAME:
        return Place(before if before is not None and before.is_dir() else Path.cwd())
    here = absolute.parent.parent.resolve()
    if before is None or _is_same(before, here):
        return Place(here)
    return Place(here, before, is_copy=RunDir(before / RUNS_NAME / run.name).is_run())


def settle(run: RunDir) -> tuple[RunDir, Plan]:
    """Change to the directory where the run's relative paths start; the run and its plan as seen from there.

    Raises:
        LaunchError: there is no plan, or it cannot be read.
    """
    plan, place = placed_plan(run)
    if not _is_same(place.directory, Path.cwd()):
        run = RunDir(run.root.resolve())
        os.chdir(place.directory)
    return run, plan


def plan_from_here(run: RunDir) -> Plan:
    """The plan of a run, with paths that are right from the current directory, which stays.

    Raises:
        LaunchError: there is no plan, or it cannot be read.
    """
    plan, place = placed_plan(run)
    return plan if _is_same(place.directory, Path.cwd()) else anchored_plan(plan, place.directory)


def placed_plan(run: RunDir) -> tuple[Plan, Place]:
    """The plan of a run and where its relative paths start; says so if that has changed, and adjusts absolute paths.

    Raises:
        LaunchError: there is no plan, or it cannot be read.
    """
    plan = run.read_plan()
    place = place_of(run, plan.working_dir)
    notice = place.notice(run)
    if notice is not None:
        tell(notice)
    return plan if place.moved_from is None else moved_plan(plan, place.moved_from, place.directory), place


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
