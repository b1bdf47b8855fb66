"""Runs a command that the kernel kills when the process that started it dies: `python -I leash.py COMMAND ...`.

MCP servers have sessions of their own, so that the end of a rollout's process group does not reach them.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent = int(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # otherwise it died before the line above
        try:
            os.execvp(sys.argv[2], sys.argv[2:])
        except OSError as error:
            sys.exit(f"{sys.argv[2]}: {error.strerror}")
