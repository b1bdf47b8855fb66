"""Supervise one attempt: start it, forward signals, show progress, read its outcome."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self, final

from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER, TrainerError
from trainer.launch.local import launch_argv
from trainer.launch.processes import handles_stacks_signal
from trainer.managed.guardian import descendants
from trainer.planning.plan import Plan
from trainer.run.console import Console, tell
from trainer.run.directory import RunDir
from trainer.run.metrics_reader import MetricsReader
from trainer.run.protocol import FRESH_S, LAUNCHER, STACKS_SIGNAL, STOPPED_S, SUPERVISOR, SUPERVISOR_PID, TOKENIZING
from trainer.run.readers import Heartbeat
from trainer.run.state import EndState, Outcome
from trainer.run.tracker import read_tracker

POLL_S: Final = 0.2
STACKS_S: Final = 2.0
"""How long a frozen worker gets to write its stacks."""
START_S: Final = 120.0
"""How long to wait for an orphaned worker to take the lock, after its launcher has ended."""
TAIL_LINES: Final = 30
FULL_BYTES: Final = 2**16
"""A disk with less free space than this is reported as full."""


@final
class StopSignals:
    """Within the block, signals that ask this process to stop are recorded and forwarded, also between attempts."""

    def __init__(self, on_interrupt: Callable[[], object] = lambda: None) -> None:
        """No signal has come.

        Args:
            on_interrupt: called at the first Ctrl-C.
        """
        self.on_interrupt = on_interrupt
        self.was_asked = False
        self.is_immediate = False
        """Ctrl-C came twice: stop without saving."""
        self.forward: Callable[[], object] = lambda: None
        """Called at each signal."""
        self._was_interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._on_signal) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.was_asked = True
        self.is_immediate |= number == signal.SIGINT and self._was_interrupted
        if number == signal.SIGINT and not self._was_interrupted:
            self._was_interrupted = True
            self.on_interrupt()
            tell("\nsaving after this step, then stopping; press Ctrl-C again to stop at once")
        self.forward()

    def wait(self, seconds: float) -> bool:
        """Wait; returns True as soon as a signal asks to stop."""
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
        self._last_beat: Heartbeat | None = None
        self._last_beat_at = 0.0
        tracker = read_tracker(run)
        self._tracker_problem = tracker.problem if tracker is not None else None

    def attempt(self) -> Outcome:
        """Launch, watch and wait; returns the outcome."""
        self.stop.forward = self._forward
        self.run.outcome_file.unlink(missing_ok=True)
        log = self.run.log_file(self.number)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {LAUNCHER: SUPERVISOR, SUPERVISOR_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        metrics = self.run.metrics_reader()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                launch_argv(self.plan.shape, self.run.root),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # only we get Ctrl-C; we signal the whole group
            )
            if self.stop.was_asked:  # before the process existed
                self._signal_group(signal.SIGTERM)
            self._watch(Console(self.plan.steps), metrics)
        if self.run.is_locked():
            return Outcome("failed", 0, f"{self.run.root}: another attempt is running, started elsewhere", EXIT_USER)
        return self.run.read_outcome() or self._outcome_for(log)

    def _watch(self, console: Console, metrics: MetricsReader) -> None:
        """Show new metrics until the worker has ended."""
        while True:
            has_ended = self._has_ended()
            for record in metrics.poll():
                console.show(record)
                self._tell_lost_tracker(console)
            if has_ended:
                self._tell_lost_tracker(console)
                return
            self._end_frozen()
            if self._last_beat is not None and self._last_beat.phase.startswith(TOKENIZING):
                console.show_part(self._last_beat.phase)
            before = time.monotonic()
            time.sleep(POLL_S)
            held_up_s = time.monotonic() - before - POLL_S
            if held_up_s > STOPPED_S:  # this process was stopped, and perhaps the worker with it
                self._last_beat_at += held_up_s

    def _tell_lost_tracker(self, console: Console) -> None:
        """Say that W&B receives nothing more; the worker's own words are only in its log."""
        state = read_tracker(self.run) if self.plan.recipe.logging.wandb != "off" else None
        problem = state.problem if state is not None else None
        if problem is not None and problem != self._tracker_problem:
            console.say(f"warning: {problem}; to send what is missing: trainer sync {self.run.root}")
        self._tracker_problem = problem

    def _end_frozen(self) -> None:
        """Kill a worker that is stopped or holds the interpreter lock; its watchdog handles all other hangs."""
        beat = self.run.read_heartbeat()
        if beat is None or beat.attempt < self.number or self.process is None:
            return
        if beat != self._last_beat:  # timed by our monotonic clock: the system clock may be set
            self._last_beat, self._last_beat_at = beat, time.monotonic()
        silent_s = time.monotonic() - self._last_beat_at
        if silent_s > self.plan.recipe.recovery.hang_timeout_s + FRESH_S and not self._was_frozen:
            self._was_frozen = True
            tell(f"\nno heartbeat for {silent_s:.0f} s while {beat.phase}: killing the worker")
            for pid in filter(handles_stacks_signal, descendants(self.process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, STACKS_SIGNAL)
            time.sleep(STACKS_S)
            self._kill_tree()

    def _has_ended(self) -> bool:
        """Whether our worker has ended; accelerate may end first, and the worker that it started holds the lock."""
        if self.process is None or self.process.poll() is None:
            return False
        if self._launcher_ended is None:
            self._launcher_ended = time.monotonic()
        has_attempt_begun = self.run.newest_attempt() >= self.number
        if self.run.is_locked():
            return has_attempt_begun and not self._is_newest_ours()
        may_still_begin = self._signal_group(0) and time.monotonic() - self._launcher_ended < START_S
        return has_attempt_begun or not may_still_begin

    def _is_newest_ours(self) -> bool:
        """Whether the newest attempt was started by this process."""
        attempts = self.run.read_attempts()
        return bool(attempts) and attempts[-1].get("supervisor_pid") == os.getpid()

    def _outcome_for(self, log: Path) -> Outcome:
        """The outcome of a worker that wrote none; written in its place."""
        step = self.run.newest_logged_step()
        if self.stop.is_immediate:
            outcome = Outcome("cancelled", step, f"stopped at once; {self._newest_checkpoint()}", EXIT_FAILED)
        elif self.stop.was_asked:
            text = f"stopped before it could save; {self._newest_checkpoint()}"
            state: EndState = "cancelled" if self.run.cancel_file.exists() else "preempted"
            outcome = Outcome(state, step, text, EXIT_PREEMPTED)
        else:
            outcome = Outcome("failed", step, self._last_words(log), EXIT_FAILED, is_transient=True)
        with suppress(OSError, TrainerError), self.run.locked():  # unless another attempt has just begun
            if self.run.newest_attempt() == self.number:
                self.run.end_attempt(self.number, outcome)
            else:  # it ended before it took its number
                self.run.write_outcome(outcome)
        return outcome

    def _last_words(self, log: Path) -> str:
        """What is known of a worker that died: exit code, disk, the end of its log."""
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        full = "; the disk is full" if shutil.disk_usage(self.run.root).free < FULL_BYTES else ""
        code = self.process.returncode if self.process is not None else None
        return f"the worker ended without an outcome (launcher exit code: {code}){full}; see {log}:\n{tail}"

    def _newest_checkpoint(self) -> str:
        step = self.run.newest_checkpoint_step()
        return f"the newest checkpoint is {self.run.checkpoint(step)}" if step >= 0 else "there is no checkpoint yet"

    def _forward(self) -> None:
        if self.stop.is_immediate:
            self._kill_tree()
        else:
            self._signal_group(signal.SIGTERM)

    def _signal_group(self, number: int) -> bool:
        """Signal the launcher's process group; signal 0 only probes. Returns whether the group exists."""
        if self.process is None:
            return False
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _kill_tree(self) -> None:
        """Kill every descendant; torchrun starts each worker in a session of its own, outside the group."""
        if self.process is None:
            return
        below = descendants(self.process.pid)
        self._signal_group(signal.SIGKILL)
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
