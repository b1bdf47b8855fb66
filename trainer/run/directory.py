"""The run directory: every path under runs/<name>/. No other module spells a file name of it; a test demands that."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from trainer.errors import LaunchError
from trainer.files import fsync_dir, write_atomically
from trainer.planning.plan import Plan
from trainer.run import lock, readers
from trainer.run.metrics_reader import MetricsReader, Record, newest_records, read_records
from trainer.run.polling import wait_until
from trainer.run.readers import Heartbeat, HeldOut
from trainer.run.state import Outcome
from trainer.run.step_names import step_files_in, step_name, steps_in

SINKS_FILE: Final = "trackers.json"
JobFile = Literal["job.json", "job.sh", "logs/supervisor.log", "logs/slurm-%j.log"]
WEIGHTS = ("adapter", "adapter-best", "model", "model-best")
REFUSED = "refused-"
"""Begins the name of a step's rollouts that were set aside, because too many had no reward."""


@final
@dataclass(frozen=True)
class RunDir:
    """runs/<name>/ and everything in it."""

    root: Path

    # ---- paths

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
    def judge_answers(self) -> Path:
        """Directory of what judges answered, and the tokens it took."""
        return self.root / "judge"

    @property
    def outcome_file(self) -> Path:
        """How the last attempt ended."""
        return self.root / "outcome.json"

    @property
    def cancel_file(self) -> Path:
        """Exists where the user cancelled the run: only the user starts it again."""
        return self.root / "cancelled"

    @property
    def excluded_file(self) -> Path:
        """Rows that the run leaves out since their loss was not finite."""
        return self.root / "excluded.json"

    @property
    def held_out_file(self) -> Path:
        """Digest of the held-out rows, and since which step they are evaluated."""
        return self.root / "held_out.json"

    @property
    def token_cache(self) -> Path:
        """Directory of tokenized rows, beside the runs that share them."""
        return self.root.parent / ".tokens"

    @property
    def heartbeat_file(self) -> Path:
        """Heartbeat file."""
        return self.root / "heartbeat.json"

    @property
    def tracker_file(self) -> Path:
        """What Weights & Biases has received."""
        return self.root / "wandb.json"

    @property
    def tensorboard(self) -> Path:
        """Directory of TensorBoard's event file."""
        return self.root / "tensorboard"

    @property
    def logs(self) -> Path:
        """Directory of what attempts, supervisor and batch script printed."""
        return self.root / "logs"

    def log_file(self, attempt: int) -> Path:
        """What one attempt printed."""
        return self.logs / f"attempt-{attempt}.log"

    def server_log(self, attempt: int, number: int) -> Path:
        """What a server that one attempt started printed."""
        return self.logs / f"attempt-{attempt}.vllm-{number}.log"

    def submission_logs(self) -> list[Path]:
        """What submitted processes printed, the newest last."""
        files = [*self.logs.glob("supervisor.log"), *self.logs.glob("slurm-*.log")]
        return sorted(files, key=lambda file: file.stat().st_mtime)

    def of_job(self, name: JobFile) -> Path:
        """A file of `submit`: how the run was submitted, the batch script, what the submitted process printed."""
        return self.root / name

    def weights(self, *, is_lora: bool, best: bool = False) -> Path:
        """Directory of the last or the best trained weights."""
        return self.root / (("adapter" if is_lora else "model") + ("-best" if best else ""))

    def all_weights(self) -> list[Path]:
        """Every directory of trained weights that exists."""
        return [directory for name in WEIGHTS if (directory := self.root / name).is_dir()]

    def exported(self, kind: Literal["export", "merged", "gguf"]) -> Path:
        """Where `trainer export` writes unless told otherwise."""
        return self.root / kind

    def checkpoint(self, step: int) -> Path:
        """Directory of one checkpoint."""
        return self.checkpoints / step_name(step)

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, valid or not, ascending."""
        return steps_in(self.checkpoints)

    def newest_checkpoint_step(self) -> int:
        """Newest checkpoint step; -1 where there is none."""
        return max(self.checkpoint_steps(), default=-1)

    def unfinished_checkpoints(self) -> list[Path]:
        """Directories of checkpoints that are being written, or whose writer died."""
        return list(self.checkpoints.glob(".step-*.tmp"))

    def journal(self, step: int, *, refused: bool = False) -> Path:
        """Directory of one step's rollouts, or of those that were set aside."""
        return self.rollouts / f"{REFUSED if refused else ''}{step_name(step)}"

    def journal_steps(self, *, refused: bool = False) -> list[int]:
        """Steps that have rollouts, or some that were set aside, ascending."""
        return steps_in(self.rollouts, REFUSED if refused else "")

    def journal_chunk(self, step: int, number: int) -> Path:
        """One chunk of a step's rollouts."""
        return self.journal(step) / f"chunk-{number:04d}.jsonl"

    def journal_chunks(self, step: int, *, refused: bool = False) -> list[Path]:
        """The chunks of a step that were written, in order; compressed ones end in `.jsonl.gz`."""
        of_step = self.journal(step, refused=refused)
        files = {file.name.removesuffix(".gz"): file for file in of_step.glob("chunk-*.gz")}
        files |= {file.name: file for file in of_step.glob("chunk-*.jsonl")}
        return [file for _, file in sorted(files.items())]

    def evaluation(self, step: int) -> Path:
        """Held-out answers after a step."""
        return self.root / "evaluations" / f"{step_name(step)}.jsonl"

    def evaluation_steps(self) -> list[int]:
        """Steps after which held-out prompts were answered, ascending."""
        return step_files_in(self.root / "evaluations")

    def answers(self, step: int) -> Path:
        """Answers of an sft run to a few rows after a step."""
        return self.root / "answers" / f"{step_name(step)}.jsonl"

    def answer_steps(self) -> list[int]:
        """Steps after which an sft run answered a few rows, ascending."""
        return step_files_in(self.root / "answers")

    # ---- contents: readers.py, metrics_reader.py

    def is_run(self) -> bool:
        """Whether the directory holds a run."""
        return self.plan_file.is_file()

    def write_plan(self, plan: Plan) -> None:
        """Replace the plan by one of the same identity."""
        write_atomically(self.plan_file, plan.dump())

    def read_plan(self) -> Plan:
        """The frozen plan."""
        return readers.read_plan(self.plan_file)

    def read_outcome(self) -> Outcome | None:
        """How the last attempt ended; None while one runs or before the first."""
        return readers.read_outcome(self.outcome_file)

    def write_outcome(self, outcome: Outcome) -> None:
        """Write how this attempt ended."""
        readers.write_outcome(self.outcome_file, outcome)

    def has_made_step(self) -> bool:
        """Whether the run has trained: a later start with other inputs would lose something."""
        is_logged = self.newest_logged_step() > 0 or self.newest_checkpoint_step() > 0
        return is_logged or any(not directory.name.endswith("-best") for directory in self.all_weights())

    def discard_start(self) -> None:
        """Delete what an attempt has left that made no step; logs and attempt numbers stay."""
        files = (self.metrics_file, self.outcome_file, self.cancel_file, self.excluded_file)
        for file in (*files, self.held_out_file, self.heartbeat_file, self.tracker_file, self.root / SINKS_FILE):
            file.unlink(missing_ok=True)
        for directory in (
            self.checkpoints,
            self.rollouts,
            self.root / "evaluations",
            self.root / "answers",
            *self.all_weights(),
        ):
            shutil.rmtree(directory, ignore_errors=True)

    def move_aside(self) -> Path:
        """Rename the directory to <name>.old-N; returns the new path."""
        number = 1
        while (aside := self.root.with_name(f"{self.name}.old-{number}")).exists():
            number += 1
        self.root.rename(aside)
        fsync_dir(aside.parent)
        return aside

    def is_finished(self, steps: int) -> bool:
        """Whether the run finished at least `steps` steps."""
        outcome = self.read_outcome()
        return outcome is not None and outcome.is_finished(steps)

    def read_heartbeat(self) -> Heartbeat | None:
        """The last heartbeat."""
        return readers.read_heartbeat(self.heartbeat_file)

    def write_heartbeat(self, attempt: int, step: int, phase: str) -> None:
        """Write a heartbeat of now."""
        readers.write_heartbeat(self.heartbeat_file, attempt, step, phase)

    def read_excluded(self) -> frozenset[str]:
        """Source (file:line) of each row that the run leaves out."""
        return readers.read_excluded(self.excluded_file)

    def write_excluded(self, rows: Iterable[str], step: int) -> None:
        """Leave rows out from the newest checkpoint on, as decided at a step."""
        readers.write_excluded(self.excluded_file, rows, step)

    def read_attempts(self) -> list[dict[str, Any]]:
        """One record per process start, the oldest first."""
        return readers.read_attempts(self.attempts_file)

    def read_metrics(self) -> list[Record]:
        """Every step's metrics. Reads the whole file: to poll use `metrics_reader`."""
        return read_records(self.metrics_file)

    def read_held_out(self) -> HeldOut | None:
        """Which held-out rows are evaluated; None before the first attempt, and in runs of earlier versions."""
        return readers.read_held_out(self.held_out_file)

    def write_held_out(self, held_out: HeldOut) -> None:
        """Write which held-out rows are evaluated."""
        readers.write_held_out(self.held_out_file, held_out)

    def comparable_metrics(self) -> list[Record]:
        """The metrics whose held-out values may be compared: those since the held-out rows were last replaced."""
        since = self._held_out_since()
        return [record for record in self.read_metrics() if record["step"] > since]

    def comparable_evaluation_steps(self) -> list[int]:
        """Steps after which the present held-out prompts were answered, ascending."""
        return [step for step in self.evaluation_steps() if step > self._held_out_since()]

    def _held_out_since(self) -> int:
        held_out = self.read_held_out()
        return -1 if held_out is None else held_out.since_step

    def metrics_reader(self, last: int = 0) -> MetricsReader:
        """A cursor in the metrics that begins with the `last` newest records."""
        return MetricsReader(self.metrics_file, last)

    def newest_records(self, number: int) -> list[Record]:
        """The last records of metrics.jsonl, in order, read from its end."""
        return newest_records(self.metrics_file, number)

    def newest_record(self) -> Record | None:
        """The last record of metrics.jsonl; None before the first."""
        return next(iter(self.newest_records(1)), None)

    def newest_logged_step(self) -> int:
        """Step of the last record of metrics.jsonl; 0 before the first."""
        record = self.newest_record()
        return 0 if record is None else int(record["step"])

    # ---- locks and fence: lock.py

    @property
    def _fence(self) -> Path:
        return self.root / "fence"

    def _lock_file(self, kind: Literal["", "supervisor.", "launch."]) -> Path:
        return self.root / f"{kind}lock"

    def take_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number, and note facts about this process start."""
        return lock.take_number(self._fence, self.attempts_file, facts)

    def note_attempt(self, attempt: int, facts: Mapping[str, Any]) -> None:
        """Add facts to the record of an attempt.

        Args:
            attempt: its number.
            facts: what is known only after the model was loaded.
        """
        readers.note_attempt(self.attempts_file, attempt, facts)

    def end_attempt(self, attempt: int, outcome: Outcome) -> None:
        """Write how the newest attempt ended: into its record, which stays, and into outcome.json."""
        try:
            self.note_attempt(attempt, readers.ended(outcome))
        finally:
            self.write_outcome(outcome)

    def newest_attempt(self) -> int:
        """Highest attempt number taken; 0 before the first."""
        return lock.newest_number(self._fence)

    def refuse_stale(self, attempt: int) -> None:
        """Stop an attempt that is no longer the newest, so that two attempts never mix."""
        lock.refuse_stale(self._fence, attempt)

    def _taken(self) -> str:
        return f"{self.root}: another attempt is running. See: trainer status {self.root}"

    def locked(self) -> AbstractContextManager[int]:
        """Hold the run within the block, as its attempt; LaunchError where another process does."""
        return lock.hold(self._lock_file(""), self._taken(), self.heartbeat_file)

    def supervised(self) -> AbstractContextManager[int]:
        """Be the run's only supervisor within the block; its worker stops when the supervisor is gone."""
        return lock.hold(self._lock_file("supervisor."), self._taken(), self.heartbeat_file)

    def launching(self) -> AbstractContextManager[int]:
        """Be the only process that starts the run; a child that inherits the yielded handle keeps the lock."""
        return lock.hold(self._lock_file("launch."), self._taken(), self.heartbeat_file)

    def hand_launch_to(self, pid: int) -> None:
        """Say that a child holds the launch lock that it inherited."""
        lock.hand_over(self._lock_file("launch."), pid)

    def is_locked(self) -> bool:
        """Whether an attempt holds the run."""
        return lock.is_held(self._lock_file(""), self.heartbeat_file)

    def is_supervised(self) -> bool:
        """Whether a `trainer train` supervises the run."""
        return lock.is_held(self._lock_file("supervisor."), self.heartbeat_file)

    def is_launched(self) -> bool:
        """Whether a process that `submit` started lives."""
        return lock.is_held(self._lock_file("launch."), self.heartbeat_file)

    def wait_unlocked(self, poll_s: float = 0.05, timeout_s: float = float("inf")) -> bool:
        """Wait until no attempt holds the run; returns whether that came true in time."""
        return wait_until(lambda: not self.is_locked(), timeout_s=timeout_s, poll_s=poll_s)

    def refuse_taken(self) -> None:
        """Stop where the run is running.

        Raises:
            LaunchError: it is.
        """
        if self.is_locked() or self.is_supervised():
            raise LaunchError(self._taken())
