"""Runs one command and ends it, with all that it started, when the parent is gone. A script of the standard library.

    python guardian.py GRACE_S PROGRAM ARGUMENT...

The parent holds the other end of standard input. The line `stop` asks for SIGTERM and, GRACE_S later, SIGKILL; an end
of file, or another parent, means that the parent died: SIGKILL at once. The first line on standard output is the
process id of the command. Its output goes to standard error.

`child.py` starts it. It exists because a parent-death signal reaches only direct children, and is sent when the
thread that started them ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.1


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code, 128 + N if signal N ended it."""
    grace_s, *command = argv
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, by standard input
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become our children
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_before_exec
    )
    sys.stdout.write(f"{process.pid}\n")
    sys.stdout.flush()
    _watch(process, parent, float(grace_s))
    _kill_descendants(process)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _before_exec() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o077)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], parent: int, grace_s: float) -> None:
    """Return when the command has ended, or is to be killed."""
    deadline = float("inf")
    while process.poll() is None and time.monotonic() < deadline:
        if deadline < float("inf"):
            time.sleep(POLL_S)
        elif select.select([0], [], [], POLL_S)[0]:
            if b"stop" not in os.read(0, 64):
                return
            process.terminate()
            deadline = time.monotonic() + grace_s
        if os.getppid() != parent:
            return


def _kill_descendants(process: subprocess.Popen[bytes]) -> None:
    """Kill until none is left: one may start another meanwhile."""
    while below := descendants(os.getpid()):
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 10)
        process.poll()
        for pid in below:
            with suppress(ChildProcessError):  # not our child yet, or read by `poll`
                if pid != process.pid:
                    os.waitpid(pid, os.WNOHANG)


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError):  # Linux only; elsewhere standard input has to do
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Child processes, their children, and so on."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    below, level = [], [pid]
    while level:
        level = [child for parent in level for child in children[parent]]
        below += level
    return below


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
