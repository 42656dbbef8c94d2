"""Takes from the process that will run a reward's source text all that it does not need. Standard library only.

The layers, in this order: resource limits, namespaces of its own for users and network, no capabilities, Landlock
(files, and where the kernel has it signals and TCP), and a seccomp filter. The last one is the only one that a
reward cannot do without; the others depend on kernel and pod, and what is in force is reported.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable

from taskoffer_trainer import seccomp

__all__ = [
    "LANDLOCK",
    "LAYERS",
    "LIMITS",
    "NETWORK_NAMESPACE",
    "NO_CAPABILITIES",
    "SECCOMP",
    "confine",
    "die_with",
    "drop_capabilities",
    "enter_network_namespace",
    "limit_resources",
    "restrict_files",
]

LIMITS = "resource-limits"
NETWORK_NAMESPACE = "network-namespace"
NO_CAPABILITIES = "no-capabilities"
LANDLOCK = "landlock"
SECCOMP = "seccomp"
LAYERS = (LIMITS, NETWORK_NAMESPACE, NO_CAPABILITIES, LANDLOCK, SECCOMP)
"""Names of all layers in the order in which they are put on."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522
# The same numbers on every machine (include/uapi/asm-generic/unistd.h).
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_ASK_VERSION, _LANDLOCK_RULE_PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_OPEN_FILES = 32

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _syscall(number: int, *arguments: object) -> int:
    longs = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *longs))


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def die_with(parent: int) -> None:
    """End this process together with the thread that started it.

    Raises:
        ProcessLookupError: when the parent is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError("the process that asked for the sandbox is gone")


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit address space and CPU time; no file may grow, no core is dumped, few files may be open.

    The number of processes is left to seccomp: RLIMIT_NPROC counts all processes of the user, so it would depend
    on what else runs.
    """
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        hard = resource.getrlimit(kind)[1]
        new = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (new, new))


def enter_network_namespace() -> None:
    """Leave the network for an empty one, whose loopback is down as well.

    A user namespace comes with it, since without privileges that is the only way to make one.

    Raises:
        OSError: when the kernel, or the pod's own seccomp profile, refuses.
    """
    _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))


def drop_capabilities() -> None:
    """Give up all capabilities: a new user namespace brings a full set of them, and a pod may run as root.

    Raises:
        OSError: when the kernel refuses.
    """
    number = _CAPSET.get(os.uname().machine)
    if number is None:
        raise OSError(f"the number of capset on {os.uname().machine} is not known")
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    nothing = ctypes.create_string_buffer(24)
    _syscall(number, header, nothing)


def restrict_files(readable: tuple[str, ...]) -> str:
    """Allow reading below some folders and nothing else of the file system (Landlock).

    Handled is whatever this kernel's version knows: 13 rights in version 1, REFER in 2, TRUNCATE in 3, TCP in 4,
    IOCTL_DEV in 5, abstract Unix sockets and signals to others in 6 (Linux, Documentation/userspace-api/landlock.rst).

    Args:
        readable: folders; those that do not exist are left out.

    Returns:
        The version of the kernel's Landlock.

    Raises:
        OSError: when the kernel has none or refuses.
    """
    version = _syscall(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_ASK_VERSION)
    rights = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    files, network, scopes = (1 << rights) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", files, network, scopes))
    ruleset = _syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        for path in readable:
            if not os.path.isdir(path):
                continue
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = ctypes.create_string_buffer(struct.pack("=Qi", _READ_FILE | _READ_DIR, folder))
                _syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            finally:
                os.close(folder)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return f"version {version}"


def _library_folders() -> tuple[str, ...]:
    """Return where Python's standard library, what its modules are linked with, and the time zones lie."""
    return (*sys.path, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")


def confine(memory_bytes: int, cpu_seconds: int, layers: tuple[str, ...] = LAYERS) -> dict[str, str]:
    """Put the layers on this process.

    Args:
        memory_bytes: most address space.
        cpu_seconds: most CPU time over the life of the process.
        layers: which layers to try.

    Returns:
        The layers that were tried: an empty text for each that is in force, else why it is not.
    """
    put_on: dict[str, Callable[[], object]] = {
        LIMITS: lambda: limit_resources(memory_bytes, cpu_seconds),
        NETWORK_NAMESPACE: enter_network_namespace,
        NO_CAPABILITIES: drop_capabilities,
        LANDLOCK: lambda: restrict_files(_library_folders()),
        SECCOMP: seccomp.install,
    }
    found: dict[str, str] = {}
    for name in layers:
        try:
            put_on[name]()
            found[name] = ""
        except (OSError, ValueError) as error:
            found[name] = getattr(error, "strerror", None) or str(error)
    return found
