"""Locks the current process: namespaces, capabilities, limits, Landlock, seccomp. Standard library only.

- A user namespace with its own network, IPC and host name, where the kernel grants one; capabilities are dropped.
- Landlock: reads below the interpreter and the system's libraries, reads and writes below the working directory,
  nothing else; no access to abstract sockets or signals of other processes.
- seccomp: the allow list of `system_calls`.
- Limits: CPU seconds, address space, size of a file, open files. The parent bounds the directory as a whole.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path
from typing import Final

from trainer.rewards.sandbox.system_calls import MACHINES, filter_program

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
SIGKILL = 9
NEW_NAMESPACES: Final = 0x10000000 | 0x08000000 | 0x40000000 | 0x04000000
"""CLONE_NEWUSER, NEWIPC, NEWNET, NEWUTS."""
CAPSET: Final = {"x86_64": 126, "aarch64": 91}
CAPABILITY_VERSION: Final = 0x20080522
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
FILE_READ, DIRECTORY_READ, FILE_WRITE = 1 << 2, 1 << 3, 1 << 1
NUM_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""Rights to files by Landlock's version; from 5 on there are 16."""
READABLE: Final = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/proc/self", "/proc/cpuinfo", "/proc/meminfo"),
    "/sys/devices/system/cpu",
)


def lock(directory: str, readable: list[str], limits: dict[str, int]) -> list[str]:
    """Give up what the code must not have; return the names of the fences that hold.

    Args:
        directory: where the code may write.
        readable: further files and directories that it may read.
        limits: name of an RLIMIT -> its value.
    """
    fences = []
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        if libc.unshare(NEW_NAMESPACES) == 0:
            fences.append("namespaces")
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _drop_capabilities(libc)
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (OSError, ValueError):  # macOS refuses to bound the address space
            sys.stderr.write(f"no limit {name}\n")
    if sys.platform == "linux" and confine_files(libc, directory, readable):
        fences.append("landlock")
    if filter_system_calls(libc):
        fences.append("seccomp")
    return fences


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    number = CAPSET.get(platform.machine())
    if number is not None:
        header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION, 0))
        libc.syscall(number, header, ctypes.create_string_buffer(24))


def filter_system_calls(libc: ctypes.CDLL) -> bool:
    """Install the seccomp filter; return whether the kernel took it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        return False
    program = filter_program(machine, os.getpid())
    code = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0)


def confine_files(libc: ctypes.CDLL, directory: str, readable: list[str]) -> bool:
    """Confine files, abstract sockets and signals by Landlock; return whether the kernel took it."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << NUM_RIGHTS.get(version, 16)) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", rights, network, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(CREATE_RULESET, ctypes.create_string_buffer(attributes), len(attributes), 0)
    if ruleset < 0:
        return False
    allowed = dict.fromkeys((*READABLE, *readable), FILE_READ | DIRECTORY_READ)
    allowed |= {"/dev/null": FILE_READ | FILE_WRITE, directory: rights & ~1}  # the last bit is to execute
    is_taken = all(_allow(libc, ruleset, path, given) for path, given in allowed.items() if Path(path).exists())
    is_taken = is_taken and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_taken


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    handle = os.open(path, os.O_PATH)
    if not Path(path).is_dir():
        rights &= FILE_READ | FILE_WRITE
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, handle), 12)
    is_taken = bool(libc.syscall(ADD_RULE, ruleset, 1, rule, 0) == 0)
    os.close(handle)
    return is_taken
