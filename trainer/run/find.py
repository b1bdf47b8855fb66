"""Find a run by name or directory; open the run of a plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from trainer.config.recipe import RunName
from trainer.errors import LaunchError, RunConflictError
from trainer.files import make_directory, write_atomically
from trainer.planning.plan import Plan
from trainer.planning.schedule import learning_rate
from trainer.run.console import tell
from trainer.run.directory import RunDir

RUNS: Final = Path("runs")
"""Where runs are created, in the working directory."""
SHOWN_CHARS: Final = 60
JUMP: Final = 1.5
"""A learning rate that more `steps` raise by this factor is worth a warning."""


def named_run(name: str, runs_dir: Path = RUNS) -> RunDir:
    """The directory that a run of this name has or would have.

    Raises:
        LaunchError: a run cannot have this name.
    """
    try:
        TypeAdapter(RunName).validate_python(name)
    except ValidationError:
        rule = "letters, digits, `_`, `.` and `-`, the first of them a letter or digit"
        raise LaunchError(f"--name {name!r}: not a name of a run. Use {rule}.") from None
    return RunDir(runs_dir / name)


def all_runs(runs_dir: Path = RUNS) -> list[RunDir]:
    """Every run of a directory, by name."""
    return [run for root in sorted(runs_dir.glob("*")) if (run := RunDir(root)).is_run()]


def find_run(target: str) -> RunDir:
    """The run of this directory or name.

    Raises:
        LaunchError: there is none; names those that exist.
    """
    for run in (RunDir(Path(target)), RunDir(RUNS / target)):
        if run.is_run():
            return run
    known = ", ".join(run.name for run in all_runs())
    raise LaunchError(f"{target}: no such run. There are: {known or 'none'}")


def open_run(plan: Plan, name: str | None = None, runs_dir: Path = RUNS, *, overwrites: bool = False) -> RunDir:
    """The run directory of a plan: a new one, or that of the same run, to continue it.

    `steps`, intervals, evaluation, logging and the shape may differ; the new plan is kept. Another run that has not
    made a step gives up its name.

    Args:
        plan: what to train.
        name: of the run; the recipe's when None.
        runs_dir: where runs are created.
        overwrites: move another run of this name to <name>.old-N.

    Raises:
        RunConflictError: the directory holds a run of another identity; shows the difference.
        LaunchError: it is running now, or has made more steps than the plan has.
    """
    run = named_run(plan.recipe.name if name is None else name, runs_dir)
    if not run.is_run():
        return _created(run, plan)
    old = _read_plan(run, is_replaceable=overwrites)
    if old is None or old.identity_hash != plan.identity_hash:
        return _replaced(run, old, plan, overwrites=overwrites)
    run.refuse_taken()
    if plan.recipe.epochs is not None and plan.recipe.epochs == old.recipe.epochs:
        # The same rows give the same length, and the run has counted which of them are trained.
        plan = plan.model_copy(update={"steps": old.steps, "num_rows": old.num_rows})
    made = run.newest_checkpoint_step()
    if made > plan.steps:
        if run.is_finished(plan.steps):
            return run
        raise LaunchError(f"{run.root} is at step {made} already; set `steps` to that or more (got {plan.steps})")
    _warn_of_jump(old, plan, made)
    if old.dump() != plan.dump():
        write_atomically(run.plan_file, plan.dump())
    return run


def _created(run: RunDir, plan: Plan) -> RunDir:
    try:
        make_directory(run.root)
        write_atomically(run.plan_file, plan.dump())
    except OSError as error:
        raise LaunchError(f"{run.root}: cannot be created: {error.strerror or error}. Make it writable.") from None
    return run


def _read_plan(run: RunDir, *, is_replaceable: bool) -> Plan | None:
    """The plan; None if it is damaged and no longer needed."""
    try:
        return run.read_plan()
    except LaunchError:
        if is_replaceable or not run.has_made_step():
            return None
        raise


def _replaced(run: RunDir, old: Plan | None, plan: Plan, *, overwrites: bool) -> RunDir:
    """The directory, with the plan in place of that of another run."""
    if run.is_launched():
        raise LaunchError(f"{run.root} is about to start. To stop it: trainer cancel {run.root}")
    run.refuse_taken()
    if not run.has_made_step():
        run.discard_start()
        tell(f"{run.root}: the earlier run of this name made no step and is replaced")
        return _created(run, plan)
    if overwrites:
        tell(f"{run.root}: the earlier run of this name is kept as {run.move_aside()}")
        return _created(run, plan)
    differences = _differences(old.identity, plan.identity) if old is not None else ()
    lines = "\n".join(f"  {line}" for line in differences)
    raise RunConflictError(
        f"{run.root} holds another run; what differs:\n{lines}\n"
        "Give another --name, undo the change, or move the earlier run aside with --overwrite."
    )


def _warn_of_jump(old: Plan, plan: Plan, made: int) -> None:
    """Warn where more `steps` raise the learning rate that had decayed already."""
    optimizer = plan.recipe.optimizer
    if made <= 0 or plan.steps <= old.steps:
        return
    last, following = (learning_rate(optimizer, *at) for at in ((made - 1, old.steps), (made, plan.steps)))
    if following > JUMP * last:
        tell(
            f"warning: with `steps` {old.steps} -> {plan.steps} the learning rate jumps from {last:.2g} at step {made} "
            f"to {following:.2g}: the {optimizer.schedule} schedule now ends at step {plan.steps}. "
            "The loss may rise at first."
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {_shortened(old)} -> {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
