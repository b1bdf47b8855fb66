"""Ask Slurm and give it orders: sbatch, scontrol, scancel."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import LaunchError, QueueError

QUERY_S: Final = 5.0
"""A controller that does not answer a question within this time counts as unreachable."""
ORDER_S: Final = 60.0
"""The same for a submission or a signal, which may have to wait for locks of the controller."""
WAITING: Final = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
ACTIVE: Final = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
TAKEN_AWAY: Final = frozenset({"PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"})


HELD: Final[Mapping[str, str]] = {
    "JobHeldUser": "held; `scontrol release {id}` releases it",
    "JobHeldAdmin": "held by an administrator, who must release it",
    "launch_failed_requeued_held": "held, since it could not be started; `scontrol release {id}` releases it",
    "JobHoldMaxRequeue": "held, since it was requeued too often; `scontrol release {id}` releases it",
    "PartitionTimeLimit": "never starts: its time limit is over that of the partition; submit with a shorter --time",
    "DependencyNeverSatisfied": "never starts: its dependency failed; `trainer cancel` and submit it again",
}
"""Reasons of Slurm for which waiting does not help, in words."""


@final
@dataclass(frozen=True)
class QueuedJob:
    """A job as the controller knows it."""

    id: str
    name: str
    state: str
    reason: str
    submitted: str
    """When it entered the queue, in UTC, for example "2026-05-04T11:22:33"; a requeue sets it anew."""
    start: str
    """When it started, or is expected to."""
    directory: str
    """Working directory of its script."""
    restarts: int = 0
    """How often it was requeued."""

    @property
    def wait(self) -> str:
        """Why it waits, for people."""
        remedy = HELD.get(self.reason)
        return remedy.format(id=self.id) if remedy is not None else f"{self.reason}, start {self.start}"


Ask = Callable[[str], QueuedJob | None]
"""Returns the controller's view of a job id; None once the controller has forgotten it."""


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
    done = _ask(["scontrol", "--oneliner", "show", "job", slurm_id], timeout_s=QUERY_S)
    if done.returncode == 0:
        return parse_job(done.stdout)
    if "Invalid job id" in done.stderr:
        return None
    raise QueueError(f"scontrol: {done.stderr.strip()}")


@final
class QueueSnapshot:
    """Answers for any number of jobs from one question, which is asked when the first answer is needed."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self._jobs: dict[str, QueuedJob] | None = None
        self._problem: QueueError | None = None

    def find(self, slurm_id: str) -> QueuedJob | None:
        """Like `find_queued`.

        Raises:
            QueueError: the controller is unreachable; it is not asked again.
        """
        if self._problem is not None:
            raise self._problem
        if self._jobs is None:
            try:
                self._jobs = _all_jobs()
            except QueueError as error:
                self._problem = error
                raise
        return self._jobs.get(slurm_id)


def _all_jobs() -> dict[str, QueuedJob]:
    done = _ask(["scontrol", "--oneliner", "show", "job"], timeout_s=QUERY_S)
    if done.returncode != 0:
        raise QueueError(f"scontrol: {done.stderr.strip()}")
    jobs = (parse_job(line) for line in done.stdout.splitlines() if line.startswith("JobId="))
    return {job.id: job for job in jobs}


def parse_job(text: str) -> QueuedJob:
    """Parse a line of `scontrol show job`.

    >>> parse_job("JobId=7 JobName=tiny JobState=PENDING Reason=Resources StartTime=Unknown WorkDir=/my runs").directory
    '/my runs'
    """
    fields = _fields(text)
    restarts = fields.get("Restarts", "")
    return QueuedJob(
        id=fields.get("JobId", ""),
        name=fields.get("JobName", ""),
        state=fields.get("JobState", ""),
        reason=fields.get("Reason", ""),
        submitted=fields.get("SubmitTime", ""),
        start=fields.get("StartTime", ""),
        directory=fields.get("WorkDir", ""),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def _fields(line: str) -> dict[str, str]:
    """The fields of a line of scontrol; values may contain spaces."""
    return dict(re.findall(r"(?:^|(?<=\s))([A-Za-z]+)=(.*?)(?=\s+[A-Za-z/:]+=|\s*$)", line))


def refuse_time_limit(partition: str | None, time_limit: str) -> None:
    """Stop where a time limit is over the partition's: Slurm would queue the job and never start it.

    Args:
        partition: name, or several with commas; the cluster's default when None.
        time_limit: as Slurm writes it.

    Raises:
        LaunchError: it is; or the time limit cannot be read.
    """
    wanted = parse_time_limit(time_limit)
    names = partition.split(",") if partition else None
    try:
        done = _ask(["scontrol", "--oneliner", "show", "partition"], timeout_s=QUERY_S)
    except QueueError:  # sbatch will say so
        return
    partitions = [_fields(line) for line in done.stdout.splitlines()]
    chosen = [
        each
        for each in partitions
        if (each.get("PartitionName") in names if names is not None else each.get("Default") == "YES")
    ]
    limits = [parse_time_limit(each.get("MaxTime", "UNLIMITED")) for each in chosen]
    if limits and wanted > max(limits):
        shown = ", ".join(f"{each['PartitionName']} ({each['MaxTime']})" for each in chosen)
        raise LaunchError(f"--time {time_limit}: over the limit of {shown}. Give a shorter time; the run is requeued.")


def parse_time_limit(text: str) -> float:
    """Seconds of a time limit of Slurm.

    >>> parse_time_limit("90"), parse_time_limit("1:30:00"), parse_time_limit("2-12"), parse_time_limit("UNLIMITED")
    (5400.0, 5400.0, 216000.0, inf)

    Raises:
        LaunchError: it is not one.
    """
    if text.upper() in {"UNLIMITED", "INFINITE", "-1"}:
        return math.inf
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]):
        raise LaunchError(f"--time {text}: not a time limit of Slurm, such as 90 (minutes), 12:00:00 or 2-00:00:00")
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return float(seconds + (int(days) * 86400 if dash else 0))


def ask_to_stop(slurm_id: str) -> None:
    """Remove a waiting job from the queue, or signal the script of a running one, which saves and ends.

    Raises:
        QueueError: the controller is unreachable or refuses.
    """
    for argv in (["scancel", "--state=PENDING", slurm_id], ["scancel", "--signal=USR1", "--batch", slurm_id]):
        done = _ask(argv)
        if done.returncode != 0 and "Invalid job id" not in done.stderr and "not running" not in done.stderr:
            raise QueueError(f"scancel: {done.stderr.strip()}")


def _ask(
    argv: Sequence[str], directory: Path | None = None, *, timeout_s: float = ORDER_S
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TZ": "UTC"} if argv[0] == "scontrol" else None  # times are compared as text
    try:
        done = subprocess.run(
            argv, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: not installed here. Submit on a machine that has Slurm's commands") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{argv[0]}: no answer within {timeout_s:g} s") from None
    unreachable = ("Unable to contact", "Connection refused", "Socket timed out", "communication")
    if done.returncode != 0 and any(word in done.stderr for word in unreachable):
        raise QueueError(f"{argv[0]}: {done.stderr.strip()}")
    return done
