"""A forked child for one family of models, so that a crash, a hang or too much memory ends its own result only."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

MEMORY_GIB: Final = 12


def start(directory: Path, work: Callable[[], None]) -> int:
    """Fork a child that does the work, whose output goes to `directory/log.txt`; returns its process id.

    Args:
        directory: of the child's files.
        work: writes its result with `write_record`.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()  # what it starts ends with it
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        limit = MEMORY_GIB << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work()
        code = 0
    except BaseException:  # the child must never return into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Replace `directory/record.json`."""
    (directory / "record.new").write_text(json.dumps(record))
    (directory / "record.new").rename(directory / "record.json")
