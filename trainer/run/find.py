"""Find a run by name or directory; open the run of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trainer.errors import LaunchError, RunConflictError
from trainer.files import make_directory, write_atomically
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir

RUNS: Final = Path("runs")
"""Where runs are created, in the working directory."""
SHOWN_CHARS: Final = 60


def named_run(name: str, runs_dir: Path = RUNS) -> RunDir:
    """The directory that a run of this name has or would have."""
    return RunDir(runs_dir / name)


def all_runs(runs_dir: Path = RUNS) -> list[RunDir]:
    """Every run of a directory, by name."""
    return [run for root in sorted(runs_dir.glob("*")) if (run := RunDir(root)).is_run()]


def find_run(target: str) -> RunDir:
    """The run of this directory or name.

    Raises:
        LaunchError: there is none; names those that exist.
    """
    for run in (RunDir(Path(target)), named_run(target)):
        if run.is_run():
            return run
    known = ", ".join(run.name for run in all_runs())
    raise LaunchError(f"{target}: no such run. There are: {known or 'none'}")


def open_run(plan: Plan, name: str | None = None, runs_dir: Path = RUNS) -> RunDir:
    """The run directory of a plan: a new one, or that of the same run, to continue it.

    `steps`, intervals, evaluation, logging and the shape may differ; the new plan is kept.

    Args:
        plan: what to train.
        name: of the run; the recipe's when None.
        runs_dir: where runs are created.

    Raises:
        RunConflictError: the directory holds a run of another identity; shows the difference.
        LaunchError: it is running now.
    """
    run = named_run(name or plan.recipe.name, runs_dir)
    if not run.is_run():
        make_directory(run.root)
        write_atomically(run.plan_file, plan.dump())
        return run
    old = run.read_plan()
    if old.identity_hash != plan.identity_hash:
        lines = "\n".join(f"  {line}" for line in _differences(old.identity, plan.identity))
        raise RunConflictError(
            f"{run.root} holds another run; what differs:\n{lines}\n"
            "Give another --name, undo the change, or move the directory away."
        )
    run.refuse_taken()
    if plan.recipe.epochs is not None and plan.recipe.epochs == old.recipe.epochs:
        # The same rows give the same length, and the run has counted which of them are trained.
        plan = plan.model_copy(update={"steps": old.steps, "num_rows": old.num_rows})
    if old.dump() != plan.dump():
        write_atomically(run.plan_file, plan.dump())
    return run


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {_shortened(old)} -> {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
