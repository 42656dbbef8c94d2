"""The demo's last words: what was trained, how well, and where it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from taskoffer_lab.demo.checks import Adapter
from taskoffer_lab.demo.examination import EXAM_FIGURES, Figure, figures_of
from taskoffer_lab.demo.follow import Seen
from taskoffer_lab.demo.script import EXAM_ROWS, WAITING


def summary(
    seen: Seen, adapters: Sequence[Adapter], exams: Mapping[str, Mapping[str, Any]], outputs: Path
) -> RenderableType:
    """Return the summary of a run whose adapters have been examined."""
    parts: list[RenderableType] = [
        Text("Adapters", style="bold"),
        _adapters(adapters, exams, outputs),
        Text(f"The exam of text is {EXAM_ROWS} rows that no trainer saw, that of images a picture of a new prompt."),
        Text.assemble("The adapters are in ", (readable(outputs), "bold")),
        Text(""),
        Text("Answers", style="bold"),
        _answers(seen),
    ]
    speakers = [adapter for adapter in adapters if "prompt" in exams[adapter.offer]]
    best = max(speakers, key=lambda adapter: adapter.fall, default=None)
    if best is not None:
        exam = exams[best.offer]
        parts += [
            Text(""),
            Text(f"What {best.model} answers to “{exam['prompt']}”", style="bold"),
            Text(f"  before  {exam['answer_before']}"),
            Text(f"  after   {exam['answer_after']}"),
        ]
    return Group(*parts)


def readable(path: Path) -> str:
    """Return a path as a shell would take it, with ~ for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _adapters(adapters: Sequence[Adapter], exams: Mapping[str, Mapping[str, Any]], outputs: Path) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("TaskOffer", no_wrap=True)
    table.add_column("Base model", no_wrap=True)
    table.add_column("Type", no_wrap=True)
    table.add_column("Held out (trainer)", no_wrap=True)
    table.add_column("Exam", no_wrap=True)
    table.add_column("Adapter", overflow="fold")
    for adapter in adapters:
        exam = exams[adapter.offer]
        examined = EXAM_FIGURES[adapter.task]
        table.add_row(
            adapter.offer,
            adapter.model,
            adapter.task,
            "\n".join(_change(figure, before, after) for figure, before, after in figures_of(adapter)),
            _change(examined, exam["before"], exam["after"]),
            str(adapter.folder.relative_to(outputs)),
        )
    return table


def _change(figure: Figure, before: float, after: float) -> str:
    words = figure.words.removeprefix("held-out ")
    return f"{words} {before:.3f} → {after:.3f}" + (f"  ({after / before - 1:+.0%})" if figure.share else "")


def _answers(seen: Seen) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for row in seen.ended:
        steps = [reason if verdict != "Admit" else "Admitted" for verdict, reason in seen.answers[row.name]]
        gpus = f"{row.gpus} GPU{'s' if (row.gpus or 0) > 1 else ''}" if row.gpus else ""
        style = "red" if row.verdict == "Reject" else "yellow" if WAITING in steps else "green"
        table.add_row(row.name, Text(" → ".join(steps), style), f"score {row.score}" if row.score else "", gpus)
    return table
