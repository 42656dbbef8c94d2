"""Exclusive file locks between processes; the kernel frees them when their holder dies."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.1


def try_lock(path: Path) -> int | None:
    """Return the descriptor that holds the lock on `path`, or None if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock on `path`; `on_wait` is called once when somebody else holds it."""
    descriptor = try_lock(path)
    if descriptor is None and on_wait is not None:
        on_wait()
    while descriptor is None:
        time.sleep(_POLL_SECONDS)
        descriptor = try_lock(path)
    try:
        yield
    finally:
        os.close(descriptor)
