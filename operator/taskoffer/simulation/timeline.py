"""A picture of who had which GPUs when, one row of lanes per policy."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taskoffer.simulation.extras import load
from taskoffer.simulation.run import Run, Stretch

_HOUR = 3600.0
_COLOURS = {"InTime": "#4c9f70", "Late": "#e3a53d", "Failed": "#c8553d"}
_WORDS = {"InTime": "in time", "Late": "late", "Failed": "failed"}
"""Colours that differ in lightness as well, for those who cannot tell red from green."""
_WIDTH, _ROW_HEIGHT, _FRAME_HEIGHT, _LANE_HEIGHT = 14.0, 0.5, 1.2, 0.14
"""Inches: the picture's width; a row's least height, the frame's height, and a lane's."""
_GAP = 1e-9
"""Seconds by which floating-point ends may exceed the next start."""


@dataclass(frozen=True, slots=True)
class Slots:
    """The GPU slots of a run, over all nodes from the first one's 0 up."""

    run: Run
    slots: tuple[int, ...]


def assign_slots(runs: Sequence[Run], gpus: int = 8) -> list[Slots]:
    """Give each run slots of its node that nobody has at the time: the first contiguous ones, else the first free ones.

    A run that was stopped in between gets slots for each stretch, as a run of its own. Nodes are numbered in the order
    of their names, ``gpus`` slots each.

    Raises:
        ValueError: when more GPUs of a node are in use than it has.
    """
    runs = [_alone(run, part) for run in runs for part in run.parts]
    offsets = {node: n * gpus for n, node in enumerate(sorted({run.node for run in runs}))}
    free = {node: set(range(gpus)) for node in offsets}
    busy: defaultdict[str, list[tuple[float, int, tuple[int, ...]]]] = defaultdict(list)
    assigned = []
    for number, run in enumerate(sorted(runs, key=lambda run: (run.start, run.name))):
        ended = busy[run.node]
        while ended and ended[0][0] <= run.start + _GAP:
            free[run.node].update(heapq.heappop(ended)[2])
        slots = _first_fit(free[run.node], run.gpus)
        if slots is None:
            raise ValueError(f"{run.name} needs {run.gpus} GPUs of {run.node}, {len(free[run.node])} are free")
        free[run.node].difference_update(slots)
        heapq.heappush(ended, (run.end, number, slots))
        assigned.append(Slots(run, tuple(offsets[run.node] + slot for slot in slots)))
    return assigned


def _alone(run: Run, part: Stretch) -> Run:
    return replace(run, start=part.start, end=part.end, node=part.node, stretches=())


def _first_fit(free: set[int], count: int) -> tuple[int, ...] | None:
    ordered = sorted(free)
    if count > len(ordered):
        return None
    contiguous = (
        tuple(ordered[n : n + count])
        for n in range(len(ordered) - count + 1)
        if ordered[n + count - 1] - ordered[n] == count - 1
    )
    return next(contiguous, tuple(ordered[:count]))


def draw(
    runs_by_policy: Mapping[str, Sequence[Run]],
    path: Path | str,
    gpus: int = 8,
    title: str = "GPUs over time",
    start_hours: float = 0.0,
    end_hours: float | None = None,
) -> None:
    """Draw a timeline of the GPUs; the same runs always give the same file.

    Args:
        runs_by_policy: The runs under each policy; policies are drawn from top to bottom in this order.
        path: Where to write, as PNG or SVG by its suffix.
        gpus: The GPUs of each node.
        title: What stands above.
        start_hours: The first hour that is shown, since the trace's start.
        end_hours: The last one; the end of the last run if None.

    Raises:
        MissingExtraError: when matplotlib is not installed.
        ValueError: when the suffix is another, there is no policy, an outcome is unknown, the window is empty, or
            a node is over-booked.
    """
    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{target.name} is neither .png nor .svg")
    if not runs_by_policy:
        raise ValueError("there is no policy to draw")
    odd = {run.outcome for runs in runs_by_policy.values() for run in runs} - set(_COLOURS)
    if odd:
        raise ValueError(f"no colour for the outcome {', '.join(sorted(odd))}")
    last = max((run.end / _HOUR for runs in runs_by_policy.values() for run in runs), default=start_hours + 1.0)
    end = last if end_hours is None else end_hours
    if end <= start_hours:
        raise ValueError(f"nothing lies between hour {start_hours:g} and hour {end:g}")
    matplotlib = load("matplotlib")
    figure = _figure(runs_by_policy, gpus, title, start_hours, end)
    # Without these the file would hold the moment and random ids.
    with matplotlib.rc_context({"svg.hashsalt": "taskoffer", "svg.fonttype": "path"}):
        figure.savefig(target, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _figure(
    runs_by_policy: Mapping[str, Sequence[Run]], gpus: int, title: str, start_hours: float, end_hours: float
) -> Any:
    lanes = {
        policy: gpus * max(1, len({part.node for run in runs for part in run.parts}))
        for policy, runs in runs_by_policy.items()
    }
    heights = [_ROW_HEIGHT + _LANE_HEIGHT * count for count in lanes.values()]
    figure = load("matplotlib.figure").Figure(figsize=(_WIDTH, _FRAME_HEIGHT + sum(heights)), layout="constrained")
    load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    grid = figure.subplots(len(lanes), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (policy, runs) in zip(grid[:, 0], runs_by_policy.items(), strict=True):
        shown = [
            one
            for one in assign_slots(runs, gpus)
            if one.run.end > start_hours * _HOUR and one.run.start < end_hours * _HOUR
        ]
        _row(axes, policy, shown, lanes[policy], gpus)
    grid[0, 0].set_xlim(start_hours, end_hours)
    grid[-1, 0].set_xlabel("hours since the start of the trace")
    figure.suptitle(title, x=0.01, ha="left")
    patch = load("matplotlib.patches").Patch
    handles = [patch(color=colour, label=_WORDS[outcome]) for outcome, colour in _COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def _row(axes: Any, policy: str, shown: Sequence[Slots], lanes: int, gpus: int) -> None:
    """Draw one policy: a block per run and stretch of neighbouring slots."""
    blocks: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for one in shown:
        begin, end = one.run.start / _HOUR, one.run.end / _HOUR
        for low, high in _stretches(one.slots):
            blocks[one.run.outcome].append([(begin, low), (end, low), (end, high + 1), (begin, high + 1)])
    polygons = load("matplotlib.collections").PolyCollection
    for outcome, colour in _COLOURS.items():
        axes.add_collection(polygons(blocks[outcome], facecolors=colour, edgecolors="white", linewidths=0.6))
    for node in range(gpus, lanes, gpus):
        axes.axhline(node, color="black", linewidth=0.8)
    axes.set_ylim(lanes, 0)
    axes.set_yticks(range(0, lanes + 1, gpus))
    # A run that was stopped in between is drawn in several parts.
    worths = {one.run.name: one.run.worth for one in shown}
    axes.set_ylabel("GPUs")
    axes.set_title(f"{policy}: {len(worths)} runs, worth {sum(worths.values()):,.1f}", loc="left", fontsize="medium")
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)


def _stretches(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last slot of each stretch of neighbours."""
    stretches: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if stretches and slot == stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], slot)
        else:
            stretches.append((slot, slot))
    return stretches
