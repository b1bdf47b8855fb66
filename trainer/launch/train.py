"""`trainer train` and `trainer export`: freeze the plan, launch, say how it ended."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from trainer.config.load import load_recipe
from trainer.config.plan import make_plan
from trainer.errors import EXIT_FINISHED
from trainer.launch.status import find_run
from trainer.launch.supervisor import Supervisor
from trainer.run import RunDir, open_run


def train(arguments: argparse.Namespace) -> int:
    """Freeze the plan, launch one attempt and wait for its outcome."""
    plan = make_plan(load_recipe(Path(arguments.recipe), arguments.set), arguments.shape)
    for warning in plan.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    run = open_run(plan, arguments.name)
    if run.is_finished(plan.steps):
        sys.stderr.write(f"{run.root} is finished; give another --name to train again\n")
        _print_weights(run, is_lora=plan.recipe.lora is not None)
        return EXIT_FINISHED
    sys.stderr.write(f"{run.root}: {plan.steps} steps on {plan.shape.name}; log: {run.root}/logs/\n")
    with run.supervised():
        outcome = Supervisor(plan, run).attempt()
    sys.stderr.write(f"{outcome.state}: {outcome.message}\n")
    if outcome.state == "preempted":
        sys.stderr.write("run the same command again to go on\n")
    if outcome.exit_code == EXIT_FINISHED:
        _print_weights(run, is_lora=plan.recipe.lora is not None)
    return outcome.exit_code


def export(arguments: argparse.Namespace) -> int:
    """Start the exporter in a process of its own, which may import torch."""
    run = find_run(arguments.target)
    argv = [sys.executable, "-m", "trainer.export", str(run.root)]
    argv += ["--best"] if arguments.best else []
    argv += ["--out", arguments.out] if arguments.out else []
    argv += ["--merge"] if arguments.merge else []
    return subprocess.run(argv, check=False).returncode


def _print_weights(run: RunDir, *, is_lora: bool) -> None:
    sys.stdout.write(f"{run.weights(is_lora=is_lora)}\n")
