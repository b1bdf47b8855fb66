"""`trainer sync`: send the whole metrics.jsonl of a run to Weights & Biases, TensorBoard, trackio or MLflow."""

from __future__ import annotations

import argparse

from trainer.config.recipe import LoggingSettings
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, LaunchError
from trainer.run.console import tell
from trainer.run.directory import RunDir
from trainer.run.find import find_run
from trainer.run.metrics_reader import Record
from trainer.run.sinks import SinkName, Sinks
from trainer.run.tracker import Tracker, tracker_mode


def _rebuild(run: RunDir, name: SinkName, records: list[Record], logging: LoggingSettings) -> int:
    """Build a sink again from all records."""
    sinks = Sinks(run, [name], logging, tell)
    sinks.rebuild(records)
    outcome = run.read_outcome()
    sinks.close(outcome.exit_code if outcome is not None else EXIT_FAILED)
    if sinks.problems:
        return EXIT_FAILED
    place = str(run.tensorboard) if name == "tensorboard" else f"project {logging.wandb_project}, run {run.name}"
    tell(f"{len(records)} records of {run.root} are in {name} ({place})")
    return EXIT_FINISHED


def sync(arguments: argparse.Namespace) -> int:
    """Upload all records under the run's W&B id; what W&B has already, it keeps. Other copies are built again."""
    run = find_run(arguments.target)
    plan = run.read_plan()
    if run.is_locked():
        raise LaunchError(f"{run.root} is running, and sends its metrics itself. Sync it when it has ended.")
    records = run.read_metrics()
    if not records:
        raise LaunchError(f"{run.metrics_file}: no records yet")
    if arguments.to != "wandb":
        return _rebuild(run, arguments.to, records, plan.recipe.logging)
    mode = tracker_mode("online")
    if mode is None:
        raise LaunchError("WANDB_MODE=disabled is set: nothing is sent. Unset it and run the same command again.")
    tracker = Tracker(run, plan, mode, tell)
    tracker.catch_up(records, resends=True)
    outcome = run.read_outcome()
    tracker.close(outcome.exit_code if outcome is not None else EXIT_FAILED)
    if tracker.state.problem is not None:
        return EXIT_FAILED
    tell(f"{len(records)} records of {run.root} are in W&B run {tracker.state.id} ({mode})")
    return EXIT_FINISHED
