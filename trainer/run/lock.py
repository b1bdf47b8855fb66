"""Locks of a run directory, and the fence that stops a stale attempt.

A lock is an flock on a file: the kernel releases it when its holder ends, however that happens. Attempts are also
fenced: each creates the file of the next number exclusively (fence/000001, fence/000002, ...), and every commit first
checks that its number is still the highest.

Some file systems have no flock (Lustre without the mount option, some NFS). There the holder writes its host and
process id into the file, and a lock counts as held while that process lives; on another host, while the heartbeat
changes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any, Final

from trainer.errors import LaunchError, TrainerError
from trainer.files import fsync_dir, make_directory
from trainer.run.console import tell
from trainer.run.owner import Owner
from trainer.run.polling import wait_until
from trainer.run.protocol import HEARTBEAT_S, LATE_S

PROBE_S: Final = 1.0
"""Probing takes the lock briefly; retry acquiring for this long."""


class _Answer(Enum):
    """Result of one flock call."""

    TAKEN = auto()
    HELD = auto()
    UNSUPPORTED = auto()


@contextmanager
def hold(file: Path, refusal: str, heartbeat: Path) -> Iterator[int]:
    """Hold a lock within the block; yields the file handle. A child that inherits the handle keeps the lock.

    Args:
        file: the lock file; created where it is missing.
        refusal: message of the error.
        heartbeat: the run's heartbeat file, for file systems without flock.

    Raises:
        LaunchError: another process holds it.
    """
    with file.open("a") as opened:
        handle = opened.fileno()
        wait_until(lambda: _try_lock(handle, fcntl.LOCK_EX) is not _Answer.HELD, timeout_s=PROBE_S, poll_s=0.02)
        answer = _try_lock(handle, fcntl.LOCK_EX)
        if answer is _Answer.HELD or (answer is _Answer.UNSUPPORTED and _is_owned(file, heartbeat)):
            raise LaunchError(refusal)
        if answer is _Answer.TAKEN:
            yield handle
            return
        _warn_once(file.parent)
        owner = Owner.of_process(os.getpid())
        file.write_text(owner.dump())
        try:
            yield handle
        finally:
            if Owner.read(file) == owner:  # not handed over
                file.write_text("")


def hand_over(file: Path, pid: int) -> None:
    """Say that a child holds the lock that it inherited; needed where flock does not work."""
    file.write_text(Owner.of_process(pid).dump())


def is_held(file: Path, heartbeat: Path) -> bool:
    """Whether a process holds the lock.

    Args:
        file: the lock file.
        heartbeat: as in `hold`.
    """
    try:
        with file.open("rb") as opened:
            answer = _try_lock(opened.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    return _is_owned(file, heartbeat) if answer is _Answer.UNSUPPORTED else answer is _Answer.HELD


def _try_lock(handle: int, kind: int) -> _Answer:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:  # EWOULDBLOCK; any other error, such as ENOSYS or ENOLCK, says nothing about a holder
        return _Answer.HELD
    except OSError:
        return _Answer.UNSUPPORTED
    return _Answer.TAKEN


def _is_owned(file: Path, heartbeat: Path) -> bool:
    """Whether the process that the file names lives."""
    owner = Owner.read(file)
    if owner is None:
        return False
    if owner.is_here:
        return owner.is_alive()
    before = _content(heartbeat)
    return wait_until(lambda: _content(heartbeat) != before, timeout_s=HEARTBEAT_S + LATE_S, poll_s=0.2)


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


@cache
def _warn_once(directory: Path) -> None:
    tell(
        f"warning: {directory}: this file system has no working file locks (flock). A second attempt is recognized by "
        "process id and heartbeat instead, and stopped by its number. Do not start the run on two machines at once."
    )


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
    if not fence.is_dir():
        return 0
    return max((int(file.name) for file in fence.iterdir() if file.name.isdecimal()), default=0)


def refuse_stale(fence: Path, attempt: int) -> None:
    """Stop an attempt that is no longer the newest.

    Raises:
        TrainerError: another attempt has taken the run over.
    """
    newest = newest_number(fence)
    if newest != attempt:
        raise TrainerError(f"{fence.parent}: attempt {newest} has taken over; attempt {attempt} stops")
