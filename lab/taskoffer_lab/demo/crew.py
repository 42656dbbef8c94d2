"""The preparation's parts as processes: started side by side, followed line by line, ended together."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Self

from taskoffer_lab.demo.interrupts import postponed
from taskoffer_lab.errors import LabError
from taskoffer_lab.paths import package_root

END_SECONDS = 20.0
"""How long a part may clean up after SIGINT before it is killed."""

_POLL_SECONDS = 0.1
_TAIL_LINES = 25


@dataclass
class Part:
    """One running part.

    Attributes:
        name: Its name, for people.
        process: Leads a session of its own, so that all it starts can be ended with it.
        output: Its lines on stdout.
        tail: Its last lines on stderr.
    """

    name: str
    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    readers: list[threading.Thread] = field(default_factory=list)

    def finished(self) -> bool:
        """Tell whether it has ended; an end with an error raises.

        Raises:
            LabError: It failed; carries its last lines.
        """
        status = self.process.poll()
        if status is None:
            return False
        for reader in self.readers:
            reader.join()
        if status != 0:
            last = "\n".join(self.tail) or "it said nothing"
            raise LabError(f"{self.name} failed (exit status {status}):\n{last}")
        return True


class Crew:
    """Parts that run side by side. Leaving the context ends those that still run.

    Args:
        tell: Called with a part's name and a line of its progress, from any thread.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell = tell
        self._parts: dict[str, Part] = {}

    def start(self, name: str, *arguments: str) -> None:
        """Start `python -m taskoffer_lab.demo.prepare ARGUMENTS` as the part `name`."""
        path = os.pathsep.join(filter(None, [str(package_root()), os.environ.get("PYTHONPATH", "")]))
        with postponed():
            process = subprocess.Popen(
                [sys.executable, "-m", "taskoffer_lab.demo.prepare", *arguments, f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            part = Part(name, process)
            self._parts[name] = part
            for stream, take in ((process.stdout, part.output.append), (process.stderr, self._listener(part))):
                if stream is not None:
                    reader = threading.Thread(target=_read, args=(stream, take), name=f"{name}-reader", daemon=True)
                    reader.start()
                    part.readers.append(reader)

    def wait(self, name: str, while_waiting: Callable[[], None] = lambda: None) -> list[str]:
        """Wait for the end of a part and return what it wrote to stdout; any part's failure ends the wait.

        Raises:
            LabError: A part failed.
        """
        while not self._parts[name].finished():
            for part in self._parts.values():
                part.finished()
            while_waiting()
            time.sleep(_POLL_SECONDS)
        return self._parts[name].output

    def output_of(self, name: str) -> list[str]:
        """Return what a part that has ended wrote to stdout, however it ended."""
        return self._parts[name].output

    def running(self, name: str) -> bool:
        """Tell whether a part still runs."""
        return self._parts[name].process.poll() is None

    def end(self) -> None:
        """End what still runs: SIGINT to the part and all its programs, SIGKILL if that does not help."""
        running = [part for part in self._parts.values() if part.process.poll() is None]
        for part in running:
            _signal(part, signal.SIGINT)
        deadline = time.monotonic() + END_SECONDS
        for part in running:
            try:
                part.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(part, signal.SIGKILL)
                part.process.wait()
        for part in self._parts.values():
            for reader in part.readers:
                reader.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _listener(self, part: Part) -> Callable[[str], None]:
        def take(line: str) -> None:
            text = line.removeprefix("[lab] ").rstrip()
            part.tail.append(text)
            if text:
                self._tell(part.name, text)

        return take


def _read(stream: IO[str], take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line.rstrip("\n"))


def _signal(part: Part, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.process.pid, number)
