"""Running a long program: its output in a log, a line of progress now and then, and its end when we end."""

import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.progress import say

Report = Callable[[str], None]
"""Receives one line of progress, without a line break."""

QUIET_SECONDS = 2.0
"""What ends within this time is not worth a line."""

HEARTBEAT_SECONDS = 15.0
"""How often a program that runs on is reported."""

_POLL_SECONDS = 0.2
_TAIL_LINES = 25


class CancelledError(LabError):
    """The caller asked for an end."""


@dataclass(frozen=True)
class Reporter:
    """Where progress goes, and how the caller ends what runs.

    Attributes:
        report: Receives the lines.
        cancelled: When set, the running program is killed and `CancelledError` raised.
    """

    report: Report = say
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def stopping(self) -> bool:
        """Whether the caller, or the interpreter, is ending."""
        return self.cancelled.is_set() or not threading.main_thread().is_alive()


def run_program(
    argv: Sequence[str | Path],
    label: str,
    reporter: Reporter,
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    milestone: Callable[[str], str | None] = lambda line: None,
) -> str:
    """Run a program to its end and return what it wrote (both streams).

    Args:
        argv: Program and arguments.
        label: What it does, for progress and errors.
        reporter: Where progress goes.
        log: File that receives the output; replaced.
        environment: Added to this process' environment.
        milestone: Turns a line of output into what is being done, or None.

    Raises:
        LabError: It failed; carries the last lines of its output and the log's path.
        CancelledError: The caller asked for an end.
    """
    started = time.monotonic()
    progress = _Progress(label, reporter.report, started)
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        ) as process,
    ):
        try:
            for line in _lines(process, reporter, progress):
                sink.write(line.encode() + b"\n")
                lines.append(line)
                progress.detail = milestone(line) or progress.detail
            status = process.wait()
        finally:
            process.kill()
    if status != 0:
        tail = "\n".join(lines[-_TAIL_LINES:])
        raise LabError(f"{label} failed with status {status}:\n{tail}", f"the whole output is in {log}")
    progress.done()
    return "\n".join(lines)


def _lines(process: subprocess.Popen[bytes], reporter: Reporter, progress: "_Progress") -> Iterator[str]:
    """Yield the lines of a running program; between them the progress ticks and the caller may cancel."""
    descriptor = process.stdout.fileno() if process.stdout else -1
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if reporter.stopping:
                process.kill()
                raise CancelledError("cancelled", "start it again; finished layers are kept")
            progress.tick()
            if not selector.select(_POLL_SECONDS):
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                break
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")


class _Progress:
    """Says nothing for a short program, and something now and then for a long one."""

    def __init__(self, label: str, report: Report, started: float) -> None:
        self.detail = ""
        self._label = label
        self._report = report
        self._started = started
        self._last = started
        self._spoke = False

    def tick(self) -> None:
        """Report the start after `QUIET_SECONDS` and then every `HEARTBEAT_SECONDS`."""
        now = time.monotonic()
        if not self._spoke and now - self._started >= QUIET_SECONDS:
            self._say(f"{self._label} …", now)
        elif self._spoke and now - self._last >= HEARTBEAT_SECONDS:
            detail = f": {self.detail}" if self.detail else ""
            self._say(f"{self._label}, {now - self._started:.0f} s{detail}", now)

    def done(self) -> None:
        """Report the end of what was reported before."""
        if self._spoke:
            self._report(f"{self._label}: done in {time.monotonic() - self._started:.1f} s")

    def _say(self, line: str, now: float) -> None:
        self._spoke, self._last = True, now
        self._report(line)
