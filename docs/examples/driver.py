"""Take a run to its end: `python docs/examples/driver.py recipe.yaml my_run`.

The script may be killed and started again at any time, also while the run goes on: it joins the run where it lives, and
resumes it where it does not. Only a cancelled run, and a mistake in the recipe, end it early.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.errors import TrainerError
from trainer.jobs import Job, Outcome, reconnect_and_wait, submit

MAX_FAILURES = 3


def start_or_join(recipe: str, name: str) -> Job:
    """The job of this name: the one that there is, or a new one."""
    if (Path("runs") / name / "plan.json").exists():
        return reconnect_and_wait(name, poll_interval_s=0.5)
    return submit(recipe, name=name)  # launcher="slurm" here queues it on a cluster


def take_to_the_end(recipe: str, name: str) -> Outcome:
    """Start the run again after whatever takes it away; a failure only so many times."""
    job, failures = start_or_join(recipe, name), 0
    while True:
        print(f"{job.id}: {job.state()}", flush=True)
        outcome = job.wait()
        failures += outcome.state == "failed"
        if outcome.state in {"finished", "cancelled"} or failures > MAX_FAILURES:
            return outcome
        job = reconnect_and_wait(job.id, poll_interval_s=0.5)


if __name__ == "__main__":
    try:
        ended = take_to_the_end(*sys.argv[1:3])
    except TrainerError as error:
        sys.exit(f"driver: {error}")
    print(f"{ended.state}: {ended.message}")
    sys.exit(ended.exit_code)
