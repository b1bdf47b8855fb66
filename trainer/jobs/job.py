"""Submit runs, wait for them, come back to them: the interface for driver scripts.

    job = submit("recipe.yaml")
    outcome = job.wait()
    job = reconnect_and_wait("runs/my_run")     # in another process, whatever has happened meanwhile

There is no daemon: the state of a job is what its run directory says, and Slurm's queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar, final

from trainer.config.load import load_recipe
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, JobTimeoutError, LaunchError, QueueError
from trainer.jobs.slurm_script import SlurmOptions
from trainer.jobs.start import refuse_live, restart_job, start_job, stop_job
from trainer.jobs.state import LIVE, JobState, is_alive, read_record, read_state, waiting_reason
from trainer.launch.local import refuse_many_machines
from trainer.planning.plan import Plan, make_plan
from trainer.run.directory import Outcome, RunDir, open_run
from trainer.run.find import find_run

__all__ = ["Job", "JobState", "Outcome", "SlurmOptions", "find_job", "jobs", "reconnect_and_wait", "submit"]

T = TypeVar("T")
UNREADABLE_S: Final = 120.0
"""How long an unreadable state is asked for again."""
TAIL_LINES: Final = 20


@final
@dataclass(frozen=True)
class Job:
    """A submitted run."""

    id: str
    """What `trainer` commands and `reconnect_and_wait` take: the run directory as it was named."""
    run_dir: Path
    """runs/<name>/."""

    def state(self) -> JobState:
        """The state now.

        Raises:
            QueueError: Slurm could not be asked.
            OSError: the run directory could not be read.
        """
        return read_state(RunDir(self.run_dir))

    def wait(self, timeout_s: float | None = None, poll_interval_s: float = 1.0) -> Outcome:
        """Wait until nobody runs it and nobody is about to; a requeued Slurm job is waited for further.

        Args:
            timeout_s: seconds; without limit when None.
            poll_interval_s: seconds between two looks.

        Raises:
            JobTimeoutError: it goes on.
            QueueError: Slurm could not be asked for two minutes.
        """
        end = _deadline(timeout_s)
        while True:
            state = _patiently(self.state, UNREADABLE_S, poll_interval_s)
            if state not in LIVE:
                return _outcome(RunDir(self.run_dir), state)
            if time.monotonic() > end:
                raise JobTimeoutError(f"{self.id}: {state.lower()} after {timeout_s:g} s; it goes on")
            time.sleep(poll_interval_s)

    def cancel(self) -> None:
        """Ask it to save and end. Only `reconnect_and_wait`, `submit` or `trainer train` starts it again.

        Raises:
            LaunchError: it is not running, or goes on where it cannot be reached.
            QueueError: Slurm could not be asked.
        """
        stop_job(RunDir(self.run_dir))


def submit(
    recipe: str | Path,
    launcher: Literal["local", "slurm"] = "local",
    *,
    set: Sequence[str] = (),
    shape: str | None = None,
    name: str | None = None,
    slurm: SlurmOptions | None = None,
) -> Job:
    """Freeze the plan and start the run; returns at once. A finished run is left as it is, an interrupted one goes on.

    Args:
        recipe: file.
        launcher: a process on this machine that outlives the caller, or Slurm.
        set: overrides, `key=value`.
        shape: training shape instead of the recipe's.
        name: of the run instead of the recipe's.
        slurm: partition, time limit and other options of sbatch.

    Raises:
        RecipeError: the recipe cannot be used.
        RunConflictError: the run directory holds another run.
        LaunchError: the run goes on already, or sbatch refuses it.
        QueueError: Slurm is unreachable.
    """
    plan = make_plan(load_recipe(Path(recipe), set), shape)
    return submit_plan(plan, launcher, name=name, slurm=slurm)


def submit_plan(
    plan: Plan, launcher: Literal["local", "slurm"], *, name: str | None, slurm: SlurmOptions | None
) -> Job:
    """The same with a plan that is made already."""
    if launcher == "local":
        refuse_many_machines(plan)
    there = RunDir(Path("runs") / (name or plan.recipe.name))
    if there.plan_file.exists():
        refuse_live(there)  # before its plan is replaced
    run = open_run(plan, name)
    if not run.is_finished(plan.steps):
        start_job(run, launcher, slurm)
    return Job(str(run.root), run.root)


def find_job(job_id: str) -> Job:
    """The job of this id, run name or run directory, as it is; starts nothing.

    Raises:
        LaunchError: there is none; names those that are.
    """
    run = find_run(job_id)
    return Job(str(run.root), run.root)


def reconnect_and_wait(
    job_id: str,
    poll_interval_s: float = 5.0,
    timeout_s: float = 600.0,
    max_wait_for_resumable_s: float = 120.0,
    pending_timeout_s: float | None = None,
) -> Job:
    """Come back to a run after anything: join it where it goes on, resume it where it does not.

    A running job is joined once its heartbeat is fresh. A preempted, failed or cancelled one is resumed from its newest
    valid checkpoint, as it was submitted, and awaited until it has made a step. Never is a second attempt started
    beside a live one.

    Args:
        job_id: `Job.id`, or a run's name or directory.
        poll_interval_s: seconds between two looks.
        timeout_s: seconds in all.
        max_wait_for_resumable_s: seconds for which a state that cannot be read is asked for again.
        pending_timeout_s: seconds in the queue; `timeout_s` when None.

    Returns:
        The job; COMPLETED at once where there is nothing left to do.

    Raises:
        LaunchError: no such run; or the last attempt failed by what the user must change, or failed after the resume.
        JobTimeoutError: it goes on, but did not get there in time.
        QueueError: Slurm could not be asked.
        OSError: the run directory could not be read.
    """
    job = find_job(job_id)
    run = RunDir(job.run_dir)
    run.read_plan()
    end, pending_end = _deadline(timeout_s), _deadline(timeout_s if pending_timeout_s is None else pending_timeout_s)
    started: _Resumed | None = None
    while True:
        state = _patiently(job.state, max_wait_for_resumable_s, poll_interval_s)
        if state == "COMPLETED":
            return job
        if state == "RUNNING":
            pending_end = _deadline(timeout_s if pending_timeout_s is None else pending_timeout_s)
            if is_alive(run) and (started is None or started.has_made_a_step(run)):
                return job
        elif state != "PENDING":
            if started is not None and state != "PREEMPTED":
                raise LaunchError(f"{job.id}: resumed, and ended before a step: {_outcome(run, state).message}")
            started = _resume(run, state, max_wait_for_resumable_s, poll_interval_s)
        now = time.monotonic()
        if now > end or (state == "PENDING" and now > pending_end):
            reason = waiting_reason(run) if state == "PENDING" else None
            raise JobTimeoutError(f"{job.id}: still {state.lower()}{f' ({reason})' if reason else ''}; it goes on")
        time.sleep(min(poll_interval_s, max(0.0, end - now)))


def jobs(runs_dir: Path = Path("runs")) -> list[Job]:
    """Every submitted run here, the oldest submission first."""
    found = []
    for root in runs_dir.glob("*"):
        record = read_record(RunDir(root)) if (root / "plan.json").is_file() else None
        if record is not None:
            found.append((record.time, Job(str(root), root)))
    return [job for _, job in sorted(found, key=lambda entry: entry[0])]


@final
@dataclass(frozen=True)
class _Resumed:
    """Where the run stood as it was started again."""

    attempt: int
    step: int

    def has_made_a_step(self, run: RunDir) -> bool:
        beat = run.read_heartbeat()
        return beat is not None and beat["attempt"] > self.attempt and beat["step"] > self.step


def _resume(run: RunDir, state: JobState, patience_s: float, poll_s: float) -> _Resumed | None:
    """Start the run again; None where somebody else was faster."""
    outcome = _outcome(run, state)
    if state == "FAILED" and outcome.exit_code == EXIT_USER:
        raise LaunchError(
            f"{run.root} cannot be resumed, since another attempt would end alike: {outcome.message}\n"
            "Mend it, then submit or train the run again."
        )
    stood = _Resumed(run.newest_attempt(), max(0, run.newest_checkpoint_step()))
    try:
        _patiently(lambda: restart_job(run), patience_s, poll_s)
    except LaunchError:
        if read_state(run) in LIVE:
            return None
        raise
    return stood


def _outcome(run: RunDir, state: JobState) -> Outcome:
    """What the run said at its end, or would have."""
    outcome = run.read_outcome()
    if outcome is not None:
        return outcome
    step = max(0, run.newest_checkpoint_step())
    if state == "CANCELLED":
        return Outcome("cancelled", step, "cancelled before it could say so", EXIT_PREEMPTED)
    if state == "PREEMPTED":
        return Outcome("preempted", step, "the machine was taken away without a word", EXIT_PREEMPTED)
    log = run.of_job("logs/supervisor.log")
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.is_file() else ""
    text = f"ended without a word; see {log.parent}/" + (f":\n{tail}" if tail else "")
    return Outcome("failed", step, text, EXIT_FAILED, is_transient=True)


def _patiently(ask: Callable[[], T], patience_s: float, poll_s: float) -> T:
    """Ask again while the answer cannot be had, so long."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except (OSError, QueueError):
            if time.monotonic() > end:
                raise
        time.sleep(poll_s)


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
