"""The system calls that a reward's process is left with, as a seccomp filter. Standard library only.

The list holds what Python needs to compute and to import its own library. All else fails with EPERM, so there is
no socket (and no io_uring, which could open one), no process or thread, no signal to others, no tracing, and no
way to open a file for writing. A call in the convention of another architecture, whose numbers mean other
things, kills the process. Layout of the program and of what it looks at: Linux, Documentation/userspace-api/
seccomp_filter.rst and include/uapi/linux/{filter,seccomp,audit}.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

__all__ = ["ALLOWED", "ARCHITECTURES", "build_filter", "install"]

AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_AARCH64 = 0xC00000B7
ARCHITECTURES = {"x86_64": AUDIT_ARCH_X86_64, "aarch64": AUDIT_ARCH_AARCH64}
"""Machines (as ``uname -m`` says) that the list is written for, with the kernel's number of each."""

ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # name: number on x86_64, number on aarch64 (asm-generic); None where the machine has no such call.
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "sigaltstack": (131, 132),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "restart_syscall": (219, 128),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrandom": (318, 278),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
"""System calls that are allowed whatever their arguments are."""

OPEN = {"open": (2, None, 1), "openat": (257, 56, 2)}
"""Calls that open a file: numbers as above, and which argument holds the flags."""
FCNTL = (72, 25)
PRLIMIT = (302, 261)

# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and __O_TMPFILE: the same bits on both machines.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. Not F_SETOWN and F_SETSIG, which send signals to others.
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, value."""


def _argument(place: int) -> int:
    """Return where the low half of an argument lies; both machines are little-endian."""
    return _ARGUMENTS + 8 * place


def _only_if(number: int, checks: list[Instruction]) -> list[Instruction]:
    """Run the checks, which end by returning, for one system call and skip them for the others."""
    return [(_EQUAL, 0, len(checks), number), *checks]


def build_filter(machine: str) -> list[Instruction]:
    """Build the program for a machine.

    Args:
        machine: what ``uname -m`` says.

    Returns:
        The instructions of the program.

    Raises:
        ValueError: when the numbers of that machine are not known.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"no list of system calls for {machine}, only for {' and '.join(ARCHITECTURES)}")
    column = list(ARCHITECTURES).index(machine)
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += _only_if(number, [allow])
    for *opens, flags in OPEN.values():
        number = opens[column]
        if number is not None:
            read_only = [(_LOAD, 0, 0, _argument(flags)), (_ANY_BIT, 0, 1, _WRITING), refuse, allow]
            program += _only_if(number, read_only)
    commands = [(_EQUAL, len(_FCNTL_COMMANDS) - place, 0, one) for place, one in enumerate(_FCNTL_COMMANDS)]
    program += _only_if(FCNTL[column], [(_LOAD, 0, 0, _argument(1)), *commands, refuse, allow])
    # Limits may be read (no new ones are given) and only the own ones (process 0).
    zeros = [_argument(0), _argument(2), _argument(2) + 4]
    own: list[Instruction] = []
    for place in zeros:
        own += [(_LOAD, 0, 0, place), (_EQUAL, 1, 0, 0), refuse]
    program += _only_if(PRLIMIT[column], [*own, allow])
    return [*program, refuse]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install() -> None:
    """Put the filter on this process, for good; new programs cannot gain privileges either.

    Raises:
        OSError: when the kernel refuses.
        ValueError: on a machine without a list.
    """
    program = b"".join(struct.pack("=HBBI", *one) for one in build_filter(os.uname().machine))
    instructions = ctypes.create_string_buffer(program, len(program))
    pointer = _Program(len(program) // 8, ctypes.cast(instructions, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(pointer), zero, zero),
    ):
        if libc.prctl(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
