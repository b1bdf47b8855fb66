"""Submit runs, wait for them, reconnect to them: the interface for driver scripts.

    job = submit("recipe.yaml")
    outcome = job.wait()
    job = reconnect_and_wait("runs/my_run")     # in any process, at any later time
    model = job.export(merge=True)

There is no daemon: a job's state follows from its run directory and Slurm's queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, JobTimeoutError, LaunchError, QueueError
from trainer.jobs.delete import delete_run
from trainer.jobs.logs import log_lines
from trainer.jobs.results import GgufKind, export_weights, metric_records, trained_weights
from trainer.jobs.slurm_script import SlurmOptions
from trainer.jobs.start import refuse_live, restart_job, start_job, stop_job
from trainer.jobs.state import Launcher, observe, read_record, read_state, waiting_reason
from trainer.launch.local import refuse_many_machines
from trainer.planning.plan import Plan
from trainer.retry import retry
from trainer.run.best import BestValue, best_value
from trainer.run.directory import RunDir
from trainer.run.find import RUNS, all_runs, find_run, named_run, open_run
from trainer.run.metrics_reader import Record
from trainer.run.plan_recipe import plan_recipe
from trainer.run.polling import pauses
from trainer.run.pulse import Pulse
from trainer.run.state import JobState, Outcome, RunState

T = TypeVar("T")
UNREADABLE_S: Final = 120.0
"""How long reading a state is retried."""
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
        """Its state now.

        Raises:
            QueueError: Slurm could not be asked.
            OSError: the run directory could not be read.
        """
        return read_state(RunDir(self.run_dir))

    def wait(
        self,
        timeout_s: float | None = None,
        poll_interval_s: float = 1.0,
        on_metrics: Callable[[Record], None] | None = None,
    ) -> Outcome:
        """Wait until the run ends; a job that Slurm requeues has not ended.

        Args:
            timeout_s: seconds; no limit when None.
            poll_interval_s: seconds between two checks.
            on_metrics: called with each record of metrics.jsonl that is written from now on.

        Raises:
            JobTimeoutError: it has not ended in time, and continues.
            QueueError: Slurm could not be asked for two minutes.
        """
        end = _deadline(timeout_s)
        metrics = RunDir(self.run_dir).metrics_reader()
        while True:
            state = _retried(lambda: observe(RunDir(self.run_dir)), UNREADABLE_S, poll_interval_s)
            if on_metrics is not None:
                for record in metrics.poll():
                    on_metrics(record)
            if not state.is_live:
                return _outcome(RunDir(self.run_dir), state)
            if time.monotonic() > end:
                raise JobTimeoutError(f"{self.id}: {state.job.lower()} after {timeout_s:g} s; it continues")
            time.sleep(poll_interval_s)

    def cancel(self) -> None:
        """Ask it to save and end. Only `reconnect_and_wait`, `submit` or `trainer train` starts it again.

        Raises:
            LaunchError: it is not running, or runs where it cannot be reached.
            QueueError: Slurm could not be asked.
        """
        stop_job(RunDir(self.run_dir))

    def metrics(self, *, follow: bool = False, poll_interval_s: float = 1.0) -> Iterator[Record]:
        """Yield the records of metrics.jsonl, one per step.

        After a return to a checkpoint, the steps that are repeated are yielded again.

        Args:
            follow: go on with new records until the run ends.
            poll_interval_s: seconds between two looks.
        """
        return metric_records(RunDir(self.run_dir), follow=follow, poll_s=poll_interval_s)

    def logs(self, attempt: int | None = None, *, follow: bool = False, poll_interval_s: float = 0.5) -> Iterator[str]:
        """Yield the lines that an attempt printed.

        Args:
            attempt: its number, from 1; the newest when None.
            follow: go on with new lines, and with later attempts, until the run ends.
            poll_interval_s: seconds between two looks.

        Raises:
            LaunchError: there is no such log.
        """
        return log_lines(RunDir(self.run_dir), attempt, follow=follow, poll_s=poll_interval_s)

    def attempts(self) -> list[dict[str, Any]]:
        """One record per process start, the oldest first: number, host, ranks, shape, versions."""
        return RunDir(self.run_dir).read_attempts()

    def best(self) -> BestValue | None:
        """The best held-out value so far; None before the first evaluation."""
        return best_value(RunDir(self.run_dir).comparable_metrics())

    def weights(self, *, best: bool = False) -> Path:
        """The directory of the trained weights, an adapter or a model.

        Args:
            best: those of the best held-out value, not the last.

        Raises:
            LaunchError: there are none yet.
        """
        return trained_weights(RunDir(self.run_dir), best=best)

    def export(
        self,
        out: str | Path | None = None,
        *,
        merge: bool = False,
        best: bool = False,
        checkpoint: int | None = None,
        gguf: GgufKind | None = None,
    ) -> Path:
        """Write a model from the trained weights and verify it; returns its directory.

        Args:
            out: output directory; inside the run directory when None.
            merge: merge the adapter into a copy of the base model.
            best: use the weights of the best held-out value, not the last.
            checkpoint: use the weights of the checkpoint of this step.
            gguf: write one GGUF file, for llama.cpp and Ollama, with weights of this type.

        Raises:
            UserError: there is nothing to export, or it would not compute what was trained.
        """
        return export_weights(RunDir(self.run_dir), out, merge=merge, best=best, checkpoint=checkpoint, gguf=gguf)

    def delete(self) -> None:
        """Delete the run directory with its checkpoints, weights and exports. Copies on a mirror stay.

        Raises:
            LaunchError: the run is live.
            QueueError: Slurm could not be asked whether it is.
        """
        delete_run(RunDir(self.run_dir))


def submit(
    recipe: str | Path,
    launcher: Launcher = "local",
    *,
    set: Sequence[str] = (),
    shape: str | None = None,
    name: str | None = None,
    slurm: SlurmOptions | None = None,
    overwrites: bool = False,
) -> Job:
    """Freeze the plan, start the run in the background, and return at once.

    An interrupted run is resumed; a finished one is left as it is.

    Args:
        recipe: path of the recipe.
        launcher: `local`, a process on this machine that outlives the caller, or `slurm`.
        set: overrides, such as `["steps=200"]`.
        shape: name of a training shape; the recipe's when None.
        name: name of the run; the recipe's when None.
        slurm: partition, time limit and other options of sbatch.
        overwrites: move another run of this name to <name>.old-N.

    Raises:
        RecipeError: the recipe cannot be used.
        RunConflictError: the run directory holds another run.
        LaunchError: the run is running already, or sbatch refuses it.
        QueueError: Slurm is unreachable.
    """
    plan = plan_recipe(Path(recipe), set, shape)
    return submit_plan(plan, launcher, name=name, slurm=slurm, overwrites=overwrites)


def submit_plan(
    plan: Plan, launcher: Launcher, *, name: str | None, slurm: SlurmOptions | None, overwrites: bool = False
) -> Job:
    """Like `submit`, with a plan that was made already.

    Args:
        plan: what to train.
        launcher: as in `submit`.
        name: as in `submit`.
        slurm: as in `submit`.
        overwrites: as in `submit`.
    """
    if launcher == "local":
        refuse_many_machines(plan)
    if slurm is not None:
        slurm.refuse_unusable()
    existing = named_run(plan.recipe.name if name is None else name)
    if existing.is_run():
        refuse_live(existing)  # before its plan is replaced
    run = open_run(plan, name, overwrites=overwrites)
    if not run.is_finished(plan.steps):
        start_job(run, launcher, slurm)
    return _job_of(run)


def _job_of(run: RunDir) -> Job:
    return Job(str(run.root), run.root)


def find_job(job_id: str) -> Job:
    """The job of this id, run name or run directory; starts nothing.

    Raises:
        LaunchError: there is none; names those that exist.
    """
    return _job_of(find_run(job_id))


def reconnect_and_wait(
    job_id: str,
    poll_interval_s: float = 5.0,
    timeout_s: float = 600.0,
    max_wait_for_resumable_s: float = 120.0,
    pending_timeout_s: float | None = None,
) -> Job:
    """Reconnect to a run: join it if it is running, resume it if it is not.

    A running job is joined once its heartbeat is fresh; one that is being cancelled is awaited first. A preempted,
    failed or cancelled one is resumed from its newest valid checkpoint, as it was submitted, and awaited until it has
    made a step. A second attempt is never started beside a running one.

    Args:
        job_id: `Job.id`, or a run's name or directory.
        poll_interval_s: seconds between two checks.
        timeout_s: seconds in all.
        max_wait_for_resumable_s: seconds for which reading the state is retried.
        pending_timeout_s: seconds in the queue; `timeout_s` when None.

    Returns:
        The job; at once when it is COMPLETED.

    Raises:
        LaunchError: no such run; or the last attempt failed with an error that the user must fix, or failed after the
            resume.
        JobTimeoutError: it was not joined in time, and continues.
        QueueError: Slurm could not be asked.
        OSError: the run directory could not be read.
    """
    job = find_job(job_id)
    run = RunDir(job.run_dir)
    run.read_plan()
    end, pending_end = _deadline(timeout_s), _deadline(timeout_s if pending_timeout_s is None else pending_timeout_s)
    resumed_from: _Position | None = None
    pulse = Pulse()
    while True:
        state = _retried(lambda: observe(run, pulse=pulse), max_wait_for_resumable_s, poll_interval_s)
        if state is RunState.FINISHED:
            return job
        if state.job == "RUNNING":
            pending_end = _deadline(timeout_s if pending_timeout_s is None else pending_timeout_s)
            is_past = resumed_from.is_passed(run) if resumed_from is not None else not run.cancel_file.exists()
            if pulse.is_alive(run) and is_past:  # a run that is being cancelled is awaited, then resumed
                return job
        elif not state.is_live:
            if resumed_from is not None and state is not RunState.PREEMPTED:
                raise LaunchError(f"{job.id}: resumed, but ended before a step: {_outcome(run, state).message}")
            resumed_from = _resume(run, state, max_wait_for_resumable_s, poll_interval_s)
        now = time.monotonic()
        if now > end or (state.job == "PENDING" and now > pending_end):
            reason = waiting_reason(run) if state.job == "PENDING" else None
            detail = f" ({reason})" if reason else ""
            raise JobTimeoutError(f"{job.id}: still {state.job.lower()}{detail}; it continues")
        time.sleep(min(poll_interval_s, max(0.0, end - now)))


def jobs(runs_dir: Path = RUNS) -> list[Job]:
    """Every run of a directory that was submitted, or started by `trainer train`; the oldest first."""
    started = sorted((time_s, run.name, run) for run in all_runs(runs_dir) if (time_s := _started(run)) is not None)
    return [_job_of(run) for _, _, run in started]


def _started(run: RunDir) -> float | None:
    """When the run was submitted; without a submission, when its plan was written. None where nothing began it."""
    record = read_record(run)
    if record is not None:
        return record.time
    has_begun = run.newest_attempt() > 0 or run.is_supervised()
    return run.plan_file.stat().st_mtime if has_begun else None


@final
@dataclass(frozen=True)
class _Position:
    """Where the run was when it was started again."""

    attempt: int
    step: int

    def is_passed(self, run: RunDir) -> bool:
        """Whether a later attempt has made a step."""
        beat = run.read_heartbeat()
        return beat is not None and beat.attempt > self.attempt and beat.step > self.step


def _resume(run: RunDir, state: RunState, retry_s: float, poll_s: float) -> _Position | None:
    """Start the run again; None where another process did so first."""
    outcome = _outcome(run, state)
    if state is RunState.FAILED and outcome.exit_code == EXIT_USER:
        raise LaunchError(
            f"{run.root} cannot be resumed: another attempt would fail the same way: {outcome.message}\n"
            "Fix the problem above, then submit or train the run again."
        )
    position = _Position(run.newest_attempt(), max(0, run.newest_checkpoint_step()))
    try:
        _retried(lambda: restart_job(run), retry_s, poll_s)
    except LaunchError:
        if observe(run).is_live:
            return None
        raise
    return position


def _outcome(run: RunDir, state: RunState) -> Outcome:
    """The outcome that the run wrote, or one that describes how it ended."""
    outcome = run.read_outcome()
    if outcome is not None:
        return outcome
    step = max(0, run.newest_checkpoint_step())
    if state is RunState.CANCELLED:
        return Outcome("cancelled", step, "cancelled before it wrote an outcome", EXIT_PREEMPTED)
    if state is RunState.PREEMPTED:
        return Outcome("preempted", step, "the machine was taken away before the run wrote an outcome", EXIT_PREEMPTED)
    log = run.of_job("logs/supervisor.log")
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.is_file() else ""
    text = f"ended without an outcome; see {run.logs}/" + (f":\n{tail}" if tail else "")
    return Outcome("failed", step, text, EXIT_FAILED, is_transient=True)


def _retried(operation: Callable[[], T], timeout_s: float, poll_s: float) -> T:
    """Retry while the file system or Slurm's controller does not answer."""
    return retry(
        operation,
        is_transient=lambda error: isinstance(error, OSError | QueueError),
        pauses_s=pauses(poll_s, timeout_s),
    )


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
