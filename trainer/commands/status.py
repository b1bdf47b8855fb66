"""`trainer status`: state, step, rate, time left and last metrics of a run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from trainer.errors import QueueError, TrainerError
from trainer.jobs.slurm_queue import Ask, find_queued
from trainer.jobs.state import observe, waiting_reason
from trainer.run.console import Console, describe, duration, seconds_left
from trainer.run.directory import RunDir
from trainer.run.find import find_run
from trainer.run.polling import wait_until
from trainer.run.protocol import HEARTBEAT_S, LATE_S
from trainer.run.pulse import Pulse
from trainer.run.sinks import sink_problems
from trainer.run.state import Outcome, RunState
from trainer.run.tracker import read_tracker

FOLLOW_S: Final = 1.0
RATE_RECORDS: Final = 20
"""The time left follows from so many of the newest records; --follow begins with them."""


@final
@dataclass(frozen=True)
class RunStatus:
    """What `trainer status --json` prints."""

    run: str
    state: str
    step: int
    steps: int
    phase: str | None
    attempts: int
    seconds_left: float | None
    message: str | None
    metrics: dict[str, Any]
    wandb: str | None
    """Why W&B receives nothing more; None while it works, or is not used."""
    trackers: dict[str, str]
    """Why TensorBoard, trackio or MLflow receives nothing more, by name; without those that work or are not used."""


def describe_run(run: RunDir, ask: Ask = find_queued, pulse: Pulse | None = None) -> RunStatus:
    """The status of a run now.

    Args:
        run: any run.
        ask: how Slurm's queue is asked.
        pulse: has observed the heartbeat before.
    """
    plan, outcome, beat = run.read_plan(), run.read_outcome(), run.read_heartbeat()
    state = _state(run, ask, pulse)
    tracker = read_tracker(run)
    records = run.newest_records(RATE_RECORDS)
    recent = deque((record["time"], record["step"]) for record in records)
    is_running = state is RunState.RUNNING
    reason = waiting_reason(run, ask) if state is RunState.QUEUED else None
    return RunStatus(
        run=str(run.root),
        state=_shown(state, outcome),
        step=_step(run, plan.steps),
        steps=plan.steps,
        phase=beat.phase if beat is not None and is_running else None,
        attempts=run.newest_attempt(),
        seconds_left=seconds_left(recent, records[-1]["step"], plan.steps) if records and is_running else None,
        message=reason or (outcome.message if outcome is not None else None),
        metrics=records[-1] if records else {},
        wandb=tracker.problem if tracker is not None else None,
        trackers=sink_problems(run),
    )


def _step(run: RunDir, steps: int) -> int:
    """The newest step, of metrics or checkpoints: metrics.jsonl may be damaged, `steps` lowered since."""
    return min(steps, max(run.newest_logged_step(), run.newest_checkpoint_step(), 0))


def _state(run: RunDir, ask: Ask, pulse: Pulse | None) -> RunState:
    try:
        return observe(run, ask=ask, pulse=pulse)
    except TrainerError:  # Slurm does not answer: what the run directory says
        return observe(run, asks_slurm=False, pulse=pulse)


def _shown(state: RunState, outcome: Outcome | None) -> str:
    """The word for people. While no attempt holds the run, its last outcome says most."""
    if outcome is None or state in {RunState.RUNNING, RunState.SILENT, RunState.QUEUED}:
        return state.shown
    return RunState(outcome.state).shown


def status(arguments: argparse.Namespace) -> int:
    """Print the status once, or follow it."""
    run = find_run(arguments.target)
    if arguments.follow:
        return _follow(run)
    pulse = Pulse()
    current = describe_run(run, pulse=pulse)
    if current.state == RunState.SILENT.shown and run.read_heartbeat() is not None:
        # Perhaps only the clocks of two machines differ: a heartbeat that changes is fresh.
        wait_until(lambda: pulse.is_alive(run), timeout_s=HEARTBEAT_S + LATE_S, poll_s=0.2)
        current = describe_run(run, pulse=pulse)
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(current)) + "\n")
        return 0
    left = f", {duration(current.seconds_left)} left" if current.seconds_left is not None else ""
    phase = f" ({current.phase})" if current.phase else ""
    sys.stdout.write(f"{current.run}: {current.state}{phase}, step {current.step} of {current.steps}{left}\n")
    if current.metrics:
        sys.stdout.write(f"  {describe(current.metrics)}\n")
    if current.message:
        sys.stdout.write(f"  {current.message}\n")
    if current.wandb:
        sys.stdout.write(f"  {current.wandb}; `trainer sync {current.run}` sends what is missing\n")
    for name, why in current.trackers.items():
        sys.stdout.write(
            f"  {name} receives nothing more ({why}); `trainer sync {current.run} --to {name}` copies all\n"
        )
    return 0


def _follow(run: RunDir) -> int:
    """Show metrics as they are written, until the run ends; returns the exit code of its outcome."""
    console = Console(run.read_plan().steps, sys.stdout)
    metrics = run.metrics_reader(last=RATE_RECORDS)
    while True:
        has_ended = not _is_live(run)
        outcome = run.read_outcome()
        for record in metrics.poll():
            console.show(record)
        if has_ended:
            console.say(str(outcome) if outcome is not None else "not running")
            return outcome.exit_code if outcome is not None else 0
        time.sleep(FOLLOW_S)


def _is_live(run: RunDir) -> bool:
    try:
        return observe(run).is_live
    except QueueError:
        return True  # asked again at the next poll
