"""A thread beside the training: writes the heartbeat, and ends the attempt on hangs and overrun grace periods."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn, final

from trainer.distributed.preemption import StopFlag
from trainer.distributed.world import World
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, TrainerError
from trainer.run.directory import RunDir
from trainer.run.protocol import HEARTBEAT_S, LAUNCHER, STACKS_SIGNAL, STOPPED_S, SUPERVISOR
from trainer.run.state import EndState, Outcome
from trainer.training.position import Position

CHECK_INTERVAL_S: Final = 1.0
STACKS_S: Final = 3.0
"""How long a hung rank waits before it exits, so that the other ranks can write their stacks too."""


@final
class Watchdog:
    """Notices what the training thread cannot notice while it computes or waits for other ranks."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        world: World,
        stop: StopFlag,
        *,
        hang_timeout_s: float,
        position: Position,
        say: Callable[[str], None],
    ) -> None:
        """Prepare; `watching` starts the thread.

        Args:
            run: the run directory.
            attempt: number of this process start.
            world: the ranks; the main one writes heartbeat and outcome.
            stop: the stop flag, which also knows when this rank last made progress.
            hang_timeout_s: how long a rank may make no progress.
            position: step and phase of the training.
            say: prints a message to the user.
        """
        self.run, self.attempt, self.world, self.stop = run, attempt, world, stop
        self.hang_timeout_s, self.position, self.say = hang_timeout_s, position, say
        self._writing_heartbeat = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the thread within the block; every rank has one."""
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        ended = threading.Event()
        self.beat()
        thread = threading.Thread(target=self._watch, args=(ended,), daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def beat(self) -> None:
        """Write the heartbeat."""
        if self.world.is_main:
            with self._writing_heartbeat, suppress(OSError):  # a failed heartbeat must not stop the training
                self.run.write_heartbeat(self.attempt, self.position.step, self.position.phase)

    def _watch(self, ended: threading.Event) -> None:
        is_supervised = self.world.is_main and os.environ.get(LAUNCHER) == SUPERVISOR
        last_beat = last_check = time.monotonic()
        while not ended.wait(CHECK_INTERVAL_S):
            held_up_s = time.monotonic() - last_check - CHECK_INTERVAL_S
            last_check = time.monotonic()
            if held_up_s > STOPPED_S:
                self.stop.forgive(held_up_s)
            if is_supervised and self.stop.reason is None and not self.run.is_supervised():
                self.say("the supervisor is gone: saving after this step")
                self.stop.request("supervisor gone")
            if self.stop.is_overdue():
                self._exit(
                    "preempted",
                    f"the grace period of {self.stop.grace_s:g} s ran out before the step was saved; "
                    "the last checkpoint and the journal are intact",
                    EXIT_PREEMPTED,
                )
            if self.stop.idle_s() > self.hang_timeout_s:
                self._exit_hung()
            if time.monotonic() - last_beat >= HEARTBEAT_S:
                self.beat()
                last_beat = time.monotonic()

    def _exit_hung(self) -> NoReturn:
        phase = self.position.phase
        sys.stderr.write(
            f"\nrank {self.world.rank} has not moved for {self.hang_timeout_s:g} s while {phase}. Stacks:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(STACKS_S)
        message = f"hung while {phase} after step {self.position.step}; the stacks of all ranks are in the log"
        self._exit("failed", message, EXIT_FAILED)

    def _exit(self, state: EndState, message: str, exit_code: int) -> NoReturn:
        """Write the outcome and exit without cleanup: the training thread cannot be interrupted."""
        if self.world.is_main:
            self.say(message)
            if state == "preempted" and (self.stop.was_interrupted or self.run.cancel_file.exists()):
                state = "cancelled"
            with suppress(OSError, TrainerError):
                self.run.refuse_stale(self.attempt)
                outcome = Outcome(state, self.position.step, message, exit_code, state == "failed")
                self.run.end_attempt(self.attempt, outcome)
        os._exit(exit_code)
