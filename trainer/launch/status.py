"""`trainer status`: what a run directory says of its run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from trainer.errors import LaunchError, QueueError
from trainer.launch.job_state import FRESH_S, read_state, waiting_reason
from trainer.progress import Console, describe, duration, seconds_left
from trainer.run import RunDir

FOLLOW_S: Final = 1.0


def find_run(target: str) -> RunDir:
    """The run of this directory or name.

    Raises:
        LaunchError: there is none; names those that are.
    """
    for place in (Path(target), Path("runs") / target):
        if (place / "plan.json").is_file():
            return RunDir(place)
    known = sorted(entry.name for entry in Path("runs").glob("*") if (entry / "plan.json").is_file())
    raise LaunchError(f"{target}: no such run. There are: {', '.join(known) or 'none'}")


def describe_run(run: RunDir) -> dict[str, Any]:
    """State, step, rate, time left and last metrics."""
    plan, outcome, beat, records = run.read_plan(), run.read_outcome(), run.read_heartbeat(), run.read_metrics()
    is_locked = run.is_locked()
    waits = None if is_locked or run.is_supervised() or run.is_finished(plan.steps) else waiting_reason(run)
    if is_locked:
        age = time.time() - beat["time"] if beat else float("inf")
        state = "running" if age < FRESH_S else "running, no heartbeat"
    elif waits is not None:
        state = "pending"
    elif outcome is not None:
        state = outcome.state
    elif run.is_supervised() or run.is_launched():
        state = "starting"
    elif run.cancel_file.exists():
        state = "cancelled"
    else:
        state = "interrupted" if beat else "pending"
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


def _is_coming(run: RunDir) -> bool:
    """Whether a submitted run is about to begin, or to go on."""
    try:
        return read_state(run) == "PENDING"
    except QueueError:
        return True  # ask again


def _follow(run: RunDir) -> int:
    console = Console(run.read_plan().steps, sys.stdout)
    seen = 0
    while True:
        has_ended = not run.is_locked() and not run.is_supervised() and not _is_coming(run)
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
