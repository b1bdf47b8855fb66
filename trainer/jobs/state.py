"""How a run was submitted, and which state it is in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, final

from trainer.errors import TrainerError
from trainer.files import write_atomically
from trainer.jobs.slurm_queue import ACTIVE, TAKEN_AWAY, WAITING, Ask, QueuedJob, find_queued
from trainer.jobs.slurm_script import SlurmOptions
from trainer.run.directory import RunDir
from trainer.run.place import Place, place_of
from trainer.run.pulse import Pulse
from trainer.run.state import Facts, JobState, QueueState, RunState, state_of

Launcher = Literal["local", "slurm"]


@final
@dataclass(frozen=True)
class JobRecord:
    """job.json: how, where and when the run was submitted."""

    launcher: Launcher
    directory: str
    """Absolute working directory of the submission; relative paths of the recipe start there."""
    time: float
    """Seconds since 1970."""
    pid: int | None = None
    """Process id of the supervisor, for the local launcher."""
    slurm_id: str | None = None
    """Slurm's job id."""
    slurm: SlurmOptions | None = None
    """Options of this submission, used again by the next one."""
    root: str | None = None
    """Absolute run directory, by which a copy of it is recognized."""
    slurm_submitted: str | None = None
    """When Slurm queued the job, as Slurm says it; None if it was not asked in time."""


def read_record(run: RunDir) -> JobRecord | None:
    """How the run was submitted; None where it was not."""
    try:
        fields = json.loads(run.of_job("job.json").read_text())
    except FileNotFoundError:
        return None
    options = fields.pop("slurm")
    return JobRecord(**fields, slurm=SlurmOptions(**options) if options is not None else None)


def write_record(run: RunDir, record: JobRecord) -> None:
    """Write how the run was submitted."""
    write_atomically(run.of_job("job.json"), json.dumps(asdict(record)) + "\n")


def read_state(run: RunDir) -> JobState:
    """The public state of a run.

    Raises:
        QueueError: Slurm could not be asked.
        OSError: the run directory could not be read.
    """
    return observe(run).job


def observe(
    run: RunDir,
    *,
    is_launching: bool = False,
    asks_slurm: bool = True,
    ask: Ask = find_queued,
    pulse: Pulse | None = None,
) -> RunState:
    """The state of a run now.

    Args:
        run: any run, submitted or not.
        is_launching: the caller itself holds the launch lock.
        asks_slurm: whether the queue counts.
        ask: how the queue is asked.
        pulse: has observed the heartbeat before.

    Raises:
        QueueError: Slurm could not be asked.
        OSError: the run directory could not be read.
    """
    if run.is_locked():
        return state_of(Facts(is_locked=True, is_alive=(pulse or Pulse()).is_alive(run)))
    if run.is_supervised():
        return state_of(Facts(is_supervised=True))
    steps = run.read_plan().steps
    if run.is_finished(steps):
        return state_of(Facts(outcome="finished", is_complete=True))
    job = slurm_job(run, ask) if asks_slurm else None
    is_launched = not is_launching and run.is_launched()
    outcome = run.read_outcome()  # last: who writes it may have ended since the lines above
    return state_of(
        Facts(
            is_launched=is_launched,
            has_begun=run.read_heartbeat() is not None,
            outcome=outcome.state if outcome is not None else None,
            is_complete=outcome is not None and outcome.is_finished(steps),
            is_cancelled=run.cancel_file.exists(),
            queue=queue_state(job.state) if job is not None else None,
        )
    )


def queue_state(word: str) -> QueueState | None:
    """What Slurm's word for a job means for its run; None where it leaves that to the run directory.

    >>> queue_state("NODE_FAIL"), queue_state("CONFIGURING"), queue_state("COMPLETED")
    ('taken away', 'waiting', None)
    """
    for words, state in _QUEUE_STATES.items():
        if word in words:
            return state
    return None


_QUEUE_STATES: Final[Mapping[frozenset[str], QueueState]] = {
    WAITING: "waiting",
    ACTIVE: "active",
    TAKEN_AWAY: "taken away",
    frozenset({"CANCELLED"}): "cancelled",
}


def slurm_job(run: RunDir, ask: Ask = find_queued) -> QueuedJob | None:
    """Slurm's view of the run's last submission; None without one, or once Slurm has forgotten it.

    Args:
        run: any run.
        ask: how the queue is asked.

    Raises:
        QueueError: Slurm could not be asked.
    """
    record = read_record(run)
    if record is None or record.slurm_id is None or not _is_of_this_directory(record, run):
        return None
    job = ask(record.slurm_id)
    return job if job is not None and is_submission(job, record, run) else None


def is_submission(job: QueuedJob, record: JobRecord, run: RunDir) -> bool:
    """Whether a job is the run's submission. Slurm gives the ids of forgotten jobs to others.

    Args:
        job: with the recorded id.
        record: of the submission.
        run: that was submitted.
    """
    options = record.slurm or SlurmOptions()
    if job.name != options.job_name(run) or not _is_same(job.directory, options.extra.get("chdir", record.directory)):
        return False
    if record.slurm_submitted is None or job.submitted == record.slurm_submitted:
        return True
    return job.restarts > 0 and job.submitted > record.slurm_submitted


def _is_of_this_directory(record: JobRecord, run: RunDir) -> bool:
    """Whether this directory was submitted, and not one that this is a copy of."""
    return record.root is None or _is_same(record.root, str(run.root.resolve()))


def _is_same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def waiting_reason(run: RunDir, ask: Ask = find_queued) -> str | None:
    """Why the run waits in Slurm's queue, for people; None where it does not, or Slurm cannot be asked.

    Args:
        run: any run.
        ask: how the queue is asked.
    """
    try:
        job = slurm_job(run, ask)
    except TrainerError:
        return None
    return f"in Slurm's queue: {job.wait}" if job is not None and job.state in WAITING else None


def project_place(run: RunDir) -> Place:
    """Where the run's relative paths start, and whether that has changed."""
    record = read_record(run)
    return place_of(run, run.read_plan().working_dir or (record.directory if record is not None else None))
