"""What surrounds a process: it completes standard streams, home and user name, and ends with who started it."""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def complete_surroundings() -> None:
    """Call this first in a process; child processes inherit the result."""
    _open_streams()
    _name_user()


def end_with_parent() -> None:
    """End this process when its standard input is closed: who started it is gone. For a thread of its own."""
    while os.read(0, 1 << 12):
        pass
    os._exit(0)


def _open_streams() -> None:
    """Open closed standard streams on /dev/null: a file that is opened later would get their number, and our output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
    # Python sets a stream that was closed at its start to None.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")


def _name_user() -> None:
    """Set HOME and USER where a container runs with a user id that has no entry in /etc/passwd."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_temporary_home())
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def _temporary_home() -> Path:
    """A directory of this user's, the same in every command where possible."""
    home = Path(tempfile.gettempdir()) / f"tunesmith-{os.getuid()}"
    with suppress(OSError):
        home.mkdir(mode=0o700, exist_ok=True)
        if home.stat().st_uid == os.getuid():
            return home
    return Path(tempfile.mkdtemp(prefix="tunesmith-"))
