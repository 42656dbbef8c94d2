"""Keeps a run's log in the output folder, where it outlives the pod: what goes to the container's log goes there too.

The launcher's own standard output and error, which the ranks inherit, become pipes; a thread hands on what comes
through them and writes it into ``log.txt``. A full file becomes ``log.1.txt``, and the one before it goes, so that the
latest part of the log over all attempts stays and its size is bounded.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LOG_BYTES", "LOG_FILE", "OLDER_LOG_FILE", "LogFile", "kept_log"]

LOG_FILE = "log.txt"
OLDER_LOG_FILE = "log.1.txt"
LOG_BYTES = 4 << 20
"""Most bytes of each of the two files."""
_CHUNK = 65536
_LAST_WORDS_SECONDS = 5.0
"""How long the end of the output is waited for."""


class LogFile:
    """A file of bounded size. When it cannot be written, that is said once and the run goes on without it."""

    def __init__(self, folder: Path, limit: int = LOG_BYTES) -> None:
        self.path, self.limit = folder / LOG_FILE, limit
        self.failed: OSError | None = None
        self._lock = threading.Lock()
        self._size = self.path.stat().st_size if self.path.exists() else 0

    def write(self, data: bytes) -> str | None:
        """Append to the file; returns a line about the first error, once."""
        with self._lock:
            if self.failed is not None:
                return None
            try:
                self._append(data)
            except OSError as error:
                self.failed = error
                return f"trainer: {self.path} is not written any more: {error}\n"
        return None

    def _append(self, data: bytes) -> None:
        if self._size and self._size + len(data) > self.limit:
            self.path.replace(self.path.with_name(OLDER_LOG_FILE))
            self._size = 0
        with self.path.open("ab") as file:
            file.write(data)
        self._size += len(data)


def _hand_on(reader: int, original: int, log: LogFile) -> None:
    """Copy what comes through a pipe to the container's log and to the file until nobody can write any more."""
    with open(reader, "rb", buffering=0) as pipe, open(original, "wb", buffering=0, closefd=False) as target:
        while data := pipe.read(_CHUNK):
            fault = log.write(data)
            # Who reads the container's log may be gone; the ranks must not notice.
            with contextlib.suppress(OSError):
                target.write(data)
                if fault is not None:
                    target.write(fault.encode())


@contextlib.contextmanager
def kept_log(folder: Path, heading: str, limit: int = LOG_BYTES) -> Iterator[LogFile]:
    """Keep what this process and those that it starts write to standard output and error, until the block ends.

    Args:
        folder: where ``log.txt`` is kept.
        heading: a line that an attempt's part of it begins with.
        limit: most bytes of each file.
    """
    log = LogFile(folder, limit)
    if (fault := log.write(f"{heading}\n".encode())) is not None:
        print(fault, end="")
    originals, threads = [], []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in (1, 2):
        original = os.dup(descriptor)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.dup2(writer, descriptor)
        os.close(writer)
        originals.append(original)
        threads.append(threading.Thread(target=_hand_on, args=(reader, original, log), name="log", daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield log
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, original in enumerate(originals, start=1):
            # This takes the pipe's last writing end away, and the thread comes to its end.
            os.dup2(original, descriptor)
        for thread, original in zip(threads, originals, strict=True):
            thread.join(timeout=_LAST_WORDS_SECONDS)
            # A process that outlives the block still writes; what it says goes where it went before.
            if not thread.is_alive():
                os.close(original)
