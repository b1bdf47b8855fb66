"""Names a process so that another one can tell whether it lives: host, process id, start time."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, final


@final
@dataclass(frozen=True)
class Owner:
    """A process, for example `Owner("node7", 4711, 8123456)`."""

    host: str
    pid: int
    start: int | None
    """Clock ticks between the boot and its start, which tell two processes of one id apart; None without /proc."""

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """A process of this machine."""
        return cls(socket.gethostname(), pid, _start_of(pid))

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """The process that a file names; None if it names none."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def dump(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this machine."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether it lives, on this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _start_of(self.pid) == self.start


def _start_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
