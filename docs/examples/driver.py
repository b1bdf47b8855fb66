"""Take a run to its end: `python docs/examples/driver.py recipe.yaml my_run`.

The script may be killed and started again at any time: it joins the run if it is running, and resumes it if it is not.
It ends early only if the run is cancelled or the recipe has a mistake.
"""

from __future__ import annotations

import sys

from trainer import Job, Outcome, reconnect_and_wait, submit
from trainer.errors import TrainerError
from trainer.jobs import jobs

MAX_FAILURES = 3


def start_or_join(recipe: str, name: str) -> Job:
    """The job of this name: an existing one, or a new one."""
    if any(job.run_dir.name == name for job in jobs()):
        return reconnect_and_wait(name, poll_interval_s=0.5)
    return submit(recipe, name=name)  # add launcher="slurm" to queue it on a cluster


def take_to_the_end(recipe: str, name: str) -> Outcome:
    """Resume the run after every interruption; give up after MAX_FAILURES failures."""
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
    print(ended)
    sys.exit(ended.exit_code)
