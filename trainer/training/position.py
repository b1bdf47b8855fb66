"""Step and phase of this attempt, for the heartbeat and the hang detection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from trainer.distributed.preemption import StopFlag


@final
class Position:
    """The step counter and what the training thread is doing, for example step 20 and "evaluating"."""

    def __init__(self, stop: StopFlag) -> None:
        """Begin at step 0; `stop` is told of every change of phase."""
        self.step = 0
        self.phase = "starting"
        self._stop = stop

    def enter(self, phase: str) -> None:
        """Change the phase; this counts as progress for the hang detection."""
        self.phase = phase
        self._stop.moved()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in another phase within the block."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)
