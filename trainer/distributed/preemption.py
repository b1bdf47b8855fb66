"""Signals become a flag; ranks agree on it at fixed points. And a clock of when this rank last moved."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Final, final

from trainer.distributed.world import World

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED: Final = 130
"""Exit code of a second Ctrl-C, as shells use it."""


@final
class StopFlag:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C. No collective runs in the handler."""

    def __init__(self, grace_s: float = float("inf")) -> None:
        """Install the handlers.

        Args:
            grace_s: seconds that the machine waits between its signal and the kill.
        """
        self.reason: str | None = None
        self.grace_s = grace_s
        self._save_s = 0.0
        self._since: float | None = None
        self._moved = time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == "SIGINT":
            os.write(2, b"\ninterrupted twice: stopping at once; the last checkpoint is intact\n")
            os._exit(INTERRUPTED)
        if number == signal.SIGINT:
            os.write(2, b"\ninterrupted: saving after this step; Ctrl-C again stops at once\n")
        self.reason = name
        if self._since is None:  # a second SIGTERM is normal and changes nothing
            self._since = time.monotonic()

    def request(self, reason: str) -> None:
        """Ask for a stop from within this process, from any thread; nobody is about to kill us."""
        self.reason = self.reason or reason

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank calls this at the same point."""
        self.moved()
        return world.max_of([float(self.reason is not None)])[0] > 0

    def expect_save(self, seconds: float) -> None:
        """Assume that the next save takes as long as the last one did."""
        self._save_s = seconds

    def is_urgent(self) -> bool:
        """Whether what is left of the grace period is needed for a save (twice its last time, and a second)."""
        self.moved()
        return self._waited() + 2 * self._save_s + 1.0 > self.grace_s

    def is_overdue(self) -> bool:
        """Whether the grace period has run out."""
        return self._waited() > self.grace_s

    def moved(self) -> None:
        """Say that this rank goes on."""
        self._moved = time.monotonic()

    def still_for(self) -> float:
        """Seconds since this rank last said that it goes on."""
        return time.monotonic() - self._moved

    def _waited(self) -> float:
        return time.monotonic() - self._since if self._since is not None else float("-inf")
