"""`trainer runs`, `logs` and `delete`: every run of this directory, and its upkeep."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from trainer.commands.status import describe_run
from trainer.commands.tables import table_lines
from trainer.errors import TrainerError, UserError
from trainer.jobs.delete import delete_run
from trainer.jobs.logs import log_lines
from trainer.jobs.slurm_queue import Ask, QueueSnapshot, find_queued
from trainer.run.best import BestValue, best_value
from trainer.run.directory import RunDir
from trainer.run.exposition import exposition
from trainer.run.find import RUNS, all_runs, find_run


@final
@dataclass(frozen=True)
class RunSummary:
    """One entry of `trainer runs --json`."""

    run: str
    state: str
    """As `trainer status` prints it; `unreadable` where the run directory is damaged."""
    method: str | None = None
    model: str | None = None
    step: int = 0
    steps: int = 0
    best: BestValue | None = None
    problem: str | None = None
    """Why it is unreadable."""
    lost_trackers: tuple[str, ...] = ()
    """Trackers that receive nothing more: `trainer status` says why."""


def list_runs(arguments: argparse.Namespace) -> int:
    """List every run of this directory, the newest last."""
    if arguments.prometheus:
        sys.stdout.write(exposition(sorted(all_runs(), key=_changed)))
        return 0
    snapshot = QueueSnapshot()
    summaries = [summarize_run(run, snapshot.find) for run in sorted(all_runs(), key=_changed)]
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(summary) for summary in summaries]) + "\n")
        return 0
    if not summaries:
        sys.stderr.write(f"no runs in {RUNS}/\n")
        return 0
    is_terminal = sys.stdout.isatty()
    header = [("run", "state", "method", "model", "progress", "best")] if is_terminal else []  # one line a run in pipes
    width = shutil.get_terminal_size().columns if is_terminal else None
    lines = table_lines([*header, *map(_row, summaries)], width=width)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _changed(run: RunDir) -> float:
    files = (run.metrics_file, run.plan_file)
    return max(file.stat().st_mtime for file in files if file.exists())


def summarize_run(run: RunDir, ask: Ask = find_queued) -> RunSummary:
    """The run in one line; a damaged one does not hide the others.

    Args:
        run: any run.
        ask: how Slurm's queue is asked.
    """
    try:
        recipe, status = run.read_plan().recipe, describe_run(run, ask)
        best = best_value(run.comparable_metrics())
        return RunSummary(
            str(run.root),
            status.state,
            recipe.method,
            recipe.model.path,
            status.step,
            status.steps,
            best,
            lost_trackers=(*(["wandb"] if status.wandb else []), *status.trackers),
        )
    except (TrainerError, OSError) as error:
        return RunSummary(str(run.root), "unreadable", problem=str(error))


def _row(summary: RunSummary) -> tuple[str, ...]:
    if summary.problem is not None:
        return (summary.run, summary.state, "", "", "", summary.problem)
    best = summary.best
    value = f"{best.name} {best.value:.4f} at step {best.step}" if best is not None else ""
    if summary.lost_trackers:
        value += f"{', ' if value else ''}lost: {' '.join(summary.lost_trackers)}"
    progress = f"step {summary.step} of {summary.steps}"
    return (summary.run, summary.state, summary.method or "", Path(summary.model or "").name, progress, value)


def logs(arguments: argparse.Namespace) -> int:
    """Print the log of an attempt, or follow it; with --follow the exit code is that of the run's outcome."""
    run = find_run(arguments.target)
    lines: Iterable[str] = log_lines(run, arguments.attempt, follow=arguments.follow)
    if arguments.lines is not None and not arguments.follow:
        lines = deque(lines, maxlen=arguments.lines)
    for line in lines:
        sys.stdout.write(line + "\n")
        if arguments.follow:
            sys.stdout.flush()
    outcome = run.read_outcome() if arguments.follow else None
    return outcome.exit_code if outcome is not None else 0


def delete(arguments: argparse.Namespace) -> int:
    """Delete runs that are not live, after a question unless --yes is given."""
    runs = [find_run(target) for target in arguments.targets]
    for run in runs:
        if not arguments.yes and not _is_confirmed(run):
            sys.stderr.write(f"{run.root}: kept\n")
            continue
        mirror = _mirror(run)
        delete_run(run)
        sys.stderr.write(f"{run.root}: deleted" + (f"; its copies in {mirror} are kept" if mirror else "") + "\n")
    return 0


def _is_confirmed(run: RunDir) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{run.root}: not deleted, since no terminal can confirm it. Add --yes.")
    summary = summarize_run(run)
    weights = ", ".join(directory.name for directory in run.all_weights()) or "no weights"
    size = sum(file.lstat().st_size for file in run.root.rglob("*"))
    sys.stderr.write(
        f"delete {run.root} ({summary.state}, step {summary.step} of {summary.steps}, {weights}, "
        f"{size / 2**20:,.0f} MiB)? [y/N] "
    )
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _mirror(run: RunDir) -> str | None:
    try:
        return run.read_plan().recipe.checkpoint.mirror
    except TrainerError:
        return None
