"""A process that never outlives this one, however this one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, final

from trainer.managed import guardian

TAIL_LINES: Final = 30
TAIL_BYTES: Final = 2**16


@final
class Child:
    """A command under a guardian (guardian.py), which ends it when this process is gone."""

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], log: Path, *, grace_s: float = 20.0
    ) -> None:
        """Start the command in a session of its own, with umask 077.

        Args:
            argv: program and arguments.
            environment: all of its variables.
            log: gets its output, behind what is there.
            grace_s: between SIGTERM and SIGKILL in `stop`.

        Raises:
            OSError: the log cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("ab") as file:
            self._log_begin = file.tell()
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", str(guardian.__file__), str(grace_s), *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C and signals to our group do not reach it
            )
        assert self._guardian.stdout is not None
        self.pid = int(self._guardian.stdout.readline() or b"0")
        """Of the command; 0 if it could not be started."""

    def poll(self) -> int | None:
        """Exit code of the command, 128 + N if signal N ended it; None while it runs."""
        code = self._guardian.poll()
        if code is None or code >= 0:
            return code
        self._end_group()
        return 128 - code

    def stop(self) -> None:
        """End the command and all that it started; SIGTERM first. Returns when nothing of it runs any more."""
        assert self._guardian.stdin is not None
        if not self._guardian.stdin.closed:
            with suppress(BrokenPipeError):
                self._guardian.stdin.write(b"stop\n")
                self._guardian.stdin.flush()
        self._close()

    def kill(self) -> None:
        """End the command and all that it started, at once."""
        self._close()

    def tail(self) -> str:
        """The last lines that this command wrote."""
        with self._log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begin, end - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def _close(self) -> None:
        assert self._guardian.stdin is not None
        assert self._guardian.stdout is not None
        with suppress(BrokenPipeError):
            self._guardian.stdin.close()
        self._guardian.wait()
        self._guardian.stdout.close()
        self.poll()

    def _end_group(self) -> None:
        """The guardian itself was killed: its command died with it, but not what the command started."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
