"""`trainer train` and `trainer export`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from trainer.errors import EXIT_FAILED, EXIT_FINISHED, LaunchError
from trainer.launch.local import refuse_many_machines
from trainer.launch.restarts import supervise
from trainer.launch.supervisor import StopSignals
from trainer.planning.plan import Plan
from trainer.run.directory import RunDir
from trainer.run.find import find_run, open_run
from trainer.run.plan_recipe import plan_recipe


def train(arguments: argparse.Namespace) -> int:
    """Freeze the plan, then launch, supervise and restart until the run ends."""
    run, plan = _run_and_plan(arguments)
    if run.is_finished(plan.steps):
        sys.stderr.write(f"{run.root} is finished; give another --name to train again\n")
        _print_weights(run, is_lora=plan.recipe.lora is not None)
        return EXIT_FINISHED
    if arguments.resubmitted and run.cancel_file.exists():
        sys.stderr.write(f"{run.root} was cancelled; `trainer reconnect` or `trainer train` resumes it\n")
        return EXIT_FAILED
    refuse_many_machines(plan)
    with StopSignals() as stop, run.supervised():
        sys.stderr.write(f"{run.root}: {plan.steps} steps on {plan.shape.name}; log: {run.logs}/\n")
        if not arguments.resubmitted:
            run.cancel_file.unlink(missing_ok=True)
        outcome = supervise(plan, run, stop)
    sys.stderr.write(f"{outcome}\n")
    if outcome.state == "preempted":
        sys.stderr.write("run the same command again to resume\n")
    if outcome.exit_code == EXIT_FINISHED:
        _print_weights(run, is_lora=plan.recipe.lora is not None)
    return outcome.exit_code


def _run_and_plan(arguments: argparse.Namespace) -> tuple[RunDir, Plan]:
    """The run of a recipe, created or opened; or an existing run directory with its plan."""
    target = Path(arguments.recipe)
    run = RunDir(target)
    if run.is_run():
        if arguments.set or arguments.shape or arguments.name or arguments.overwrite:
            raise LaunchError(f"{target} is a run with a plan; --set, --shape, --name and --overwrite go with a recipe")
        run.refuse_taken()
        return run, run.read_plan()
    plan = plan_recipe(target, arguments.set, arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    run = open_run(plan, arguments.name, overwrites=arguments.overwrite)
    return run, run.read_plan()


def export(arguments: argparse.Namespace) -> int:
    """Run the exporter in a process of its own, which imports torch."""
    run = find_run(arguments.target)
    argv = [sys.executable, "-m", "trainer.export", str(run.root)]
    for flag in ("merge", "best", "ollama", "public"):
        argv += [f"--{flag}"] if getattr(arguments, flag) else []
    for option in ("checkpoint", "gguf", "converter", "intended_use", "push", "out"):
        value = getattr(arguments, option)
        argv += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    return subprocess.run(argv, check=False).returncode


def _print_weights(run: RunDir, *, is_lora: bool) -> None:
    sys.stdout.write(f"{run.weights(is_lora=is_lora)}\n")
