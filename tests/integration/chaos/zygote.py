"""Starts attempts by fork with everything imported: a worker's imports take five of its six seconds.

Reads requests as JSON lines: {argv, cwd, environment, out, err} is answered with the new process's id, and
{wait: PID, timeout_s} with its exit code, null where it still runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import sitecustomize
import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import trl  # noqa: F401

from trainer import worker
from trainer.training import rft, sft  # noqa: F401


def serve() -> int:
    """Until the end of the input; in a child, the exit code of its worker."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = waited(request["wait"], request["timeout_s"])
        else:
            answer = os.fork()
            if answer == 0:
                return attempt(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


def waited(pid: int, timeout_s: float) -> int | None:
    """The exit code, negative for a signal."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def attempt(request: dict[str, Any]) -> int:
    """Become a worker, as `python -m trainer.worker` is one."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ |= request["environment"] | {"CHAOS_OWNER": str(os.getppid())}
    for name, number in (("/dev/null", 0), (request["out"], 1), (request["err"], 2)):
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    sitecustomize.Saboteur(Path(request["environment"]["CHAOS_STATE"])).install()
    return worker.main(request["argv"])


if __name__ == "__main__":
    sys.exit(serve())
