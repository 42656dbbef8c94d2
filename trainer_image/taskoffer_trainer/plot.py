"""Draws the losses of a run by step. Imported only where it is needed, because matplotlib takes a second to load."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Report

__all__ = ["draw"]

_WIDTH, _HEIGHT, _DOTS = 8.0, 4.5, 120
_MOST_PANELS = 4


def _series(report: Report, name: str) -> tuple[list[int], list[float]]:
    points = [(point.step, point.figures[name]) for point in report.history if name in point.figures]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean over a window that grows with the number of values, the present one at its end."""
    window = max(1, len(values) // 50)
    return [sum(part) / len(part) for end in range(len(values)) if (part := values[max(0, end - window + 1) : end + 1])]


def _losses(axes: Any, report: Report) -> None:
    steps, losses = _series(report, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.5, label="training, per step")
    axes.plot(*_series(report, "eval_loss"), color="tab:orange", marker="o", markersize=4, label="held out")
    before = next((one.before for one in report.figures if one.name == "eval_loss"), None)
    if before is not None:
        axes.axhline(before, color="tab:orange", linestyle="--", linewidth=1, label="held out, base model")
    axes.set_ylabel("loss")
    axes.legend()


def _figure(axes: Any, report: Report, name: str) -> None:
    axes.plot(*_series(report, name), color="tab:green", marker="o", markersize=4)
    before = next((one.before for one in report.figures if one.name == name), None)
    if before is not None:
        axes.axhline(before, color="tab:green", linestyle="--", linewidth=1)
    axes.set_ylabel(name.removeprefix("eval_").replace("_", " "), parse_math=False)


def draw(report: Report, path: Path) -> None:
    """Draw training and held-out loss, and below them what else the method measures, and replace the file.

    Args:
        report: the run.
        path: the PNG file.
    """
    with tempfile.TemporaryDirectory(prefix="matplotlib-") as folder:
        # The user of a pod may have no home, and matplotlib keeps a list of the machine's fonts there.
        os.environ.setdefault("MPLCONFIGDIR", folder)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = {name for point in report.history for name in point.figures if name.startswith("eval_")}
        others = sorted(names - {"eval_loss"})[:_MOST_PANELS]
        heights = [2.0, *(1.0 for _ in others)]
        figure = Figure(figsize=(_WIDTH, _HEIGHT * sum(heights) / 2), dpi=_DOTS, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _losses(panels[0], report)
        for axes, name in zip(panels[1:], others, strict=True):
            _figure(axes, report, name)
        for axes in panels:
            axes.grid(visible=True, alpha=0.3)
        panels[-1].set_xlabel("step")
        panels[0].set_title(f"{report.task_type.value} on {report.base_model}", parse_math=False)
        partial = path.with_name(f".{path.name}.tmp")
        figure.savefig(partial, format="png")
        partial.replace(path)
