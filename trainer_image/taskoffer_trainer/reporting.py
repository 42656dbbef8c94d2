"""Writes the report of a run beside its result: ``report.json``, ``report.md`` and ``loss.png``.

The launcher does it once the ranks are gone, so that it costs no GPU any time. It knows the run's history from the
newest checkpoint, which has the log of all attempts in it.
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from taskoffer.api.contract import (
    AttemptEnd,
    ExitCode,
    FigureChange,
    HistoryPoint,
    Report,
    ReportedChange,
    RunConfig,
    Termination,
)
from taskoffer_trainer.checkpoints import (
    ADAPTER_FOLDER,
    complete_checkpoints,
    logged,
    read_run,
    write_json,
    write_text,
)
from taskoffer_trainer.clock import Clock, now
from taskoffer_trainer.figures import as_held_out, in_a_cell, short_name
from taskoffer_trainer.mirror import provisional_adapter

__all__ = ["PLOT_FILE", "REPORT_FILE", "has_report", "history_of", "report_end", "thinned"]

REPORT_FILE = "report.json"
TEXT_FILE = "report.md"
PLOT_FILE = "loss.png"
MOST_POINTS = 2000
"""Points of the history in a report; a picture shows no more, and a report is to stay small."""
PLOT_SWITCH = "TASKOFFER_LOSS_PLOT"
"""Environment variable; with 0 no picture is drawn, which saves a second and some memory."""

_NOT_FIGURES = frozenset({"step", "epoch", "total_flos", "train_loss", "train_runtime"})


def _finite(entry: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
    return {
        name: float(value)
        for name, value in numbers.items()
        if math.isfinite(value) and name not in _NOT_FIGURES and not name.endswith("_per_second")
    }


def history_of(log: list[dict[str, Any]]) -> list[HistoryPoint]:
    """Return the trainer's log by step; what was logged twice for a step, as after a restart, counts once."""
    steps: dict[int, dict[str, float]] = {}
    for entry in log:
        if isinstance(entry.get("step"), int) and (figures := _finite(entry)):
            steps.setdefault(entry["step"], {}).update(figures)
    return [HistoryPoint(step=step, figures=steps[step]) for step in sorted(steps)]


def thinned(points: list[HistoryPoint], most: int = MOST_POINTS) -> tuple[HistoryPoint, ...]:
    """Return at most so many points: the evaluations, and of the others every so many, the first and last included."""
    if len(points) <= most:
        return tuple(points)
    evaluated = [place for place, point in enumerate(points) if _is_evaluated(point)]
    kept = set(_spread(evaluated, most // 2))
    kept |= set(_spread([place for place in range(len(points)) if place not in kept], most - len(kept)))
    return tuple(points[place] for place in sorted(kept))


def _spread(places: list[int], most: int) -> list[int]:
    if len(places) <= most:
        return places
    if most < 2:
        return places[-1:]
    return [places[round(number * (len(places) - 1) / (most - 1))] for number in range(most)]


def _is_evaluated(point: HistoryPoint) -> bool:
    return any(name.startswith("eval_") for name in point.figures)


def _log(config: RunConfig) -> list[dict[str, Any]]:
    for checkpoint in complete_checkpoints(config)[:1]:
        return logged(checkpoint)
    return []


def _figures(config: RunConfig, termination: Termination, history: list[HistoryPoint]) -> Iterator[FigureChange]:
    said = _by_short_name(as_held_out(read_run(config).get("figures_before") or {}))
    before = {metric.name: float(metric.value) for metric in termination.figures_before} or said
    after = {metric.name: float(metric.value) for metric in termination.figures_after}
    evaluated = [point.figures for point in history if "eval_loss" in point.figures]
    best = _by_short_name(min(evaluated, key=lambda figures: figures["eval_loss"], default={}))
    for name in sorted({*before, *after}):
        yield FigureChange(name=name, before=before.get(name), best=best.get(name), after=after.get(name))


def _by_short_name(figures: Mapping[str, float]) -> dict[str, float]:
    return {short_name(name): value for name, value in figures.items()}


def _earlier(config: RunConfig) -> Iterator[AttemptEnd]:
    """Return the other attempts in the report that is there, if it is one of this job."""
    path = Path(config.output_dir) / REPORT_FILE
    if not path.is_file():
        return
    try:
        report = Report.model_validate_json(path.read_bytes())
    except ValidationError:
        print(f"trainer: {path} is no report of this version, so that earlier attempts are not in the new one")
        return
    if report.job_name == config.job_name:
        yield from (one for one in report.attempts if one.attempt != config.attempt)


def _attempt_end(config: RunConfig, clock: Clock, termination: Termination) -> AttemptEnd:
    return AttemptEnd(
        attempt=config.attempt,
        started=clock.started,
        ended=now(),
        exit_code=termination.exit_code,
        reason=termination.reason,
        message=termination.message,
        step=termination.step,
        resumed_from_step=termination.resumed_from_step,
        training_seconds=termination.training_seconds,
        tokens_per_second=termination.tokens_per_second,
        peak_gpu_bytes=termination.peak_gpu_bytes,
        peak_host_bytes=termination.peak_host_bytes,
    )


def _result(config: RunConfig, termination: Termination) -> tuple[Literal["Verified", "Provisional", "Nothing"], Any]:
    if termination.exit_code == ExitCode.DONE and termination.adapter_dir:
        return "Verified", ADAPTER_FOLDER
    folder = provisional_adapter(config)
    if folder is None:
        return "Nothing", None
    return "Provisional", str(folder.relative_to(config.output_dir))


def build_report(config: RunConfig, clock: Clock, termination: Termination) -> Report:
    """Put together what is known of a run at the end of an attempt."""
    history = history_of(_log(config))
    result, adapter = _result(config, termination)
    step = max(termination.step, history[-1].step if history else 0)
    return Report(
        job_name=config.job_name,
        task_id=config.task_id,
        task_type=config.task_type,
        base_model=config.model.name,
        revision=config.model.revision,
        result=result,
        adapter=adapter,
        reason=termination.reason,
        message=termination.message,
        step=step,
        total_steps=termination.total_steps,
        train_loss=termination.train_loss,
        figures=tuple(_figures(config, termination, history)),
        clamps=tuple(ReportedChange(**clamp.model_dump()) for clamp in termination.clamps),
        history=thinned(history),
        attempts=(*_earlier(config), _attempt_end(config, clock, termination))[-64:],
    )


def _shown(value: float | None, pattern: str = "{:.4f}") -> str:
    return "" if value is None else pattern.format(value)


_RESULTS = {
    "Verified": "The adapter was loaded onto a fresh base model and verified: `{}`.",
    "Provisional": "There is no verified result. The best adapter so far, checked for wholeness alone: `{}`.",
    "Nothing": "There is no adapter.",
}


def text_of(report: Report) -> str:
    """Return a report as Markdown for people."""
    steps = f"{report.step:,}" + (f" of {report.total_steps:,}" if report.total_steps else "")
    lines = [
        f"# {report.job_name}",
        "",
        f"{report.task_type.value} on {report.base_model}: **{report.reason}** after {steps} steps. {report.message}",
        "",
        _RESULTS[report.result].format(report.adapter),
    ]
    if report.figures:
        lines += ["", "| held out | before | best in training | after |", "|---|---|---|---|"]
        lines += [
            f"| {in_a_cell(one.name)} | {_shown(one.before)} | {_shown(one.best)} | {_shown(one.after)} |"
            for one in report.figures
        ]
    if report.history:
        lines += ["", f"![Loss by step]({PLOT_FILE})"]
    if report.clamps:
        lines += ["", "Settings that were changed to fit the model or the machine:", ""]
        lines += [
            f"* `{one.field}`: {one.requested} → {one.effective} ({one.reason}) {one.message}" for one in report.clamps
        ]
    lines += ["", "| attempt | started | exit code | reason | step | from step | training s | tokens/s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for end in report.attempts:
        rate = _shown(end.tokens_per_second, "{:,.0f}")
        resumed = "" if end.resumed_from_step is None else str(end.resumed_from_step)
        lines.append(
            f"| {end.attempt} | {end.started:%Y-%m-%d %H:%M:%SZ} | {end.exit_code} | {end.reason} | {end.step} | "
            f"{resumed} | {_shown(end.training_seconds, '{:.0f}')} | {rate} |"
        )
    return "\n".join(lines) + "\n"


def has_report(config: RunConfig) -> bool:
    """Tell whether the report in the output folder knows of a verified result; it is written last of the three."""
    path = Path(config.output_dir) / REPORT_FILE
    try:
        return Report.model_validate_json(path.read_bytes()).result == "Verified"
    except (OSError, ValidationError):
        return False


def report_end(config: RunConfig, clock: Clock, termination: Termination) -> None:
    """Write the report at the end of an attempt.

    A report that cannot be written makes no failure of a result that is there, so that is only said in the log.
    """
    folder, began = Path(config.output_dir), time.monotonic()
    try:
        report = build_report(config, clock, termination)
        _draw(report, termination, folder / PLOT_FILE)
        write_text(folder / TEXT_FILE, text_of(report))
        write_json(folder / REPORT_FILE, report.to_wire())
    except Exception:  # noqa: BLE001 - disks fail in ways of their own.
        traceback.print_exc()
        print(f"trainer: the report in {folder} could not be written; the result is not concerned", flush=True)
        return
    print(f"trainer: report in {folder}, {time.monotonic() - began:.1f} s", flush=True)


def _draw(report: Report, termination: Termination, path: Path) -> None:
    # Whoever stops a run waits for its end, and there will be another attempt that draws the picture.
    if termination.exit_code == ExitCode.STOPPED or not report.history or os.environ.get(PLOT_SWITCH) == "0":
        return
    try:
        from taskoffer_trainer.plot import draw

        draw(report, path)
    except Exception:  # noqa: BLE001 - drawing libraries fail in ways of their own, and may not be there.
        traceback.print_exc()
        print(f"trainer: {path} could not be drawn; the report goes without it", flush=True)
