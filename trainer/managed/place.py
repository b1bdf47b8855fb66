"""Where the processes of a machine find a supervised server: a Unix socket that is there while the server is ready.

DIRECTORY/0.sock -> 0-2.sock      the second start of server 0 is ready
DIRECTORY/0.failed                it is not started again; the text says why
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from trainer.errors import LaunchError

POLL_S: Final = 0.1


@final
@dataclass(frozen=True)
class ServerPlace:
    """The place of one server, for any process of its user on its machine."""

    directory: Path
    """Only its owner may enter it."""
    number: int = 0
    timeout_s: float = 900.0
    """How long clients wait for it."""

    @property
    def socket(self) -> Path:
        """A link to the socket of the start that is ready."""
        return self.directory / f"{self.number}.sock"

    def socket_of(self, start: int) -> Path:
        """The socket of one start of the server, from 1."""
        return self.directory / f"{self.number}-{start}.sock"

    @property
    def failed_file(self) -> Path:
        """Exists when the server is given up."""
        return self.directory / f"{self.number}.failed"

    def wait_ready(self) -> None:
        """Wait until the server accepts connections.

        Raises:
            LaunchError: it is given up, gone with its directory, or not there in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            if accepts(self.socket):
                return
            if self.failed_file.exists():
                raise LaunchError(self.failed_file.read_text(encoding="utf-8"))
            if not self.directory.exists():
                raise LaunchError(f"the server in {self.directory} has ended with the process that started it")
            if time.monotonic() > deadline:
                raise LaunchError(f"{self.socket}: no server became ready within {self.timeout_s:.0f} s")
            time.sleep(POLL_S)


def accepts(path: Path) -> bool:
    """Whether a server listens on a Unix socket (httpcore leaks a socket at each attempt that fails)."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
