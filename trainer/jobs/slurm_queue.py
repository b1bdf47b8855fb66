"""What Slurm is asked and told: sbatch, scontrol, scancel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import LaunchError, QueueError

PATIENCE_S: Final = 60.0
"""A controller that does not answer in this time is unreachable."""
WAITING: Final = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
ACTIVE: Final = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
TAKEN_AWAY: Final = {"PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}


@final
@dataclass(frozen=True)
class Queued:
    """A job as the controller knows it."""

    state: str
    reason: str
    start: str
    """When it started, or is thought to start."""


def submit_script(script: Path, directory: Path) -> str:
    """Queue a batch script; returns Slurm's job id.

    Raises:
        LaunchError: sbatch is not here, or refuses the script.
        QueueError: the controller is unreachable.
    """
    done = _ask(["sbatch", "--parsable", str(script)], directory)
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def queued(slurm_id: str) -> Queued | None:
    """What the controller says of a job; None once it has forgotten it.

    Raises:
        QueueError: it is unreachable.
    """
    done = _ask(["scontrol", "--oneliner", "show", "job", slurm_id])
    if done.returncode == 0:
        return parse_job(done.stdout)
    if "Invalid job id" in done.stderr:
        return None
    raise QueueError(f"scontrol: {done.stderr.strip()}")


def parse_job(text: str) -> Queued:
    """One line of `scontrol show job`.

    >>> parse_job("JobId=7 JobName=tiny JobState=PENDING Reason=Resources StartTime=Unknown EndTime=x")
    Queued(state='PENDING', reason='Resources', start='Unknown')
    """
    fields = dict(re.findall(r"(?:^|\s)(JobState|Reason|StartTime)=(\S*)", text))
    return Queued(fields.get("JobState", ""), fields.get("Reason", ""), fields.get("StartTime", ""))


def ask_to_stop(slurm_id: str) -> None:
    """Take a waiting job out of the queue; signal the script of a running one, which saves and ends.

    Raises:
        QueueError: the controller is unreachable or refuses.
    """
    for argv in (["scancel", "--state=PENDING", slurm_id], ["scancel", "--signal=USR1", "--batch", slurm_id]):
        done = _ask(argv)
        if done.returncode != 0 and "Invalid job id" not in done.stderr and "not running" not in done.stderr:
            raise QueueError(f"scancel: {done.stderr.strip()}")


def _ask(argv: Sequence[str], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: not here; submit where Slurm's commands are installed") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{argv[0]}: no answer in {PATIENCE_S:g} s") from None
    unreachable = ("Unable to contact", "Connection refused", "Socket timed out", "communication")
    if done.returncode != 0 and any(word in done.stderr for word in unreachable):
        raise QueueError(f"{argv[0]}: {done.stderr.strip()}")
    return done
