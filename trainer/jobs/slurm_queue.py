"""Ask Slurm and give it orders: sbatch, scontrol, scancel."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import LaunchError, QueueError

ANSWER_S: Final = 60.0
"""A controller that does not answer within this time counts as unreachable."""
WAITING: Final = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
ACTIVE: Final = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
TAKEN_AWAY: Final = frozenset({"PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"})


@final
@dataclass(frozen=True)
class QueuedJob:
    """A job as the controller knows it."""

    state: str
    reason: str
    start: str
    """When it started, or is expected to."""


def submit_script(script: Path, directory: Path) -> str:
    """Queue a batch script; returns Slurm's job id.

    Raises:
        LaunchError: sbatch is not installed, or refuses the script.
        QueueError: the controller is unreachable.
    """
    done = _ask(["sbatch", "--parsable", str(script)], directory)
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def find_queued(slurm_id: str) -> QueuedJob | None:
    """The controller's view of a job; None once the controller has forgotten it.

    Raises:
        QueueError: the controller is unreachable.
    """
    done = _ask(["scontrol", "--oneliner", "show", "job", slurm_id])
    if done.returncode == 0:
        return parse_job(done.stdout)
    if "Invalid job id" in done.stderr:
        return None
    raise QueueError(f"scontrol: {done.stderr.strip()}")


def parse_job(text: str) -> QueuedJob:
    """Parse a line of `scontrol show job`.

    >>> parse_job("JobId=7 JobName=tiny JobState=PENDING Reason=Resources StartTime=Unknown EndTime=x")
    QueuedJob(state='PENDING', reason='Resources', start='Unknown')
    """
    fields = dict(re.findall(r"(?:^|\s)(JobState|Reason|StartTime)=(\S*)", text))
    return QueuedJob(fields.get("JobState", ""), fields.get("Reason", ""), fields.get("StartTime", ""))


def ask_to_stop(slurm_id: str) -> None:
    """Remove a waiting job from the queue, or signal the script of a running one, which saves and ends.

    Raises:
        QueueError: the controller is unreachable or refuses.
    """
    for argv in (["scancel", "--state=PENDING", slurm_id], ["scancel", "--signal=USR1", "--batch", slurm_id]):
        done = _ask(argv)
        if done.returncode != 0 and "Invalid job id" not in done.stderr and "not running" not in done.stderr:
            raise QueueError(f"scancel: {done.stderr.strip()}")


def _ask(argv: Sequence[str], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: not installed here. Submit on a machine that has Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{argv[0]}: no answer within {ANSWER_S:g} s") from None
    unreachable = ("Unable to contact", "Connection refused", "Socket timed out", "communication")
    if done.returncode != 0 and any(word in done.stderr for word in unreachable):
        raise QueueError(f"{argv[0]}: {done.stderr.strip()}")
    return done
