"""`trainer train` and `trainer export`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trainer.checkpoints.saved_state import find_state
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, LaunchError
from trainer.launch.local import refuse_many_machines
from trainer.launch.restarts import supervise
from trainer.launch.supervisor import StopSignals
from trainer.planning.plan import Plan
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import find_run, open_run
from trainer.run.place import settle
from trainer.run.plan_recipe import plan_recipe


def train(arguments: argparse.Namespace) -> int:
    """Freeze the plan, then launch, supervise and restart until the run ends."""
    run, plan = _run_and_plan(arguments)
    if run.is_finished(plan.steps):
        tell(f"{run.root} is finished; give another --name to train again")
        _print_weights(run, is_lora=plan.recipe.lora is not None)
        return EXIT_FINISHED
    if arguments.resubmitted and run.cancel_file.exists():
        tell(f"{run.root} was cancelled; `trainer reconnect` or `trainer train` resumes it")
        return EXIT_FAILED
    refuse_many_machines(plan)
    with StopSignals(lambda: _note_cancelled(run)) as stop, run.supervised():
        tell(f"{run.root}: {plan.steps} steps on {plan.shape.name}; log: {run.logs}/")
        if not arguments.resubmitted:
            run.cancel_file.unlink(missing_ok=True)
        outcome = supervise(plan, run, stop)
    tell(str(outcome))
    if outcome.state in {"preempted", "cancelled"}:
        tell("run the same command again to resume")
    if outcome.exit_code == EXIT_FINISHED:
        _print_weights(run, is_lora=plan.recipe.lora is not None)
    return outcome.exit_code


def _note_cancelled(run: RunDir) -> None:
    with suppress(OSError):  # a full disk must not keep anybody from stopping
        run.cancel_file.touch()


def _run_and_plan(arguments: argparse.Namespace) -> tuple[RunDir, Plan]:
    """The run of a recipe, created or opened; or an existing run directory with its plan."""
    target = Path(arguments.recipe)
    run = RunDir(target)
    if run.is_run():
        if arguments.set or arguments.shape or arguments.name or arguments.overwrite:
            raise LaunchError(f"{target} is a run with a plan; --set, --shape, --name and --overwrite go with a recipe")
        run.refuse_taken()
        return settle(run)
    plan = plan_recipe(target, arguments.set, arguments.shape)
    for warning in plan.warnings:
        tell(f"warning: {warning}")
    run = open_run(plan, arguments.name, overwrites=arguments.overwrite)
    return run, run.read_plan()


def export(arguments: argparse.Namespace) -> int:
    """Run the exporter in a process of its own, which imports torch."""
    state = find_state(arguments.target)
    where = find_run(arguments.target).root if state is None else state
    argv = [sys.executable, "-m", "trainer.export", str(where)]
    for flag in ("merge", "best", "ollama", "public"):
        argv += [f"--{flag}"] if getattr(arguments, flag) else []
    for option in ("checkpoint", "gguf", "converter", "intended_use", "push", "out"):
        value = getattr(arguments, option)
        argv += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    return subprocess.run(argv, check=False).returncode


def _print_weights(run: RunDir, *, is_lora: bool) -> None:
    with suppress(OSError):  # the run is finished, whether or not anybody reads this
        sys.stdout.write(f"{run.weights(is_lora=is_lora)}\n")
        sys.stdout.flush()
