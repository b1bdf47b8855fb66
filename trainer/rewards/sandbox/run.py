"""The sandboxed process: `python -I -S run.py`, with the job as JSON on standard input. Standard library only.

Locks itself (`fences`), then runs the code and its tests. Not promised: code that searches its own process for the
test harness can forge a result, since tests of functions run in the process of the code that they test.
"""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # -I keeps the working directory off the path

from trainer.rewards.sandbox import fences, harness

del sys.path[0]

REFUSED_EVENTS = (
    *("socket.", "ctypes.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty."),
    *("os.kill", "os.chmod", "os.chown", "os.lchmod", "os.setxattr", "os.removexattr", "os.chflags", "os.utime"),
    *("_thread.start_new_thread", "_posixsubprocess.", "resource.", "signal.pthread_kill", "fcntl.", "syslog."),
)
"""Beginnings of the names of Python's audit events; used only where there is no seccomp."""
WRITING_EVENTS = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def make_audit_hook(directory: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Return a hook that refuses what the kernel does not; code that looks for it can take it away."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(directory + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED_EVENTS):
            raise PermissionError(f"{event} is refused in a code test")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        if (writes or event in WRITING_EVENTS) and not is_inside(arguments[0]):
            raise PermissionError(f"{event} outside the test's directory is refused")

    return hook


def main() -> None:
    """Read the job, lock, run the code and then each test; report each test that passes."""
    job = json.loads(sys.stdin.buffer.read())
    reports = job["reports"]
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    held = fences.lock(job["directory"], job["readable"], job["limits"])

    def report(what: str) -> None:
        os.write(reports, f"{job['token']} {what}\n".encode())

    report(f"fences {' '.join(held)}")
    if "seccomp" not in held:
        if not job["allow_weak"]:
            return
        sys.addaudithook(make_audit_hook(os.path.realpath(job["directory"])))
    sys.path += job["paths"]
    tests: list[dict[str, Any]] = job["tests"]
    name = "completion" if tests else "__main__"
    module = sys.modules[name] = types.ModuleType(name)  # pickle, dataclasses and typing look a class's module up there
    names = module.__dict__
    names |= {"exit": sys.exit, "quit": sys.exit}
    run_test = harness.run_test  # before the code could replace it
    try:
        exec(compile(job["code"], "<completion>", "exec", dont_inherit=True), names)
    except SystemExit as error:
        if tests or error.code not in (None, 0):
            raise
    for number, test in enumerate(tests):
        try:
            run_test(test, names, f"<test {number}>")
        except Exception as error:
            sys.stderr.write(f"test {number}: {type(error).__name__}: {error}\n")
            if not job["partial"]:
                break
        else:
            report(f"passed {number}")
    sys.stdout.flush()
    report("ended")


if __name__ == "__main__":
    main()
