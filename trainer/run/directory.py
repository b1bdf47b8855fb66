"""The run directory: the only module that spells paths under runs/<name>/."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from trainer.errors import LaunchError, RunConflictError, TrainerError
from trainer.files import fsync_dir, make_directory, write_atomically
from trainer.planning.plan import Plan, parse_plan

State = Literal["finished", "preempted", "cancelled", "failed"]
JobFile = Literal["job.json", "job.sh", "launch.lock", "logs/supervisor.log", "logs/slurm-%j.log"]
HEARTBEAT_S = 10.0
LAUNCHER = "TRAINER_LAUNCHER"
"""Environment variable that names who started a worker."""
SUPERVISOR = "trainer train"
"""Its value where the run is supervised."""
SUPERVISOR_PID = "TRAINER_SUPERVISOR_PID"
"""Environment variable with the supervisor's process id."""
SHUTDOWN_TIMEOUT = "TRAINER_SHUTDOWN_TIMEOUT_S"
"""Environment variable of who gives torchrun another --shutdown-timeout."""
STACKS_SIGNAL = signal.SIGUSR2
"""A worker that gets it writes the stacks of its threads to its log, even one that holds the interpreter."""
RECORD_BYTES = 2**16
"""No record of metrics.jsonl is longer."""
PROBE_S = 1.0
"""Whoever looks whether a lock is taken holds it for a moment; taking it tries for so long."""


@final
@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; written last."""

    state: State
    step: int
    message: str
    exit_code: int
    is_transient: bool = False
    """Whether another attempt could end otherwise: a crash, not a mistake."""


@final
@dataclass(frozen=True)
class RunDir:
    """runs/<name>/ and everything in it."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def plan_file(self) -> Path:
        """Identity and resolved values."""
        return self.root / "plan.json"

    @property
    def attempts_file(self) -> Path:
        """One line per process start."""
        return self.root / "attempts.jsonl"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints."""
        return self.root / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Directory of the journal."""
        return self.root / "rollouts"

    @property
    def begun_file(self) -> Path:
        """A line for each chunk that was begun."""
        return self.rollouts / "begun.jsonl"

    @property
    def outcome_file(self) -> Path:
        """How the last attempt ended."""
        return self.root / "outcome.json"

    @property
    def cancel_file(self) -> Path:
        """Exists where the user cancelled the run: nobody restarts it but the user."""
        return self.root / "cancelled"

    @property
    def excluded_file(self) -> Path:
        """Rows that the run leaves out since their loss was not finite."""
        return self.root / "excluded.json"

    @property
    def heartbeat_file(self) -> Path:
        """Sign of life."""
        return self.root / "heartbeat.json"

    @property
    def tracker_file(self) -> Path:
        """What the W&B mirror has received."""
        return self.root / "wandb.json"

    def of_job(self, name: JobFile) -> Path:
        """What `submit` leaves: how it was submitted, batch script, lock of the process that it started, its output."""
        return self.root / name

    def weights(self, *, is_lora: bool, best: bool = False) -> Path:
        """Directory of the last or the best trained weights."""
        return self.root / (("adapter" if is_lora else "model") + ("-best" if best else ""))

    def checkpoint(self, step: int) -> Path:
        """Directory of one checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, valid or not, ascending."""
        return sorted(int(entry.name[5:]) for entry in self.checkpoints.glob("step-*/") if entry.name[5:].isdigit())

    def newest_checkpoint_step(self) -> int:
        """The last of them; -1 where there is none."""
        return max(self.checkpoint_steps(), default=-1)

    def journal(self, step: int) -> Path:
        """Directory of one step's rollouts."""
        return self.rollouts / f"step-{step:06d}"

    def journal_chunk(self, step: int, number: int) -> Path:
        """One chunk of it."""
        return self.journal(step) / f"chunk-{number:04d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """Held-out answers after a step."""
        return self.root / "evaluations" / f"step-{step:06d}.jsonl"

    def log_file(self, attempt: int) -> Path:
        """What one attempt printed."""
        return self.root / "logs" / f"attempt-{attempt}.log"

    def read_plan(self) -> Plan:
        """The frozen plan.

        Raises:
            LaunchError: this is no run directory.
        """
        try:
            return parse_plan(self.plan_file.read_bytes())
        except FileNotFoundError:
            raise LaunchError(f"{self.root}: no plan.json, not a run directory") from None
        except ValueError as error:
            raise LaunchError(f"{self.plan_file}: not a plan of this version: {error}") from None

    def read_outcome(self) -> Outcome | None:
        """How the last attempt ended; None while one runs or before the first."""
        try:
            return Outcome(**json.loads(self.outcome_file.read_text()))
        except FileNotFoundError:
            return None

    def is_finished(self, steps: int) -> bool:
        """Whether the run has come to its end, of so many steps."""
        outcome = self.read_outcome()
        return outcome is not None and outcome.state == "finished" and outcome.step >= steps

    def write_outcome(self, outcome: Outcome) -> None:
        """Say how this attempt ended."""
        write_atomically(self.outcome_file, json.dumps(outcome.__dict__) + "\n")

    def write_heartbeat(self, attempt: int, step: int, phase: str) -> None:
        """Say that the run lives."""
        beat = {"attempt": attempt, "step": step, "phase": phase, "time": time.time()}
        write_atomically(self.heartbeat_file, json.dumps(beat) + "\n", durable=False)

    def read_heartbeat(self) -> dict[str, Any] | None:
        """The last sign of life."""
        try:
            return dict(json.loads(self.heartbeat_file.read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's metrics; a half-written last line is left out."""
        try:
            lines = self.metrics_file.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1] if line.strip()]

    def read_excluded(self) -> frozenset[str]:
        """File and line of each row that the run leaves out."""
        try:
            return frozenset(json.loads(self.excluded_file.read_text())["rows"])
        except FileNotFoundError:
            return frozenset()

    def write_excluded(self, rows: Iterable[str], step: int) -> None:
        """Leave rows out from the newest checkpoint on.

        Args:
            rows: file and line of each.
            step: at which that was decided.
        """
        write_atomically(self.excluded_file, json.dumps({"rows": sorted(rows), "decided_at_step": step}, indent=1))

    def newest_record(self) -> dict[str, Any] | None:
        """The last whole record of metrics.jsonl, read from its end; None before the first."""
        try:
            with self.metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - RECORD_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        return dict(json.loads(lines[-1])) if lines else None

    def newest_logged_step(self) -> int:
        """Step of the last whole record of metrics.jsonl; 0 before the first."""
        return int((self.newest_record() or {"step": 0})["step"])

    def take_attempt(self, about: Mapping[str, Any]) -> int:
        """Take the next attempt number; whoever creates its file has it.

        A commit or a metrics append by an attempt that is not the newest aborts, so that two attempts never mix.
        """
        fence = self.root / "fence"
        make_directory(fence)
        while True:
            number = self.newest_attempt() + 1
            try:
                (fence / f"{number:06d}").touch(exist_ok=False)
            except FileExistsError:
                continue
            fsync_dir(fence)
            with self.attempts_file.open("a") as file:
                file.write(json.dumps({"attempt": number, **about}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            return number

    def newest_attempt(self) -> int:
        """Highest attempt number taken; 0 before the first."""
        fence = self.root / "fence"
        return max((int(file.name) for file in fence.iterdir()), default=0) if fence.is_dir() else 0

    def refuse_stale(self, attempt: int) -> None:
        """Stop an attempt that is no longer the newest.

        Raises:
            TrainerError: another attempt has taken the run over.
        """
        newest = self.newest_attempt()
        if newest != attempt:
            raise TrainerError(f"{self.root}: attempt {newest} has taken over; attempt {attempt} stops")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the run within the block.

        Raises:
            LaunchError: another process owns it.
        """
        with self._holding("lock"):
            yield

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Be the run's only supervisor within the block; its worker stops when the supervisor is gone.

        Raises:
            LaunchError: another process supervises it.
        """
        with self._holding("supervisor.lock"):
            yield

    @contextmanager
    def launching(self) -> Iterator[int]:
        """Be the only one who starts the run, or raise; a process that inherits the file handle goes on being it."""
        with self._holding("launch.lock") as handle:
            yield handle

    @contextmanager
    def _holding(self, name: str) -> Iterator[int]:
        with (self.root / name).open("a") as file:
            end = time.monotonic() + PROBE_S
            while not _try_lock(file.fileno(), fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise LaunchError(
                        f"{self.root}: another attempt is running. "
                        f"Wait for it, or stop it first (trainer status {self.root})"
                    )
                time.sleep(0.02)
            yield file.fileno()

    def wait_unlocked(self, poll_s: float = 0.05, timeout_s: float = float("inf")) -> bool:
        """Wait until no process owns the run."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not self.is_locked():
                return True
            time.sleep(poll_s)
        return False

    def is_locked(self) -> bool:
        """Whether a process owns the run."""
        return self._is_held("lock")

    def is_supervised(self) -> bool:
        """Whether a `trainer train` watches the run."""
        return self._is_held("supervisor.lock")

    def is_launched(self) -> bool:
        """Whether a process that `submit` started lives."""
        return self._is_held("launch.lock")

    def refuse_taken(self) -> None:
        """Stop where another attempt runs.

        Raises:
            LaunchError: one does.
        """
        if self.is_locked() or self.is_supervised():
            raise LaunchError(f"{self.root}: another attempt is running. See: trainer status {self.root}")

    def _is_held(self, name: str) -> bool:
        try:
            with (self.root / name).open("rb") as file:
                return not _try_lock(file.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def open_run(plan: Plan, name: str | None = None, runs_dir: Path = Path("runs")) -> RunDir:
    """The run directory of a plan: a new one, or the same run to go on with.

    `steps`, intervals, evaluation, logging and the shape may differ; the new plan is kept.

    Raises:
        RunConflictError: the directory holds a run of another identity; shows the difference.
        LaunchError: it is running now.
    """
    run = RunDir(runs_dir / (name or plan.recipe.name))
    if not run.plan_file.exists():
        make_directory(run.root)
        write_atomically(run.plan_file, plan.dump())
        return run
    old = run.read_plan()
    if old.identity_hash != plan.identity_hash:
        lines = "\n".join(f"  {line}" for line in _differences(old.identity, plan.identity))
        raise RunConflictError(
            f"{run.root} holds another run; what differs:\n{lines}\n"
            "Give another --name, undo the change, or move the directory away."
        )
    run.refuse_taken()
    if old.dump() != plan.dump():
        write_atomically(run.plan_file, plan.dump())
    return run


def plan_changes(old: Plan, new: Plan) -> list[str]:
    """What differs between two plans of one identity."""
    return list(_differences(old.recipe.model_dump(), new.recipe.model_dump()))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
