"""Signals become a flag; ranks agree on it at fixed points."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final, final

from trainer.distributed import World

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED: Final = 130
"""Exit code of a second Ctrl-C, as shells use it."""


@final
class StopFlag:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C. No collective runs in the handler."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.reason: str | None = None
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

    def request(self, reason: str) -> None:
        """Ask for a stop from within this process, from any thread."""
        self.reason = self.reason or reason

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank calls this at the same point."""
        return world.max_of([float(self.reason is not None)])[0] > 0
