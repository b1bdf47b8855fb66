"""Small C libraries that a test compiles and preloads, so that system calls answer as on another machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

FLOCK: Final = """\
#include <errno.h>
#include <stdlib.h>
int flock(int handle, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def preloaded(directory: Path, source: str, **variables: str) -> dict[str, str]:
    """Compile the source; returns the environment that preloads it. Skips the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    code, library = directory / "shim.c", directory / "shim.so"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), **variables}
