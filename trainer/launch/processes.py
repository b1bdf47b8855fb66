"""Processes below one, read from /proc."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from trainer.run.directory import STACKS_SIGNAL


def shows_stacks(pid: int) -> bool:
    """Whether a process has a handler for STACKS_SIGNAL; one without would die of it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def descendants(pid: int) -> list[int]:
    """Processes below one, where there is a /proc."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo = [child for parent in todo for child in children[parent]]
        found += todo
    return found


def kill_with_descendants(pid: int) -> None:
    """As a machine that dies: the process and everything below it, at once."""
    for each in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
