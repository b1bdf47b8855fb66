"""Starts an attempt under accelerate, passes signals on, shows progress, reads the outcome."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self, final

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, TrainerError
from trainer.launch.local import launch_argv
from trainer.launch.processes import descendants, shows_stacks
from trainer.planning.plan import Plan
from trainer.run.console import Console
from trainer.run.directory import HEARTBEAT_S, LAUNCHER, STACKS_SIGNAL, SUPERVISOR, SUPERVISOR_PID, Outcome, RunDir

POLL_S: Final = 0.2
STACKS_S: Final = 2.0
"""A frozen worker gets so long to write its stacks."""
START_S: Final = 120.0
"""A launcher that ended may leave a worker behind that has not taken the lock yet; it gets so long, if it lives."""
TAIL_LINES: Final = 30
FULL_BYTES: Final = 2**16
"""With less than that free, a disk is called full."""


@final
class StopSignals:
    """Within the block, what asks this process to stop is kept and passed on, also between two attempts."""

    def __init__(self) -> None:
        """Nobody has asked."""
        self.was_asked = False
        self.is_hurried = False
        """Ctrl-C came twice: nothing is waited for."""
        self.pass_on: Callable[[], object] = lambda: None
        """Called at each signal."""
        self._was_interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Catch them."""
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._on_signal) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        """As before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.was_asked = True
        self.is_hurried |= number == signal.SIGINT and self._was_interrupted
        if number == signal.SIGINT and not self._was_interrupted:
            self._was_interrupted = True
            sys.stderr.write("\nstopping after this step, saved; Ctrl-C again stops at once\n")
        self.pass_on()

    def wait(self, seconds: float) -> bool:
        """Wait; returns at once, and True, when asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.was_asked:
            time.sleep(min(POLL_S, seconds))
        return self.was_asked


@final
class Supervisor:
    """One attempt, from start to outcome."""

    def __init__(self, plan: Plan, run: RunDir, stop: StopSignals) -> None:
        """Prepare to launch the run's plan."""
        self.plan, self.run, self.stop = plan, run, stop
        self.process: subprocess.Popen[bytes] | None = None
        self.number = run.newest_attempt() + 1
        self._launcher_ended: float | None = None
        self._was_frozen = False
        self._last_beat: dict[str, Any] | None = None
        self._last_beat_at = 0.0

    def attempt(self) -> Outcome:
        """Launch, watch and wait; returns how it ended."""
        self.stop.pass_on = self._pass_on
        self.run.outcome_file.unlink(missing_ok=True)
        log = self.run.log_file(self.number)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {LAUNCHER: SUPERVISOR, SUPERVISOR_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                launch_argv(self.plan.shape, self.run.root),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone; we signal the whole group
            )
            if self.stop.was_asked:  # before there was a process
                self._signal_group(signal.SIGTERM)
            self._watch(Console(self.plan.steps))
        if self.run.is_locked():
            return Outcome("failed", 0, f"{self.run.root}: another attempt is running, started elsewhere", EXIT_USER)
        return self.run.read_outcome() or self._wordless(log)

    def _watch(self, console: Console) -> None:
        """Show new metrics until the worker has ended."""
        seen = len(self.run.read_metrics())
        while True:
            has_ended = self._has_ended()
            records = self.run.read_metrics()
            seen = min(seen, len(records))  # the worker may have gone back to its checkpoint
            for record in records[seen:]:
                console.show(record)
            seen = len(records)
            if has_ended:
                return
            self._end_frozen()
            time.sleep(POLL_S)

    def _end_frozen(self) -> None:
        """Kill a worker that is stopped or holds its interpreter; one that only waits ends itself (watch.py)."""
        beat = self.run.read_heartbeat()
        if beat is None or beat["attempt"] < self.number or self.process is None:
            return
        if beat != self._last_beat:  # by our own clock: the machine's may be set meanwhile
            self._last_beat, self._last_beat_at = beat, time.monotonic()
        silent_s = time.monotonic() - self._last_beat_at
        if silent_s > self.plan.recipe.recovery.hang_timeout_s + 3 * HEARTBEAT_S and not self._was_frozen:
            self._was_frozen = True
            sys.stderr.write(f"\nno sign of life for {silent_s:.0f} s while {beat['phase']}: ending it\n")
            for pid in filter(shows_stacks, descendants(self.process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, STACKS_SIGNAL)
            time.sleep(STACKS_S)
            self._kill_tree()

    def _has_ended(self) -> bool:
        """Whether our worker has; accelerate may end before the worker that it started, which then has the lock."""
        assert self.process is not None
        if self.process.poll() is None:
            return False
        if self._launcher_ended is None:
            self._launcher_ended = time.monotonic()
        took_the_run = self.run.newest_attempt() >= self.number
        if self.run.is_locked():
            return took_the_run and not self._is_newest_ours()
        group_lives = self._signal_group(0) and time.monotonic() - self._launcher_ended < START_S
        return took_the_run or not group_lives

    def _is_newest_ours(self) -> bool:
        """Whether the newest attempt was started by this process."""
        try:
            newest = json.loads(self.run.attempts_file.read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return False
        return bool(newest.get("supervisor_pid") == os.getpid())

    def _wordless(self, log: Path) -> Outcome:
        """The outcome of a worker that wrote none; written for it."""
        records = self.run.read_metrics()
        step = int(records[-1]["step"]) if records else 0
        assert self.process is not None
        if self.stop.is_hurried:
            outcome = Outcome("cancelled", step, f"stopped at once; {self._kept()}", EXIT_FAILED)
        elif self.stop.was_asked:
            outcome = Outcome("preempted", step, f"stopped before it could save; {self._kept()}", EXIT_PREEMPTED)
        else:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            full = "; the disk is full" if shutil.disk_usage(self.run.root).free < FULL_BYTES else ""
            text = f"the worker ended without a word (launcher: {self.process.returncode}){full}; see {log}:\n{tail}"
            outcome = Outcome("failed", step, text, EXIT_FAILED, is_transient=True)
        with suppress(OSError, TrainerError), self.run.locked():  # unless another attempt has just begun
            self.run.write_outcome(outcome)
        return outcome

    def _kept(self) -> str:
        step = self.run.newest_checkpoint_step()
        return f"the last checkpoint is {self.run.checkpoint(step)}" if step >= 0 else "there is no checkpoint yet"

    def _pass_on(self) -> None:
        if self.stop.is_hurried:
            self._kill_tree()
        else:
            self._signal_group(signal.SIGTERM)

    def _signal_group(self, number: int) -> bool:
        """Signal the launcher's process group; 0 only asks. Returns whether there was anybody."""
        if self.process is None:
            return False
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _kill_tree(self) -> None:
        """Kill at once; torchrun gives each worker a session of its own, so the group is not enough."""
        if self.process is None:
            return
        below = descendants(self.process.pid)
        self._signal_group(signal.SIGKILL)
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
