"""`trainer status`: what a run directory says of its run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from typing import Any, Final

from trainer.errors import QueueError, TrainerError
from trainer.jobs.state import FRESH_S, LIVE, JobState, read_state, waiting_reason
from trainer.run.console import Console, describe, duration, seconds_left
from trainer.run.directory import Outcome, RunDir
from trainer.run.find import find_run

FOLLOW_S: Final = 1.0


def describe_run(run: RunDir) -> dict[str, Any]:
    """State, step, rate, time left and last metrics."""
    plan, outcome, beat, records = run.read_plan(), run.read_outcome(), run.read_heartbeat(), run.read_metrics()
    state = _state(run, outcome, beat)
    waits = waiting_reason(run) if state == "pending" else None
    recent = deque(((record["time"], record["step"]) for record in records[-20:]), maxlen=20)
    left = seconds_left(recent, records[-1]["step"], plan.steps) if records and state == "running" else None
    return {
        "run": str(run.root),
        "state": state,
        "step": records[-1]["step"] if records else 0,
        "steps": plan.steps,
        "phase": beat["phase"] if beat and state == "running" else None,
        "attempts": run.newest_attempt(),
        "seconds_left": left,
        "message": waits or (outcome.message if outcome else None),
        "metrics": records[-1] if records else {},
    }


def _state(run: RunDir, outcome: Outcome | None, beat: dict[str, Any] | None) -> str:
    """The state for people, finer than a job's."""
    if run.is_locked():
        age = time.time() - beat["time"] if beat else float("inf")
        return "running" if age < FRESH_S else "running, no heartbeat"
    try:
        state: JobState = read_state(run)
    except TrainerError:
        state = "FAILED"  # nobody to ask: what the directory says must do
    if state == "PENDING" and not run.is_launched():
        return "pending"
    if outcome is not None:
        return outcome.state
    if state in LIVE:
        return "starting"
    if state == "CANCELLED":
        return "cancelled"
    return "interrupted" if beat else "pending"


def status(arguments: argparse.Namespace) -> int:
    """Print the state once, or follow it."""
    run = find_run(arguments.target)
    if arguments.follow:
        return _follow(run)
    about = describe_run(run)
    if arguments.json:
        sys.stdout.write(json.dumps(about) + "\n")
        return 0
    left = f", {duration(about['seconds_left'])} left" if about["seconds_left"] is not None else ""
    phase = f" ({about['phase']})" if about["phase"] else ""
    sys.stdout.write(f"{about['run']}: {about['state']}{phase}, step {about['step']} of {about['steps']}{left}\n")
    if about["metrics"]:
        sys.stdout.write(f"  {describe(about['metrics'])}\n")
    if about["message"]:
        sys.stdout.write(f"  {about['message']}\n")
    return 0


def _goes_on(run: RunDir) -> bool:
    """Whether somebody runs it, or is about to."""
    try:
        return read_state(run) in LIVE
    except QueueError:
        return True  # ask again


def _follow(run: RunDir) -> int:
    console = Console(run.read_plan().steps, sys.stdout)
    seen = 0
    while True:
        has_ended = not _goes_on(run)
        outcome = run.read_outcome()
        records = run.read_metrics()
        seen = min(seen, len(records))
        for record in records[seen:]:
            console.show(record)
        seen = len(records)
        if has_ended:
            console.say(f"{outcome.state}: {outcome.message}" if outcome else "not running")
            return outcome.exit_code if outcome else 0
        time.sleep(FOLLOW_S)
