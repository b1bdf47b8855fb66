"""A project directory as a user has it, and the commands they type in it: real processes, nothing is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil

T = TypeVar("T")

PATIENCE_S: Final = 240
"""A command alone takes ten seconds; on a busy machine many times that."""
BIN: Final = Path(sys.executable).parent
TINY: Final[dict[str, Any]] = {
    "name": "tiny",
    "method": "sft",
    "model": {"path": "model", "compute_dtype": "float32"},
    "lora": {"rank": 4, "alpha": 8},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_seq_tokens": 128},
    "rows_per_step": 4,
    "steps": 6,
    "optimizer": {"learning_rate": 1e-2},
    "eval_interval": 2,
    "dcp_save_interval": 2,
    "shape": "cpu",
}
LONG: Final[dict[str, Any]] = {"name": "long", "steps": 60, "eval_interval": 20, "dcp_save_interval": 2}
"""Long enough (some seconds) for a signal to arrive in the middle, saving half of the time."""


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """Everything it printed, for messages."""
        return f"exit {self.code}\n{self.stdout}\n{self.stderr}"


@dataclass
class Running:
    """A command that goes on, the leader of a session of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the command, or to its whole process group."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> Done:
        """Wait for its end."""
        self.process.wait(timeout_s)
        return Done(self.process.returncode, self.out.read_text(), self.err.read_text())


@dataclass
class Run:
    """What a run directory says."""

    root: Path

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        file = self.root / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def values(self) -> list[dict[str, Any]]:
        """What must be equal between equal runs: everything but times and rates."""
        return [
            {name: value for name, value in record.items() if name != "time" and not name.startswith("perf/")}
            for record in self.metrics()
        ]

    def steps(self) -> list[int]:
        return [record["step"] for record in self.metrics()]

    def outcome(self) -> dict[str, Any]:
        return dict(json.loads((self.root / "outcome.json").read_text()))

    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "attempts.jsonl").read_text().splitlines()]

    def adapter(self, name: str = "adapter") -> bytes:
        return (self.root / name / "adapter_model.safetensors").read_bytes()

    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(int(path.name[5:]) for path in (self.root / "checkpoints").glob("step-??????"))

    def newest_checkpoint(self) -> Path:
        return self.root / "checkpoints" / f"step-{self.checkpoints()[-1]:06d}"

    def log(self) -> str:
        """Everything that supervised workers said."""
        return "".join(file.read_text() for file in sorted((self.root / "logs").iterdir()))

    def worker_pid(self) -> int:
        """The process that holds the run's lock."""
        inode = (self.root / "lock").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            if "FLOCK" in line and line.split()[5].endswith(f":{inode}"):
                return int(line.split()[4])
        raise LookupError(f"nobody holds {self.root}/lock")


@contextmanager
def paused(run: Run) -> Iterator[None]:
    """Let the run stand still within the block, so that it is not finished before what is done there."""
    worker = run.worker_pid()
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


@dataclass
class Project:
    """The directory and its environment."""

    root: Path
    started: list[Running] = field(default_factory=list)

    def recipe(self, file: str = "recipe.yaml", **changes: Any) -> str:
        """Write the tiny recipe with changes; `a__b=c` changes a field of a section."""
        recipe: dict[str, Any] = json.loads(json.dumps(TINY))
        for name, value in changes.items():
            *sections, last = name.split("__")
            place = recipe
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = deepcopy(value)  # or a later change would reach into the test's constants
        (self.root / file).write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        return file

    def run(self, name: str) -> Run:
        return Run(self.root / "runs" / name)

    def trainer(self, *arguments: str) -> Done:
        """Run a `trainer` command to its end."""
        return self.start_trainer(*arguments).wait()

    def worker(self, *arguments: str) -> Done:
        """Run one rank by hand, to its end: what a launcher starts, without its three seconds."""
        return self.start_worker(*arguments).wait()

    def start_trainer(self, *arguments: str) -> Running:
        return self.start([str(BIN / "trainer"), *arguments])

    def start_worker(self, *arguments: str) -> Running:
        return self.start([sys.executable, "-m", "trainer.worker", *arguments])

    def start(self, argv: list[str], environment: Mapping[str, str] | None = None) -> Running:
        """Start a command in a session of its own, one thread a process."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRAINER_", "PYTEST_"))}
        ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_SILENT": "true"}
        out, err = (self.root / f".{len(self.started)}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                argv,
                cwd=self.root,
                env=clean | ours | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.started.append(Running(process, out, err))
        return self.started[-1]

    def processes(self) -> list[psutil.Process]:
        """Every living process that works in this directory, orphans too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == self.root:
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess):
                continue
        return found

    def kill_all(self) -> None:
        """As a machine that dies."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for running in self.started:
            running.process.wait(30)


def wait_for(what: Callable[[], T], running: Running | None = None, *, poll_s: float = 0.02) -> T:
    """Wait until something is true, and return it; fails at once where the command has ended."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        has_ended = running is not None and running.process.poll() is not None
        found = what()
        if found:
            return found
        if has_ended:
            assert running is not None
            raise AssertionError(f"ended before it came to that: {running.wait().said}")
        time.sleep(poll_s)
    raise AssertionError(f"did not happen in {PATIENCE_S} s")


def is_at_step(run: Run, step: int) -> Callable[[], bool]:
    """Whether the run has logged so many steps."""
    return lambda: (run.steps() or [0])[-1] >= step
