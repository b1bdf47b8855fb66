"""Starts an attempt under accelerate, passes signals on, shows progress, reads the outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, final

from trainer.config.plan import Plan
from trainer.errors import EXIT_FAILED
from trainer.launch.local import launch_argv
from trainer.progress import Console
from trainer.run import Outcome, RunDir

POLL_S: Final = 0.2
START_S: Final = 120.0
"""A launcher that ended may leave a worker behind that has not taken the lock yet; it gets so long, if it lives."""
TAIL_LINES: Final = 30


@final
class Supervisor:
    """One attempt, from start to outcome."""

    def __init__(self, plan: Plan, run: RunDir) -> None:
        """Prepare to launch the run's plan."""
        self.plan, self.run = plan, run
        self.process: subprocess.Popen[bytes] | None = None

    def attempt(self) -> Outcome:
        """Launch, watch and wait; returns how it ended."""
        self.run.outcome_file.unlink(missing_ok=True)
        number = self.run.newest_attempt() + 1
        log = self.run.log_file(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"TRAINER_LAUNCHER": "trainer train", "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file, self._signals_passed_on():
            self.process = subprocess.Popen(
                launch_argv(self.plan.shape, self.run.root),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone; we signal the whole group
            )
            self._watch(Console(self.plan.steps))
            self.process.wait()
            self.run.wait_unlocked()  # accelerate may end before the worker that it started
        outcome = self.run.read_outcome()
        if outcome is not None:
            return outcome
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        code = self.process.returncode
        return Outcome("failed", 0, f"the worker ended without a word (launcher: {code}); see {log}:\n{tail}", EXIT_FAILED)

    def _watch(self, console: Console) -> None:
        assert self.process is not None
        seen = len(self.run.read_metrics())
        while True:
            ended = self.process.poll() is not None and not self.run.is_locked()
            records = self.run.read_metrics()
            if len(records) < seen:  # the worker has gone back to its checkpoint
                seen = len(records)
            for record in records[seen:]:
                console.show(record)
            seen = len(records)
            if ended:
                return
            time.sleep(POLL_S)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        interrupts = 0

        def on_signal(number: int, _frame: FrameType | None) -> None:
            nonlocal interrupts
            if number == signal.SIGINT:
                interrupts += 1
                sys.stderr.write("\nstopping after this step, saved; Ctrl-C again stops at once\n")
            self._signal_group(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)

        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, on_signal) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signal_group(self, number: signal.Signals) -> None:
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
