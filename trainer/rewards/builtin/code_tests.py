"""Reward code that passes its tests, run in a locked process of its own (sandbox.py says how it is locked)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from trainer.rewards.contract import Score
from trainer.types import Row

BLOCK: Final = re.compile(r"^```[ \t]*(?:python|py|python3)[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
SANDBOX: Final = Path(__file__).with_name("sandbox.py")
MAX_FILE_BYTES: Final = 16 << 20


def code_tests(
    completion: str,
    row: Row,
    *,
    field: str = "tests",
    partial: bool = False,
    run_timeout_s: float = 4.0,
    memory_mib: int = 512,
    allow_weak_sandbox: bool = False,
) -> Score:
    """1.0 if the first Python block of the completion passes all of `row["tests"]`, else 0.0.

    >>> answer = "```python" + chr(10) + "def double(x):" + chr(10) + "    return 2 * x" + chr(10) + "```"
    >>> code_tests(answer, {"tests": ["assert double(2) == 4", "assert double(0) == 0"]}).value
    1.0
    >>> code_tests("double = abs", {"tests": ["assert double(2) == 4"]}).value
    0.0

    A test is a statement that must not raise, or an object with `input` and `output`: then the block runs as a program
    and what it prints must be the output, but for space at the ends of lines and of the text. Code that hangs, crashes
    or wants what it must not have has failed its test: 0.0, and not a failed reward.

    The code has no network, starts no process or thread, and writes into a temporary directory only. This needs seccomp
    (Linux on x86-64 or arm64); elsewhere the reward fails, unless you allow what is left: limits and an audit hook.

    Args:
        completion: what the model wrote.
        row: holds the tests.
        field: the row's field with the tests.
        partial: give the share of the tests that passed instead.
        run_timeout_s: wall-clock and CPU limit of one process; statements share one. Stay below
            `reward_limits.timeout_s` in all.
        memory_mib: address space of the process.
        allow_weak_sandbox: whether to run without seccomp.
    """
    tests = row[field]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"{row}: {field} must be a list of tests, not {tests!r}")
    found = BLOCK.search(completion)
    if found is None:
        return Score(0.0, {"passed": 0.0})
    box = Sandbox(run_timeout_s, memory_mib << 20, allow_weak_sandbox)
    statements = [test for test in tests if isinstance(test, str)]
    programs = [test for test in tests if not isinstance(test, str)]
    num_passed = box.count_passed(found[1], statements) if statements else 0
    num_passed += sum(box.prints(found[1], str(test["input"]), str(test["output"])) for test in programs)
    share = num_passed / len(tests)
    return Score(share if partial else float(share == 1.0), {"passed": share})


@final
@dataclass(frozen=True)
class Sandbox:
    """Runs code in locked processes, one after the other."""

    timeout_s: float
    memory_bytes: int
    allow_weak: bool

    def count_passed(self, code: str, tests: Sequence[str]) -> int:
        """Run the code, then each test in its names; return how many raised nothing."""
        reports, _ = self._run(code, tests, "")
        return sum(report.startswith("passed ") for report in reports)

    def prints(self, code: str, text: str, expected: str) -> bool:
        """Run the code as a program on `text`; return whether it ended well and printed what was expected."""
        reports, printed = self._run(code, (), text)
        return "ended" in reports and _lines(printed) == _lines(expected)

    def _run(self, code: str, tests: Sequence[str], text: str) -> tuple[set[str], str]:
        """Run one process; return what the sandbox reported and what the code printed."""
        with tempfile.TemporaryDirectory(prefix="code-") as outer:
            directory = Path(outer, "work")
            directory.mkdir()
            stdin = Path(outer, "stdin")
            stdin.write_text(text, encoding="utf-8")
            token = secrets.token_hex(16)
            job: dict[str, Any] = {
                "code": code,
                "tests": list(tests),
                "stdin": str(stdin),
                "directory": str(directory),
                "token": token,
                "cpu_s": int(self.timeout_s) + 1,
                "memory_bytes": self.memory_bytes,
                "file_bytes": MAX_FILE_BYTES,
                "allow_weak": self.allow_weak,
            }
            # To files, not pipes: nobody has to read along, and their size is limited.
            with Path(outer, "reports").open("w+b") as reports, Path(outer, "printed").open("w+b") as printed:
                self._wait(json.dumps(job).encode("ascii"), directory, reports.fileno(), printed.fileno())
                lines = os.pread(reports.fileno(), MAX_FILE_BYTES, 0).decode("utf-8", "replace").splitlines()
                output = os.pread(printed.fileno(), MAX_FILE_BYTES, 0).decode("utf-8", "replace")
        found = {line.removeprefix(token).strip() for line in lines if line.startswith(token)}
        fences = next((report for report in found if report.startswith("fences")), None)
        if fences is None:
            raise RuntimeError(f"the sandbox did not start: {output[-2000:]}")
        if "seccomp" not in fences and not self.allow_weak:
            raise RuntimeError(
                "code_tests locks model-written code up with seccomp (Linux on x86-64 or arm64), not to be had here; "
                "in a container without secrets, give `args: {allow_weak_sandbox: true}`; or use http_reward"
            )
        return found, output

    def _wait(self, job: bytes, directory: Path, reports: int, printed: int) -> None:
        """Start the sandbox and wait until it ends or its time is over."""
        command = [sys.executable, "-I", "-S", str(SANDBOX)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "TMPDIR": str(directory), "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=reports, stderr=printed, cwd=directory, env=environment
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(job, timeout=self.timeout_s)
        process.kill()
        process.communicate()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
