"""What the person in front of the demo sees: a live picture on a terminal, lines everywhere else.

Permanent text and, at chosen moments, the live picture are also recorded, so that a real run can be exported.
"""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from taskoffer_lab.demo.rows import Row

RECORD_WIDTH = 124
"""Columns of the exported picture."""

PLAIN_SECONDS = 5.0
"""Without a terminal, how often at most the progress of one offer or part is printed."""

_VERDICT_STYLE = {"Admit": "green", "Wait": "yellow", "Reject": "red"}
_STATE_STYLE = {"Running": "cyan", "Succeeded": "bold green", "Failed": "bold red", "Pending": "dim"}


@dataclass
class Phase:
    """A part of the run and how long it took or has taken."""

    name: str
    started: float
    ended: float | None = None
    detail: str = ""
    failed: bool = False

    def seconds(self, now: float) -> float:
        """Return its duration so far."""
        return (self.ended or now) - self.started


class Screen:
    """Shows phases and offers. Thread-safe; `tell` may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, console: Console | None = None) -> None:
        self.console = console or Console()
        self.record = Console(record=True, width=RECORD_WIDTH, file=io.StringIO(), force_terminal=True)
        self._clock = clock
        self._started = clock()
        self._lock = threading.RLock()
        self._phases: dict[str, Phase] = {}
        self._rows: list[Row] = []
        self._spoke: dict[str, float] = {}
        self._live = Live(
            console=self.console,
            get_renderable=self._picture,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @property
    def interactive(self) -> bool:
        """Whether a live picture is shown."""
        return self.console.is_terminal

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def __enter__(self) -> Self:
        if self.interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """End the live picture; what is printed from now on stays below what was printed before."""
        self._live.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase while the body runs."""
        self.begin(name)
        try:
            yield
        except BaseException:
            self.end(name, failed=True)
            raise
        self.end(name)

    def begin(self, name: str) -> None:
        """Start a phase; several may run at once."""
        with self._lock:
            self._phases[name] = Phase(name, self._clock())
            self._plain(f"{name} …")

    def end(self, name: str, *, failed: bool = False) -> None:
        """End a phase."""
        with self._lock:
            phase = self._phases[name]
            phase.ended, phase.detail, phase.failed = self._clock(), "", failed
            self._plain(f"{name}: {'failed' if failed else 'done'} after {phase.seconds(0):.1f} s")

    def tell(self, name: str, line: str) -> None:
        """Show a line of a phase's progress."""
        with self._lock:
            if name in self._phases:
                self._phases[name].detail = line
            if self._may_speak(f"phase {name}"):
                self._plain(f"{name}: {line}")

    def show(self, rows: Sequence[Row]) -> None:
        """Show the offers as they stand now."""
        with self._lock:
            before = {row.name: row for row in self._rows}
            self._rows = list(rows)
            if not self.interactive:
                for row in rows:
                    self._say_change(before.get(row.name), row)

    def print(self, *content: RenderableType) -> None:
        """Print something that stays."""
        with self._lock:
            self.console.print(*content)
            self.record.print(*content)

    def snapshot(self, title: str, *, phases: bool = True) -> None:
        """Record the live picture as it is now, with or without the phases."""
        with self._lock:
            picture = self._picture() if phases else offers_table(self._rows)
            self.record.print(Group(Text(title, style="bold"), picture, Text("")))

    def begun(self, name: str) -> float:
        """Return the seconds from the start to the begin of a phase."""
        return self._phases[name].started - self._started

    def phases_table(self) -> Table:
        """Return the phases with their times."""
        table = Table(box=None, show_header=False, padding=(0, 1))
        now = self._clock()
        for phase in self._phases.values():
            mark: RenderableType = Text("✗", "red") if phase.failed else Text("✓", "green")
            if phase.ended is None:
                mark = Spinner("dots") if self.interactive else Text("…")
            table.add_row(mark, phase.name, f"{phase.seconds(now):6.1f} s", Text(phase.detail[:90], "dim"))
        return table

    def export_svg(self, path: Path, title: str) -> None:
        """Write what was recorded as an SVG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.record.save_svg(str(path), title=title)

    @contextmanager
    def stderr_into(self, name: str) -> Iterator[None]:
        """Show what the body writes to stderr as progress of the phase `name`."""
        with redirect_stderr(_Lines(lambda line: self.tell(name, line.removeprefix("[lab] ")))):
            yield

    def _picture(self) -> RenderableType:
        with self._lock:
            parts: list[RenderableType] = [self.phases_table()]
            if self._rows:
                parts.append(offers_table(self._rows, self.console.width))
            return Group(*parts)

    def _may_speak(self, key: str) -> bool:
        now = self._clock()
        if now - self._spoke.get(key, -PLAIN_SECONDS) < PLAIN_SECONDS:
            return False
        self._spoke[key] = now
        return True

    def _say_change(self, old: Row | None, new: Row) -> None:
        if old is None or (old.verdict, old.reason, old.state, old.waits_for) != (
            new.verdict,
            new.reason,
            new.state,
            new.waits_for,
        ):
            self._spoke[f"offer {new.name}"] = self._clock()
            self._plain(describe(new))
        elif old.progress != new.progress and self._may_speak(f"offer {new.name}"):
            self._plain(describe(new))

    def _plain(self, line: str) -> None:
        if not self.interactive:
            self.console.print(f"{self.elapsed:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)


_COLUMNS: tuple[tuple[str, JustifyMethod, Callable[[Row], RenderableType], bool], ...] = (
    ("TaskOffer", "left", lambda row: row.name, True),
    ("Model", "left", lambda row: row.model, False),
    ("Score", "right", lambda row: row.score, False),
    ("Verdict", "left", lambda row: Text(row.reason or "…", _VERDICT_STYLE.get(row.verdict, "dim")), True),
    ("GPUs", "right", lambda row: "" if row.gpus is None else str(row.gpus), True),
    ("Training", "left", lambda row: _training(row), True),
    ("ETA", "right", lambda row: "" if row.eta is None or row.ended else f"{row.eta} s", True),
    ("Loss", "right", lambda row: row.loss[:5], False),
    ("Held-out loss", "left", lambda row: _held_out(row), False),
)
"""Name, alignment, content, and whether a narrow terminal shows it too."""

_WIDE = 115
"""From so many columns on a terminal shows all of the table."""


def offers_table(rows: Sequence[Row], width: int = RECORD_WIDTH) -> Table:
    """Return the table of offers for a terminal of some width."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in _COLUMNS if column[3] or width >= _WIDE]
    for name, justify, _, _ in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(content(row) for _, _, content, _ in columns))
    return table


def describe(row: Row) -> str:
    """Return a row as one line of text."""
    words = [f"{row.name:15}", row.verdict or "undecided"]
    if row.reason and row.reason != "Admitted":
        words.append(row.reason)
    if row.score:
        words.append(f"score {row.score}")
    if row.gpus is not None:
        words.append(f"{row.gpus} GPU{'s' if row.gpus > 1 else ''}")
    if row.state:
        words.append(row.state)
    if row.state == "Running" and row.progress is not None:
        words.append(f"{row.progress} %")
        if row.eta is not None:
            words.append(f"{row.eta} s left")
        if row.loss:
            words.append(f"loss {row.loss[:6]}")
    if row.waits_for:
        words.append(f"({row.waits_for})")
    if row.loss_after:
        words.append(f"held-out loss {_held_out(row)}")
    return "  ".join(words)


def _training(row: Row) -> Text:
    style = _STATE_STYLE.get(row.state, "")
    if row.state == "Running" and row.progress is not None:
        done = round(row.progress / 10)
        return Text.assemble(("█" * done, style), ("░" * (10 - done), "dim"), (f" {row.progress:3d} %", style))
    return Text(row.waits_for or row.state, style)


def _held_out(row: Row) -> str:
    if not row.loss_before:
        return ""
    return f"{row.loss_before[:5]} → {row.loss_after[:5]}" if row.loss_after else row.loss_before[:5]


class _Lines(io.TextIOBase):
    """A text stream that hands over whole lines; it is no terminal."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__()
        self._take = take
        self._rest = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Take a piece of text."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._take(line.rstrip())
        return len(text)

    def isatty(self) -> bool:
        """Return False: nobody draws here."""
        return False

    def writable(self) -> bool:
        """Return True."""
        return True


def stdout_console() -> Console:
    """Return the console of the demo: stdout, as wide as a table needs where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)
