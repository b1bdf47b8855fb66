"""The thread beside the training: heartbeat, grace period, hangs, and whether the supervisor still lives."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, final

from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, TrainerError
from trainer.run.directory import HEARTBEAT_S, LAUNCHER, STACKS_SIGNAL, SUPERVISOR, Outcome, RunDir, State

WATCH_S: Final = 1.0
"""How often it looks."""
STACKS_S: Final = 3.0
"""Every rank gets so long to write its stacks before the first one ends."""


@final
class Watch:
    """Sees what the training thread cannot see while it computes or waits."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        world: World,
        stop: StopFlag,
        *,
        hang_timeout_s: float,
        position: Callable[[], tuple[int, str]],
        say: Callable[[str], None],
    ) -> None:
        """Prepare; `position` gives step and phase, `say` tells a person."""
        self.run, self.attempt, self.world, self.stop = run, attempt, world, stop
        self.hang_timeout_s, self.position, self.say = hang_timeout_s, position, say
        self._beating = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the block; every rank does."""
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        ended = threading.Event()
        self.beat()
        thread = threading.Thread(target=self._watch, args=(ended,), daemon=True, name="watch")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def beat(self) -> None:
        """Say that the run lives."""
        if self.world.is_main:
            with self._beating, suppress(OSError):  # no sign of life is no reason to die
                self.run.write_heartbeat(self.attempt, *self.position())

    def _watch(self, ended: threading.Event) -> None:
        is_supervised = self.world.is_main and os.environ.get(LAUNCHER) == SUPERVISOR
        last = time.monotonic()
        while not ended.wait(WATCH_S):
            if is_supervised and self.stop.reason is None and not self.run.is_supervised():
                self.say("the supervisor is gone: saving after this step")
                self.stop.request("supervisor gone")
            if self.stop.is_overdue():
                self._end(
                    "preempted",
                    f"the grace period of {self.stop.grace_s:g} s ran out before the step was saved; "
                    "the last checkpoint and the journal are intact",
                    EXIT_PREEMPTED,
                )
            if self.stop.idle_s() > self.hang_timeout_s:
                self._end_hang()
            if time.monotonic() - last >= HEARTBEAT_S:
                self.beat()
                last = time.monotonic()

    def _end_hang(self) -> None:
        step, phase = self.position()
        sys.stderr.write(
            f"\nrank {self.world.rank} has not moved for {self.hang_timeout_s:g} s while {phase}. Stacks:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(STACKS_S)
        self._end(
            "failed", f"hung while {phase} after step {step}; the stacks of all ranks are in the log", EXIT_FAILED
        )

    def _end(self, state: State, message: str, exit_code: int) -> None:
        """End this process at once: the training thread cannot be interrupted."""
        if self.world.is_main:
            self.say(message)
            if state == "preempted" and self.run.cancel_file.exists():
                state = "cancelled"
            with suppress(OSError, TrainerError):
                self.run.refuse_stale(self.attempt)
                self.run.write_outcome(Outcome(state, self.position()[0], message, exit_code, state == "failed"))
        os._exit(exit_code)
