"""The system calls that sandboxed Python may make, as a seccomp program.

An allow list: a call that is not named here fails with EPERM. Numbers are (x86-64, arm64), None where the machine has
no such call. Standard library only, since the sandbox runs without site-packages.
"""

import struct
from typing import Final

MACHINES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h, in the order of the columns below."""
# fmt: off
ALLOWED: Final[dict[str, tuple[int | None, int | None]]] = {
    # files and memory; Landlock and the limits say which files and how much
    "read": (0, 63), "write": (1, 64), "open": (2, None), "openat": (257, 56), "close": (3, 57),
    "close_range": (436, 436), "creat": (85, None), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "ftruncate": (77, 46), "fsync": (74, 82), "fdatasync": (75, 83),
    "fadvise64": (221, 223), "flock": (73, 32), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "readlink": (89, None), "readlinkat": (267, 78),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "msync": (26, 227), "mincore": (27, 232), "madvise": (28, 233),
    # waiting and time
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd": (284, None), "eventfd2": (290, 19), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "times": (100, 153),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "pause": (34, None),
    # threads and signals of this process
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "membarrier": (324, 283), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94), "arch_prctl": (158, None),
    # questions about itself
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getpgrp": (111, None), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "uname": (63, 160),
    "sysinfo": (99, 179), "getrusage": (98, 165), "getrlimit": (97, 163), "getrandom": (318, 278),
    # the socket pair by which asyncio wakes itself; `socket` itself is refused
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockopt": (55, 209), "setsockopt": (54, 208),
    "getsockname": (51, 204), "getpeername": (52, 205),
}
CONDITIONAL: Final[dict[str, tuple[int | None, int | None]]] = {
    "clone": (56, 220), "fcntl": (72, 25), "ioctl": (16, 29), "kill": (62, 129), "tgkill": (234, 131),
    "prctl": (157, 167), "prlimit64": (302, 261), "sendto": (44, 206), "socketpair": (53, 199),
}
"""Allowed with some arguments only, see `_conditions`."""
NOT_THERE: Final[dict[str, tuple[int | None, int | None]]] = {"clone3": (435, 435), "openat2": (437, 437)}
"""Fail with ENOSYS: the C library then falls back to a call whose arguments a filter can read."""
# fmt: on
EPERM, ENOSYS = 1, 38
RETURN_ALLOW, RETURN_ERRNO, RETURN_KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, AND, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x45, 0x35, 0x06
CLONE_THREAD, CLONE_VM, CLONE_NAMESPACES = 0x10000, 0x100, 0x7E020000
F_SETFL, O_ASYNC = 4, 0x2000
FCNTL_COMMANDS: Final = (0, 1, 2, 3, 5, 6, 7, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC; not F_SETOWN, F_SETSIG, leases."""
IOCTL_REQUESTS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
PRCTL_OPTIONS: Final = (15, 16, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_VMA: names of threads and of memory."""
AF_UNIX: Final = 1

Instruction = tuple[int, int, int, int]


def filter_program(machine: str, pid: int) -> bytes:
    """Return the BPF program for seccomp.

    Args:
        machine: a key of `MACHINES`.
        pid: the sandbox's process id, the only one that its signals may go to.
    """
    column = list(MACHINES).index(machine)
    program: list[Instruction] = [
        (LOAD, 0, 0, 4),  # the architecture of the call
        (JUMP_EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, RETURN_KILL),
        (LOAD, 0, 0, 0),  # its number
        (JUMP_AT_LEAST, 0, 1, 0x40000000),  # x86's second table of the same calls
        (RETURN, 0, 0, RETURN_ERRNO | EPERM),
    ]
    conditions = _conditions(pid)
    for name, numbers in {**ALLOWED, **CONDITIONAL, **NOT_THERE}.items():
        number = numbers[column]
        if number is None:
            continue
        if name in conditions:
            then = conditions[name]
        else:
            then = [(RETURN, 0, 0, RETURN_ALLOW if name in ALLOWED else RETURN_ERRNO | ENOSYS)]
        program += [(JUMP_EQUAL, 0, len(then), number), *then]
    program.append((RETURN, 0, 0, RETURN_ERRNO | EPERM))
    return b"".join(struct.pack("HBBI", *line) for line in program)


def _conditions(pid: int) -> dict[str, list[Instruction]]:
    """What is asked of the arguments of each conditional call; every list ends in a return."""
    allow, refuse = (RETURN, 0, 0, RETURN_ALLOW), (RETURN, 0, 0, RETURN_ERRNO | EPERM)
    thread = CLONE_THREAD | CLONE_VM
    return {
        "clone": [  # a thread, and in no namespace of its own
            _low(0), (JUMP_ANY_BIT, 0, 1, CLONE_NAMESPACES), refuse,
            (AND, 0, 0, thread), (JUMP_EQUAL, 0, 1, thread), allow, refuse,
        ],
        "fcntl": [
            *_one_of(1, FCNTL_COMMANDS)[:-1], (JUMP_EQUAL, 1, 0, F_SETFL), refuse,
            _low(2), (JUMP_ANY_BIT, 0, 1, O_ASYNC), refuse, allow,
        ],
        "ioctl": _one_of(1, IOCTL_REQUESTS),
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "prctl": _one_of(0, PRCTL_OPTIONS),
        "prlimit64": _is_null(2),  # reads a limit, sets none
        "sendto": _is_null(4),  # to the socket's own peer, to no address
        "socketpair": _one_of(0, (AF_UNIX,)),
    }  # fmt: skip


def _low(argument: int) -> Instruction:
    """Load the lower half of an argument."""
    return (LOAD, 0, 0, 16 + 8 * argument)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow where the argument is one of the values, and refuse elsewhere."""
    checks = [line for value in values for line in ((JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, RETURN_ALLOW))]
    return [_low(argument), *checks, (RETURN, 0, 0, RETURN_ERRNO | EPERM)]


def _is_null(argument: int) -> list[Instruction]:
    """Allow where a pointer is null."""
    high = (LOAD, 0, 0, 20 + 8 * argument)
    refuse = (RETURN, 0, 0, RETURN_ERRNO | EPERM)
    return [_low(argument), (JUMP_EQUAL, 0, 3, 0), high, (JUMP_EQUAL, 0, 1, 0), (RETURN, 0, 0, RETURN_ALLOW), refuse]
