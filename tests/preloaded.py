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
FSYNC: Final = """\
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int handle) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size > 0) {
    path[size] = 0;
    if (strstr(path, getenv("FSYNC_PART"))) { errno = EIO; return -1; }
  }
  return syscall(SYS_fsync, handle);
}
"""
"""Fails for files and directories whose path contains FSYNC_PART."""


def preloaded(directory: Path, source: str, **variables: str) -> dict[str, str]:
    """Compile the source; returns the environment that preloads it. Skips the test without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    code, library = directory / "shim.c", directory / "shim.so"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), **variables}
