"""Ends the process of a rank without destroying what other threads still use; for the worker's entry point only."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its exit code, after all exit handlers, without interpreter finalization.

    A gloo thread may still release the tensors of the last collective when the main thread ends. Under finalization
    CPython (before 3.14) ends a thread that asks for the GIL by unwinding its stack, which C++ answers with
    std::terminate: the rank of a finished run would die with SIGABRT. Exit handlers run in reverse order, so this one,
    registered before any other library's, runs last.

    Args:
        main: returns the exit code; SystemExit is understood, other exceptions are printed and end with 1.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # closed, or a pipe without reader
                continue
        os._exit(code)

    atexit.register(leave)
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        raise
    sys.exit(code)
