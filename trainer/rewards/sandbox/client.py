"""Starts sandboxed processes, bounds their time and disk, and reads what they report."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

RUN: Final = Path(__file__).with_name("run.py")
MAX_FILE_BYTES: Final = 16 << 20
MAX_DISK_BYTES: Final = 64 << 20
MAX_FILES: Final = 1000
POLL_S: Final = 0.02
NUM_OPEN_FILES: Final = 64


@final
@dataclass(frozen=True)
class Ran:
    """What one sandboxed process did."""

    num_passed: int
    """Tests that raised nothing."""
    has_ended: bool
    """Whether the code ran to its end, in time and without an exception."""
    printed: str
    """Its standard output, without standard error."""


@final
@dataclass(frozen=True)
class Sandbox:
    """Limits of a sandboxed process."""

    memory_bytes: int
    """Address space."""
    allow_weak: bool
    """Whether to run where the kernel has no seccomp."""
    partial: bool = False
    """Whether to go on after the first test that fails."""

    def run(self, code: str, *, tests: Sequence[Mapping[str, Any]] = (), text: str = "", timeout_s: float) -> Ran:
        """Run the code, then each test in its names.

        Args:
            code: Python.
            tests: see `harness.run_test`; without tests the code runs as `__main__`.
            text: standard input.
            timeout_s: wall-clock and CPU limit of the whole.

        Raises:
            RuntimeError: the sandbox did not start, or cannot lock itself here.
        """
        with tempfile.TemporaryDirectory(prefix="code-") as outer:
            directory = Path(outer, "work")
            directory.mkdir()
            stdin = Path(outer, "stdin")
            stdin.write_text(text, encoding="utf-8")
            token = secrets.token_hex(16)
            # To files, not pipes: no reader is needed while it runs, and RLIMIT_FSIZE bounds them.
            names = ("reports", "printed", "errors")
            with contextlib.ExitStack() as stack:
                files = {name: stack.enter_context(Path(outer, name).open("w+b")) for name in names}
                job = self._confinement(directory, stdin, timeout_s)
                job |= {"code": code, "tests": [dict(test) for test in tests], "token": token, "stdin": str(stdin)}
                job["reports"] = files["reports"].fileno()
                _wait(job, directory, {name: file.fileno() for name, file in files.items()}, timeout_s)
                texts = {
                    name: os.pread(file.fileno(), MAX_FILE_BYTES, 0).decode("utf-8", "replace")
                    for name, file in files.items()
                }
        reports = {line.removeprefix(token).strip() for line in texts["reports"].splitlines() if line.startswith(token)}
        self._check_fences(reports, texts["errors"])
        num_passed = sum(report.startswith("passed ") for report in reports)
        return Ran(num_passed, "ended" in reports, texts["printed"])

    def _confinement(self, directory: Path, stdin: Path, timeout_s: float) -> dict[str, Any]:
        paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        limits = {"CPU": int(timeout_s) + 1, "AS": self.memory_bytes, "FSIZE": MAX_FILE_BYTES}
        return {
            "partial": self.partial,
            "directory": str(directory),
            "paths": paths,
            "readable": [sys.prefix, sys.base_prefix, *paths, str(stdin)],
            "limits": {**limits, "NOFILE": NUM_OPEN_FILES, "CORE": 0},
            "allow_weak": self.allow_weak,
        }

    def _check_fences(self, reports: set[str], errors: str) -> None:
        fences = next((report for report in reports if report.startswith("fences")), None)
        if fences is None:
            raise RuntimeError(f"the sandbox did not start: {errors[-2000:]}")
        if "seccomp" not in fences and not self.allow_weak:
            raise RuntimeError(
                "code_tests confines model-written code with seccomp (Linux on x86-64 or arm64), missing here. "
                "In a container without secrets, set `args: {allow_weak_sandbox: true}`; or use http_reward."
            )


def _wait(job: Mapping[str, Any], directory: Path, files: Mapping[str, int], timeout_s: float) -> None:
    """Start the process and wait until it ends, its time is over or its directory is too large; then kill it."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore",
        "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes address space
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(RUN)],
        stdin=subprocess.PIPE,
        stdout=files["printed"],
        stderr=files["errors"],
        cwd=directory,
        env=environment,
        pass_fds=(files["reports"],),
    )
    end = time.monotonic() + timeout_s
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode("ascii"))
            process.stdin.close()
        while time.monotonic() < end and not _is_too_large(directory):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
                return
    finally:
        process.kill()
        process.wait()


def _is_too_large(directory: Path) -> bool:
    """Whether the files below a directory exceed the limit in number or in bytes."""
    num_files = num_bytes = 0
    todo = [str(directory)]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                num_files += 1
                if num_files > MAX_FILES:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                else:
                    num_bytes += entry.stat(follow_symlinks=False).st_size
    return num_bytes > MAX_DISK_BYTES
