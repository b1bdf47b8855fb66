"""`trainer chat`, `generate`, `eval` and `serve`: start the process that loads the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

MODULES: Final = {"chat": "chat", "generate": "generate", "eval": "evaluation"}


def use_model(argv: Sequence[str]) -> int:
    """Run a command in a process of its own, which imports torch; returns its exit code.

    Args:
        argv: the command and its arguments, which were parsed once, so that mistakes are said at once.
    """
    module = f"trainer.inference.{MODULES[argv[0]]}"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the child's
    try:
        return subprocess.run(
            [sys.executable, "-m", module, *argv[1:]], check=False, preexec_fn=_hear_ctrl_c
        ).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def serve(argv: Sequence[str]) -> int:
    """Become the gateway, which starts the engine; also for `batch`.

    Args:
        argv: the command and its arguments.
    """
    os.execv(sys.executable, [sys.executable, "-m", "trainer.serve", *(argv if argv[0] == "batch" else argv[1:])])


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
