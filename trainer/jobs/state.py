"""A submitted run: how it was submitted, and the state it is in."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, final

from trainer.errors import TrainerError
from trainer.files import write_atomically
from trainer.jobs.slurm_queue import ACTIVE, TAKEN_AWAY, WAITING, Queued, queued
from trainer.jobs.slurm_script import SlurmOptions
from trainer.run.directory import HEARTBEAT_S, Outcome, RunDir

Launcher = Literal["local", "slurm"]
JobState = Literal["PENDING", "RUNNING", "PREEMPTED", "FAILED", "CANCELLED", "COMPLETED"]
LIVE: Final = {"PENDING", "RUNNING"}
"""States that go on by themselves."""
FRESH_S: Final = 3 * HEARTBEAT_S


@final
@dataclass(frozen=True)
class JobRecord:
    """job.json: who started the run, where and when."""

    launcher: Launcher
    directory: str
    """Where it was submitted, absolute: relative paths of the recipe begin there."""
    time: float
    """When, in seconds since 1970."""
    pid: int | None = None
    """The supervisor's, of the local launcher."""
    slurm_id: str | None = None
    """Slurm's job id."""
    slurm: SlurmOptions | None = None
    """Options of the submission, for the next one."""


def read_record(run: RunDir) -> JobRecord | None:
    """How the run was submitted; None where it was not."""
    try:
        fields = json.loads(run.of_job("job.json").read_text())
    except FileNotFoundError:
        return None
    options = fields.pop("slurm")
    return JobRecord(**fields, slurm=SlurmOptions(**options) if options is not None else None)


def write_record(run: RunDir, record: JobRecord) -> None:
    """Keep how the run was submitted."""
    write_atomically(run.of_job("job.json"), json.dumps(asdict(record)) + "\n")


def read_state(run: RunDir, *, is_launching: bool = False) -> JobState:
    """Whether the run waits, goes on, or how it ended.

    Args:
        run: any run, submitted or not.
        is_launching: the caller holds the lock of who starts it, which then says nothing.

    Raises:
        QueueError: Slurm could not be asked.
        OSError: the run directory could not be read.
    """
    if run.is_locked() or run.is_supervised():
        return "RUNNING"
    if run.is_finished(run.read_plan().steps):
        return "COMPLETED"
    job = slurm_job(run)
    if job is not None and job.state in WAITING | ACTIVE:
        return "PENDING" if job.state in WAITING else "RUNNING"
    if not is_launching and run.is_launched():
        return "PENDING"
    return _ended(run.read_outcome(), job, is_cancelled=run.cancel_file.exists())


def _ended(outcome: Outcome | None, job: Queued | None, *, is_cancelled: bool) -> JobState:
    """How a run ended that nobody runs.

    >>> _ended(None, Queued("NODE_FAIL", "", ""), is_cancelled=False)
    'PREEMPTED'
    """
    word = job.state if job is not None else ""
    if is_cancelled or (outcome is not None and outcome.state == "cancelled"):
        return "CANCELLED"
    if outcome is not None:
        return "FAILED" if outcome.state == "failed" else "PREEMPTED"
    if word in TAKEN_AWAY:
        return "PREEMPTED"
    return "CANCELLED" if word == "CANCELLED" else "FAILED"


def is_alive(run: RunDir) -> bool:
    """Whether the newest attempt has given a fresh sign of life."""
    beat = run.read_heartbeat()
    return beat is not None and beat["attempt"] == run.newest_attempt() and time.time() - beat["time"] < FRESH_S


def slurm_job(run: RunDir) -> Queued | None:
    """What Slurm says of the run's last submission; None without one, or once it is forgotten.

    Raises:
        QueueError: Slurm could not be asked.
    """
    record = read_record(run)
    return queued(record.slurm_id) if record is not None and record.slurm_id is not None else None


def waiting_reason(run: RunDir) -> str | None:
    """Why Slurm lets the run wait, for people; None where it does not, or cannot be asked."""
    try:
        job = slurm_job(run)
    except TrainerError:
        return None
    return f"in Slurm's queue: {job.reason}, start {job.start}" if job is not None and job.state in WAITING else None


def directory_of(run: RunDir) -> Path:
    """Where the run's relative paths begin."""
    record = read_record(run)
    if record is not None:
        return Path(record.directory)
    runs = run.root.resolve().parent
    return runs.parent if runs.name == "runs" else Path.cwd()
