"""Start a run in the background, under a detached supervisor or in Slurm's queue; stop it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import LaunchError, QueueError, TrainerError
from trainer.files import write_atomically
from trainer.jobs.slurm_queue import ACTIVE, WAITING, ask_to_stop, find_queued, refuse_time_limit, submit_script
from trainer.jobs.slurm_script import SlurmOptions, batch_script
from trainer.jobs.state import JobRecord, Launcher, observe, project_place, read_record, slurm_job, write_record
from trainer.run.directory import RunDir
from trainer.run.state import RunState


def start_job(run: RunDir, launcher: Launcher, options: SlurmOptions | None = None) -> None:
    """Start a run that is not live, cancelled or not.

    Args:
        run: a directory with a plan.
        launcher: `local` or `slurm`.
        options: of sbatch.

    Raises:
        LaunchError: the run is live already, or cannot be started.
        QueueError: Slurm is unreachable.
    """
    directory = project_place(run).directory
    with run.launching() as lock:
        refuse_live(run, is_launching=True)
        with _cleared_outcome(run):
            if launcher == "local":
                pid = _start_local(run, directory, lock)
                run.hand_launch_to(pid)
                record = JobRecord(launcher, str(directory), time.time(), pid=pid, root=str(run.root.resolve()))
            else:
                record = _start_slurm(run, directory, options or SlurmOptions())
        write_record(run, record)


def refuse_live(run: RunDir, *, is_launching: bool = False) -> None:
    """Stop where the run is waiting or running already.

    Args:
        run: any run.
        is_launching: the caller itself holds the launch lock.

    Raises:
        LaunchError: it is.
        QueueError: Slurm could not be asked.
    """
    state = observe(run, is_launching=is_launching)
    if state.is_live:
        raise LaunchError(f"{run.root} is {state.job.lower()} already; `trainer reconnect {run.root}` joins it")


def restart_job(run: RunDir) -> None:
    """Start the run again as it was submitted; on this machine if it never was."""
    record = read_record(run)
    start_job(run, record.launcher if record else "local", record.slurm if record else None)


@contextmanager
def _cleared_outcome(run: RunDir) -> Iterator[None]:
    """Clear the last outcome; restore it if the start fails."""
    outcome, was_cancelled = run.read_outcome(), run.cancel_file.exists()
    run.cancel_file.unlink(missing_ok=True)
    run.outcome_file.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if outcome is not None:
            run.write_outcome(outcome)
        if was_cancelled:
            run.cancel_file.touch()
        raise


def _start_local(run: RunDir, directory: Path, lock: int) -> int:
    """Start a supervisor in its own session; it inherits the handle and keeps the launch lock while it lives."""
    log = run.of_job("logs/supervisor.log")
    run.logs.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "trainer", "train", str(_relative(run.root, directory)), "--resubmitted"]
    done = subprocess.run(
        # The shell ends at once, so the supervisor is not our child and leaves no zombie behind.
        ["/bin/sh", "-c", 'log=$1; shift; "$@" >>"$log" 2>&1 & echo $!', "sh", str(log.resolve()), *argv],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,
        pass_fds=[lock],
    )
    return int(done.stdout)


def _start_slurm(run: RunDir, directory: Path, options: SlurmOptions) -> JobRecord:
    options.refuse_unusable()
    if options.time_limit is not None and "qos" not in options.extra:  # a QOS may lift the partition's limit
        refuse_time_limit(options.partition or os.environ.get("SBATCH_PARTITION"), options.time_limit)
    shown = RunDir(_relative(run.root, directory))
    script = run.of_job("job.sh")
    write_atomically(script, batch_script(shown, run.read_plan(), options, directory))
    run.logs.mkdir(parents=True, exist_ok=True)
    slurm_id = submit_script(script.resolve(), directory)
    job = None
    with suppress(QueueError):
        job = find_queued(slurm_id)
    return JobRecord(
        "slurm",
        str(directory),
        time.time(),
        slurm_id=slurm_id,
        slurm=options,
        root=str(run.root.resolve()),
        slurm_submitted=job.submitted if job is not None else None,
    )


def _relative(path: Path, directory: Path) -> Path:
    """The path relative to a directory; absolute where it lies outside."""
    absolute = path.resolve()
    return absolute.relative_to(directory) if absolute.is_relative_to(directory) else absolute


def stop_job(run: RunDir) -> None:
    """Cancel the run: it saves and ends, and only the user starts it again.

    Raises:
        LaunchError: it has ended already, or runs where we cannot reach it.
        QueueError: Slurm is unreachable.
    """
    state = observe(run)
    if not state.may_become(RunState.CANCELLED):
        raise LaunchError(f"{run.root} is not running: {state.job.lower()}")
    run.cancel_file.touch()
    try:
        _ask_to_stop(run)
    except TrainerError:  # it goes on
        run.cancel_file.unlink(missing_ok=True)
        raise


def _ask_to_stop(run: RunDir) -> None:
    record, job = read_record(run), slurm_job(run)
    if record is not None and record.slurm_id is not None and job is not None and job.state in WAITING | ACTIVE:
        ask_to_stop(record.slurm_id)
        return
    pid = _supervisor(run, record)
    if pid is None:
        raise LaunchError(
            f"{run.root} was not started by `trainer` on this machine. Stop it where it was started, with SIGTERM"
        )
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _supervisor(run: RunDir, record: JobRecord | None) -> int | None:
    """Process id of a supervisor on this machine; the lock that it holds proves that the id is still its own."""
    if record is not None and record.pid is not None and run.is_launched():
        return record.pid
    attempts = run.read_attempts()
    if not attempts or not run.is_supervised() or attempts[-1].get("host") != socket.gethostname():
        return None
    pid = attempts[-1].get("supervisor_pid")
    return int(pid) if pid is not None else None
