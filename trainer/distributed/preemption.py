"""Stop requests: signals set a flag, ranks agree on it at fixed points; and tracks this rank's last progress."""

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
            grace_s: seconds between the machine's signal and its kill.
        """
        self.reason: str | None = None
        self.was_interrupted = False
        """A person pressed Ctrl-C."""
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
            self.was_interrupted = True
            os.write(2, b"\ninterrupted: saving after this step; Ctrl-C again stops at once\n")
        self.reason = name
        if self._since is None:  # a second SIGTERM is normal and changes nothing
            self._since = time.monotonic()

    def request(self, reason: str) -> None:
        """Request a stop from within this process, from any thread; it starts no grace period."""
        self.reason = self.reason or reason

    def agreed(self, world: World) -> bool:
        """Whether a stop was requested on any rank; every rank calls this at the same point."""
        self.moved()
        return world.max_of([float(self.reason is not None)])[0] > 0

    def is_urgent(self) -> bool:
        """Whether the rest of the grace period is needed for a save: twice the duration of the last one, plus 1 s."""
        self.moved()
        return self._waited() + 2 * self._save_s + 1.0 > self.grace_s

    def is_overdue(self) -> bool:
        """Whether the grace period has run out."""
        return self._waited() > self.grace_s

    def moved(self) -> None:
        """Record progress of this rank."""
        self._moved = time.monotonic()

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which the whole process was stopped: nothing could move."""
        self._moved += seconds

    def note_save(self, seconds: float) -> None:
        """Record the duration of a save; `is_urgent` keeps twice that of the grace period for the next one."""
        self._save_s = seconds

    def idle_s(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._moved

    def _waited(self) -> float:
        return time.monotonic() - self._since if self._since is not None else float("-inf")
