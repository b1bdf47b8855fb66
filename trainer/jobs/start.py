"""Starts a run and leaves: a detached supervisor, or a job in Slurm's queue; and asks it to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import LaunchError
from trainer.files import write_atomically
from trainer.jobs.slurm_queue import ACTIVE, WAITING, ask_to_stop, submit_script
from trainer.jobs.slurm_script import SlurmOptions, batch_script
from trainer.jobs.state import (
    LIVE,
    JobRecord,
    Launcher,
    directory_of,
    read_record,
    read_state,
    slurm_job,
    write_record,
)
from trainer.run.directory import RunDir


def start_job(run: RunDir, launcher: Launcher, options: SlurmOptions | None = None) -> None:
    """Start the run where nobody runs it, cancelled or not.

    Args:
        run: with its plan.
        launcher: `local` or `slurm`.
        options: of Slurm.

    Raises:
        LaunchError: it waits or goes on already, or cannot be started.
        QueueError: Slurm is unreachable.
    """
    directory = directory_of(run)
    with run.launching() as lock:
        refuse_live(run, is_launching=True)
        with _end_forgotten(run):
            if launcher == "local":
                record = JobRecord(launcher, str(directory), time.time(), pid=_start_local(run, directory, lock))
            else:
                record = _start_slurm(run, directory, options or SlurmOptions())
        write_record(run, record)


def refuse_live(run: RunDir, *, is_launching: bool = False) -> None:
    """Stop where the run waits or goes on already.

    Raises:
        LaunchError: it does.
        QueueError: Slurm could not be asked.
    """
    state = read_state(run, is_launching=is_launching)
    if state in LIVE:
        raise LaunchError(f"{run.root} is {state.lower()} already; `trainer reconnect {run.root}` joins it")


def restart_job(run: RunDir) -> None:
    """Start the run again as it was submitted, here if it never was."""
    record = read_record(run)
    start_job(run, record.launcher if record else "local", record.slurm if record else None)


@contextmanager
def _end_forgotten(run: RunDir) -> Iterator[None]:
    """Take away how the run ended: what is there later is of the next attempt. Put it back if that cannot start."""
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
    """A supervisor in a session of its own; it keeps the lock, by its inherited handle, as long as it lives."""
    log = run.of_job("logs/supervisor.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "trainer", "train", str(_from(directory, run.root)), "--resubmitted"]
    done = subprocess.run(
        # The shell ends at once, so that the supervisor is no child of ours that we would have to wait for.
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
    shown = RunDir(_from(directory, run.root))
    script = run.of_job("job.sh")
    write_atomically(script, batch_script(shown, run.read_plan(), options, directory))
    run.of_job("logs/slurm-%j.log").parent.mkdir(parents=True, exist_ok=True)
    slurm_id = submit_script(script.resolve(), directory)
    return JobRecord("slurm", str(directory), time.time(), slurm_id=slurm_id, slurm=options)


def _from(directory: Path, path: Path) -> Path:
    """The path as seen from a directory, where it lies below it."""
    whole = path.resolve()
    return whole.relative_to(directory) if whole.is_relative_to(directory) else whole


def stop_job(run: RunDir) -> None:
    """Cancel the run: it saves and ends, and nobody starts it again but the user.

    Raises:
        LaunchError: it has ended already, or goes on where we cannot reach it.
        QueueError: Slurm is unreachable.
    """
    if read_state(run) not in LIVE:
        raise LaunchError(f"{run.root} is not running: {read_state(run).lower()}")
    run.cancel_file.touch()
    record, job = read_record(run), slurm_job(run)
    if record is not None and record.slurm_id is not None and job is not None and job.state in WAITING | ACTIVE:
        ask_to_stop(record.slurm_id)
        return
    pid = _supervisor(run, record)
    if pid is None:
        raise LaunchError(f"{run.root} runs under a launcher of its own or elsewhere; stop it there")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _supervisor(run: RunDir, record: JobRecord | None) -> int | None:
    """Process id of a supervisor on this machine; a lock that is held says that it is still that process."""
    if record is not None and record.pid is not None and run.is_launched():
        return record.pid
    with suppress(OSError, ValueError, IndexError):
        attempt = json.loads(run.attempts_file.read_text().splitlines()[-1])
        if run.is_supervised() and attempt["host"] == socket.gethostname():
            return int(attempt["supervisor_pid"])
    return None
