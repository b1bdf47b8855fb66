"""The process tree, read from /proc."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from trainer.managed.guardian import descendants
from trainer.run.protocol import STACKS_SIGNAL


def handles_stacks_signal(pid: int) -> bool:
    """Whether a process has a handler for STACKS_SIGNAL; the signal would kill one without."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (STACKS_SIGNAL - 1) & 1)
    return False


def kill_with_descendants(pid: int) -> None:
    """Kill a process and everything below it at once, as when its machine dies."""
    for each in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
