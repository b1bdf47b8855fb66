"""Locks of a run directory, and the fence that stops a stale attempt.

A lock is an flock on a file: the kernel releases it when its holder ends, however that happens. flock is unreliable on
some network file systems, so attempts are also fenced: each creates the file of the next number exclusively
(fence/000001, fence/000002, ...), and every commit first checks that its number is still the highest.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trainer.errors import LaunchError, TrainerError
from trainer.files import fsync_dir, make_directory
from trainer.run.polling import wait_until

PROBE_S: Final = 1.0
"""Probing takes the lock briefly; retry acquiring for this long."""


@contextmanager
def hold(file: Path, refusal: str) -> Iterator[int]:
    """Hold a lock within the block; yields the file handle. A child that inherits the handle keeps the lock.

    Args:
        file: the lock file; created where it is missing.
        refusal: message of the error.

    Raises:
        LaunchError: another process holds it.
    """
    with file.open("a") as opened:
        handle = opened.fileno()
        if not wait_until(lambda: _try_lock(handle, fcntl.LOCK_EX), timeout_s=PROBE_S, poll_s=0.02):
            raise LaunchError(refusal)
        yield handle


def is_held(file: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        with file.open("rb") as opened:
            return not _try_lock(opened.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def take_number(fence: Path, attempts_file: Path, facts: Mapping[str, Any]) -> int:
    """Take the next attempt number. The creator of its file owns the number.

    Args:
        fence: directory of one file per number.
        attempts_file: gets a line with the number and the facts.
        facts: about the process that starts.
    """
    make_directory(fence)
    while True:
        number = newest_number(fence) + 1
        try:
            (fence / f"{number:06d}").touch(exist_ok=False)
        except FileExistsError:
            continue
        fsync_dir(fence)
        with attempts_file.open("a") as file:
            file.write(json.dumps({"attempt": number, **facts}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return number


def newest_number(fence: Path) -> int:
    """Highest attempt number taken; 0 before the first."""
    return max((int(file.name) for file in fence.iterdir()), default=0) if fence.is_dir() else 0


def refuse_stale(fence: Path, attempt: int) -> None:
    """Stop an attempt that is no longer the newest.

    Raises:
        TrainerError: another attempt has taken the run over.
    """
    newest = newest_number(fence)
    if newest != attempt:
        raise TrainerError(f"{fence.parent}: attempt {newest} has taken over; attempt {attempt} stops")
