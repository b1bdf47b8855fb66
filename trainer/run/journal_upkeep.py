"""Compresses old steps of the journal and removes older ones. No torch.

Only steps that no resume needs are touched: a checkpoint of step S contains what the journal's steps below S taught.
A kill at any moment loses nothing: a compressed chunk is complete before the plain one is removed, and a step is
renamed before its files are deleted.
"""

from __future__ import annotations

import gzip
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, final

from trainer.files import fsync_dir, write_atomically
from trainer.run.directory import RunDir
from trainer.run.journal import note_pruned

LEVEL: Final = 6
PRUNED: Final = ".pruned-"
"""Prefix of a step whose files are being deleted."""


def tidy_journal(
    run: RunDir, before: int, keep_steps: int | None, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Compress every chunk of the steps below `before`; of these, remove all but the newest `keep_steps` of the run.

    Args:
        run: the run directory.
        before: step of a checkpoint that a resume falls back to at the earliest.
        keep_steps: newest steps that stay; None keeps all.
        is_stopped: asked before each step; the rest then waits for the next time.
    """
    for left in run.rollouts.glob(f"{PRUNED}*"):
        shutil.rmtree(left, ignore_errors=True)
    for refused in (False, True):
        steps = run.journal_steps(refused=refused)
        for step in steps:
            if step >= before or is_stopped():
                break
            if keep_steps is not None and step <= max(run.journal_steps(), default=0) - keep_steps:
                _remove(run, step, refused=refused)
            else:
                _compress(run, step, refused=refused)


def _remove(run: RunDir, step: int, *, refused: bool) -> None:
    directory = run.journal(step, refused=refused)
    if not refused:
        note_pruned(run, step)
    aside = directory.with_name(f"{PRUNED}{directory.name}")
    directory.rename(aside)
    fsync_dir(aside.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _compress(run: RunDir, step: int, *, refused: bool) -> None:
    directory = run.journal(step, refused=refused)
    for left in directory.glob(".chunk-*.tmp"):
        left.unlink(missing_ok=True)
    for file in directory.glob("chunk-*.jsonl"):
        write_atomically(file.with_name(f"{file.name}.gz"), gzip.compress(file.read_bytes(), LEVEL, mtime=0))
        file.unlink()


@final
class JournalUpkeep:
    """Tidies the journal of a run beside the training; on the main rank."""

    def __init__(self, run: RunDir, keep_last: int | None, keep_steps: int | None, say: Callable[[str], None]) -> None:
        """Nothing is touched yet.

        Args:
            run: the run directory.
            keep_last: newest checkpoints to which a resume may fall back; None touches nothing, on further ranks.
            keep_steps: newest steps of the journal that stay; None keeps all.
            say: prints a message to the user.
        """
        self._run, self._keep_last, self._keep_steps, self._say = run, keep_last, keep_steps, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: Future[None] | None = None
        self._closing = threading.Event()
        self._done_before = 0

    def begin(self) -> None:
        """Tidy up to the oldest of the newest `keep_last` checkpoints, unless that is done or under way."""
        if self._pending is not None:
            if not self._pending.done():
                return
            self._take_result(self._pending)
            self._pending = None
        saved = self._run.checkpoint_steps()
        if self._keep_last is None or len(saved) < self._keep_last or saved[-self._keep_last] <= self._done_before:
            return
        before = saved[-self._keep_last]
        self._done_before = before
        self._pending = self._thread.submit(tidy_journal, self._run, before, self._keep_steps, self._closing.is_set)

    def _take_result(self, pending: Future[None]) -> None:
        error = pending.exception()
        if error is not None:  # a full disk, for instance: the journal stays larger, and whole
            self._say(f"warning: the journal was not tidied: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Wait for the step that is under way; the next attempt tidies the rest."""
        self._closing.set()
        self._thread.shutdown(wait=True)
        if self._pending is not None:
            self._take_result(self._pending)
            self._pending = None
