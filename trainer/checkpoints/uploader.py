"""Uploads checkpoints to the mirror in the background; a failed upload is a warning."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import final

from trainer.checkpoints.mirror import Mirror
from trainer.errors import MirrorError


@final
class Uploader:
    """Uploads one checkpoint at a time; a newer one replaces the one that is waiting."""

    def __init__(self, open_mirror: Callable[[], Mirror] | None, say: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            open_mirror: called at the first fetch; None if the run has no mirror.
            say: prints a message to the user.
        """
        self._open, self._say = open_mirror, say
        self._mirror: Mirror | None = None
        self._waiting_step: int | None = None
        self._current_step: int | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Download the newest complete checkpoint if there is no local one.

        Raises:
            MirrorError: the mirror cannot be read; a run that started from step 0 instead would discard its progress.
            UserError: the address is of no known storage.
        """
        if self._open is None:
            return
        self._mirror = self._mirror or self._open()
        step = self._mirror.fetch()
        if step is not None:
            self._say(f"fetched the checkpoint of step {step} from {self._mirror.storage.address}")

    def offer(self, step: int) -> None:
        """Upload a committed checkpoint as soon as the current upload is done."""
        if self._mirror is None:
            return
        with self._changed:
            self._waiting_step = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
                self._thread.start()
            self._changed.notify_all()

    def held(self) -> set[int]:
        """Steps whose local checkpoint must not be deleted yet: waiting, or being uploaded."""
        with self._changed:
            return {step for step in (self._waiting_step, self._current_step) if step is not None}

    def close(self, timeout_s: float) -> None:
        """Wait up to timeout_s until all uploads are done."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._is_busy() and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))

    def _is_busy(self) -> bool:
        return self._waiting_step is not None or self._current_step is not None

    def _work(self) -> None:
        assert self._mirror is not None
        while True:
            with self._changed:
                self._current_step = None
                self._changed.notify_all()
                while self._waiting_step is None:
                    self._changed.wait()
                self._current_step, self._waiting_step = self._waiting_step, None
            try:
                self._mirror.push(self._current_step)
            except MirrorError as error:
                self._say(f"warning: {error}; going on, the next checkpoint will be uploaded")
            except Exception as error:  # storage libraries raise errors of their own
                self._say(f"warning: mirror: {type(error).__name__}: {error}; going on")
