"""Progress on stderr: a spinner with elapsed time on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

HEARTBEAT_SECONDS = 30.0
"""How often a step that runs on says so when there is no terminal."""


class Step:
    """One step under way; the code that waits calls `tick` now and then."""

    def __init__(self, label: str, *, plain: bool) -> None:
        self._label = label
        self._plain = plain
        self._started = time.monotonic()
        self._last_line = self._started

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._started

    def tick(self) -> None:
        """Print a line if nothing was printed for `HEARTBEAT_SECONDS` and there is no spinner."""
        now = time.monotonic()
        if self._plain and now - self._last_line >= HEARTBEAT_SECONDS:
            self._last_line = now
            say(f"{self._label}: still running after {self.elapsed:.0f} s")


def say(line: str) -> None:
    """Print one line of progress to stderr."""
    print(f"[lab] {line}", file=sys.stderr, flush=True)


@contextmanager
def step(label: str, expectation: str = "") -> Iterator[Step]:
    """Show `label` with the elapsed time while the body runs, and how long it took at the end.

    Args:
        label: What is being done, e.g. `building kubelet`.
        expectation: How long it usually takes, shown in brackets.
    """
    text = f"{label} ({expectation})" if expectation else label
    plain = not sys.stderr.isatty()
    current = Step(label, plain=plain)
    if plain:
        say(f"{text} …")
        yield current
    else:
        columns = (SpinnerColumn(), TextColumn("[lab] {task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            shown.add_task(text, total=None)
            yield current
    say(f"{label}: done in {current.elapsed:.1f} s")
