"""Copies checkpoints to the mirror behind the training: one at a time, the newest first, and never stops a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from trainer.checkpoints.mirror import Mirror
from trainer.errors import MirrorError


@final
class Copier:
    """Knows which steps are to be copied; a newer one takes the place of one that still waits."""

    def __init__(self, open_mirror: Callable[[], Mirror] | None, say: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            open_mirror: called when it is first needed; None: there is no mirror.
            say: tells a person.
        """
        self._open, self._say = open_mirror, say
        self._mirror: Mirror | None = None
        self._waiting: int | None = None
        self._copying: int | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Bring the newest whole checkpoint here, where there is none here.

        Raises:
            MirrorError: the mirror cannot be read; beginning anew would lose the run.
            UserError: no such storage.
        """
        if self._open is None:
            return
        self._mirror = self._mirror or self._open()
        step = self._mirror.fetch()
        if step is not None:
            self._say(f"fetched the checkpoint of step {step} from {self._mirror.storage.address}")

    def offer(self, step: int) -> None:
        """Copy a committed checkpoint soon."""
        if self._mirror is None:
            return
        with self._changed:
            self._waiting = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
                self._thread.start()
            self._changed.notify_all()

    def held(self) -> set[int]:
        """Steps that must not be deleted yet."""
        with self._changed:
            return {step for step in (self._waiting, self._copying) if step is not None}

    def close(self, timeout_s: float) -> None:
        """Wait until everything is copied, for so long."""
        end = time.monotonic() + timeout_s
        with self._changed:
            while (self._waiting is not None or self._copying is not None) and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def _work(self) -> None:
        assert self._mirror is not None
        while True:
            with self._changed:
                self._copying = None
                self._changed.notify_all()
                while self._waiting is None:
                    self._changed.wait()
                self._copying, self._waiting = self._waiting, None
            try:
                self._mirror.push(self._copying)
            except MirrorError as error:
                self._say(f"warning: {error}; going on, the next checkpoint is copied again")
            except Exception as error:  # whatever a storage's library raises
                self._say(f"warning: mirror: {type(error).__name__}: {error}; going on")
