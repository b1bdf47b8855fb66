"""Run model-written Python where it can harm nothing: `python -I -S sandbox.py`, started by code_tests.

Imports only the standard library and nothing of this package: it locks its own process, then runs the code in it.

- Kernel, Linux on x86-64 and arm64: seccomp refuses sockets, new processes and threads, exec, signals to others,
  changes of owner, mode, limits and namespaces; Landlock, where the kernel has it, writes outside the directory.
- Limits: CPU seconds, address space, size of a file, open files.
- Everywhere: an audit hook of Python, which says in words what was refused. Alone it is weak, so code_tests asks first.

What is not promised: files that this user may read can be read, and code that looks for the harness in its own process
can forge a result. Rewards are read by training, not by an adversary; for one, use a server in a machine of its own.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h, in the order of the columns below."""
# fmt: off
SYSTEM_CALLS = {
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "perf_event_open": (298, 241), "bpf": (321, 280), "userfaultfd": (323, 282), "kcmp": (312, 272),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "reboot": (169, 142), "swapon": (167, 224), "acct": (163, 89),
    "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265),
}
# fmt: on
"""What seccomp refuses, with its number on either machine (None: it has no such call)."""
EPERM = 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
BPF_LOAD, BPF_JUMP_EQUAL, BPF_JUMP_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
SECCOMP_ALLOW, SECCOMP_ERRNO, SECCOMP_KILL = 0x7FFF0000, 0x00050000, 0x80000000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_WRITES = 0x1FF2 | 1 << 13 | 1 << 14
"""Write, remove, make of every kind; refer and truncate where the kernel has them."""
REFUSED_EVENTS = (
    *("socket.", "ctypes.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty."),
    *("os.kill", "os.chmod", "os.chown", "os.lchmod", "os.setxattr", "os.removexattr", "os.chflags", "os.utime"),
    *("_thread.start_new_thread", "_posixsubprocess.", "resource.", "signal.pthread_kill", "fcntl.", "syslog."),
)
"""Beginnings of the names of Python's audit events."""
WRITING_EVENTS = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def refuse_system_calls(libc: ctypes.CDLL) -> bool:
    """Install the seccomp filter; return whether the kernel took it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        return False
    architecture = ARCHITECTURES[machine]
    column = list(ARCHITECTURES).index(machine)
    numbers = [number for each in SYSTEM_CALLS.values() if (number := each[column]) is not None]
    program = [
        (BPF_LOAD, 0, 0, 4),  # the architecture of the call
        (BPF_JUMP_EQUAL, 1, 0, architecture),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_LOAD, 0, 0, 0),  # its number
        (BPF_JUMP_AT_LEAST, len(numbers) + 1, 0, 0x40000000),  # x86's second table of the same calls
    ]
    program += [(BPF_JUMP_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    program += [(BPF_RETURN, 0, 0, SECCOMP_ALLOW), (BPF_RETURN, 0, 0, SECCOMP_ERRNO | EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0)


def refuse_writes_outside(libc: ctypes.CDLL, directory: str) -> bool:
    """Confine writing to the directory by Landlock; return whether the kernel took it."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    writes = LANDLOCK_WRITES & ((1 << (13 if version < 2 else 14 if version < 3 else 15)) - 1)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.create_string_buffer(struct.pack("Q", writes), 8), 8, 0)
    if ruleset < 0:
        return False
    parent = os.open(directory, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", writes, parent), 12)
    taken = bool(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) == 0)
    taken = taken and libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(parent)
    os.close(ruleset)
    return taken


def lock(directory: str, cpu_s: int, memory_bytes: int, file_bytes: int) -> list[str]:
    """Give up what the code must not have; return the names of the kernel's fences that hold."""
    fences = []
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limits = {"CPU": cpu_s, "AS": memory_bytes, "FSIZE": file_bytes, "NOFILE": 64, "CORE": 0}
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (OSError, ValueError):  # macOS refuses to bound the address space
            sys.stderr.write(f"no limit {name}\n")
    if sys.platform == "linux" and refuse_writes_outside(libc, directory):
        fences.append("landlock")
    if refuse_system_calls(libc):
        fences.append("seccomp")
    sys.addaudithook(_make_hook(os.path.realpath(directory)))
    return fences


def _make_hook(directory: str) -> Callable[[str, tuple[Any, ...]], None]:
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
    """Read the job from standard input, lock, run the code and then each test; report each test that passes."""
    job = json.loads(sys.stdin.buffer.read())
    reports = os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(job["stdin"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    fences = lock(job["directory"], job["cpu_s"], job["memory_bytes"], job["file_bytes"])

    def report(what: str) -> None:
        os.write(reports, f"{job['token']} {what}\n".encode())

    report(f"fences {' '.join(fences)}")
    if "seccomp" not in fences and not job["allow_weak"]:
        return
    name = "completion" if job["tests"] else "__main__"
    module = sys.modules[name] = types.ModuleType(name)  # dataclasses look their module up there
    names = module.__dict__ | {"exit": sys.exit, "quit": sys.exit}
    try:
        exec(compile(job["code"], "<completion>", "exec"), names)
    except SystemExit as error:
        if job["tests"] or error.code not in (None, 0):
            raise
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"<test {number}>", "exec"), names)
        except Exception as error:
            sys.stderr.write(f"test {number}: {type(error).__name__}: {error}\n")
        else:
            report(f"passed {number}")
    sys.stdout.flush()
    report("ended")


if __name__ == "__main__":
    main()
