"""Tells whether an attempt is alive from changes of its heartbeat, not from the clocks of two machines."""

from __future__ import annotations

import time
from typing import final

from trainer.run.directory import RunDir
from trainer.run.protocol import FRESH_S
from trainer.run.readers import Heartbeat


@final
class Pulse:
    """One observer of one run; the first look can only compare clocks, every later one sees changes."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._beat: Heartbeat | None = None
        self._changed = float("-inf")
        """When the heartbeat changed, by this process's monotonic clock."""

    def is_alive(self, run: RunDir) -> bool:
        """Whether the newest attempt has a fresh heartbeat, as far as this observer can tell."""
        beat = run.read_heartbeat()
        if beat is None or beat.attempt != run.newest_attempt():
            return False
        now = time.monotonic()
        if self._beat is None:
            age_s = beat.age_s()
            self._changed = now - max(0.0, age_s) if abs(age_s) < FRESH_S else float("-inf")
        elif beat != self._beat:
            self._changed = now
        self._beat = beat
        return now - self._changed < FRESH_S
