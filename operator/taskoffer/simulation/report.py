"""What a policy made of traces: its figures, their mean and spread over several traces, as a table or as JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from taskoffer.simulation.engine import Result
from taskoffer.simulation.trace import Trace


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one trace under one policy."""

    offers: int
    accepted: int
    in_time: int
    late: int
    failed: int
    penalty_rate: float
    """Late and failed ones as a share of the accepted ones; 0 where none was accepted."""
    preemptions: int
    """How often jobs were stopped for others."""
    refused: int
    waiting: int
    """Offers that nothing would ever have answered."""
    busy_hours: float
    idle_hours: float
    """GPU-hours until the end of the trace or of the last job."""
    utilisation: float
    earned: float
    worth: float
    """Of all offers of the trace."""
    judged: int = 0
    """Offers done in time whose losses the trace gives."""
    first_places: int = 0
    """Those of them whose own loss is below the best other one."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Refused offers by reason."""


def figures_of(trace: Trace, result: Result) -> Figures:
    """Count what came of a trace."""
    outcomes = Counter(run.outcome for run in result.runs)
    accepted, done = len(result.runs), {run.name for run in result.runs if run.outcome == "InTime"}
    losses = [offer.losses for offer in trace.offers if offer.losses is not None and offer.name in done]
    capacity = result.busy + result.idle
    return Figures(
        offers=len(trace.offers),
        accepted=accepted,
        in_time=outcomes["InTime"],
        late=outcomes["Late"],
        failed=outcomes["Failed"],
        penalty_rate=(outcomes["Late"] + outcomes["Failed"]) / accepted if accepted else 0.0,
        preemptions=sum(len(run.parts) - 1 for run in result.runs),
        refused=len(result.refusals),
        waiting=len(result.waiting),
        busy_hours=result.busy / 3600,
        idle_hours=result.idle / 3600,
        utilisation=result.busy / capacity if capacity else 0.0,
        earned=sum(run.worth for run in result.runs),
        worth=sum(offer.worth for offer in trace.offers),
        judged=len(losses),
        first_places=sum(loss.own < loss.best_other for loss in losses),
        refusals=dict(Counter(reason.value for reason in result.refusals.values())),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several traces."""

    mean: float
    least: float
    most: float
    deviation: float
    """Standard deviation of the sample; 0 for a single trace."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up a figure's values, of which there is at least one."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), min(values), max(values), deviation)


_ROWS: tuple[tuple[str, str, int], ...] = (
    ("offers", "offers", 0),
    ("accepted", "accepted", 0),
    ("  done in time", "in_time", 0),
    ("  late", "late", 0),
    ("  failed", "failed", 0),
    ("penalty rate", "penalty_rate", 3),
    ("stopped for others", "preemptions", 0),
    ("refused", "refused", 0),
    ("never answered", "waiting", 0),
    ("GPU-hours busy", "busy_hours", 1),
    ("GPU-hours idle", "idle_hours", 1),
    ("GPU utilisation", "utilisation", 3),
    ("value earned", "earned", 1),
    ("value of all offers", "worth", 1),
)
_LOSS_ROWS: tuple[tuple[str, str, int], ...] = (
    ("with known losses", "judged", 0),
    ("  first place", "first_places", 0),
)


def spreads_of(figures: Sequence[Figures]) -> dict[str, Spread]:
    """Return every figure's spread over the traces, by its name; refusals by reason under ``refusals.<reason>``."""
    found = {name: Spread.of([getattr(one, name) for one in figures]) for _, name, _ in (*_ROWS, *_LOSS_ROWS)}
    for reason in _reasons([figures]):
        found[f"refusals.{reason}"] = Spread.of([one.refusals.get(reason, 0) for one in figures])
    return found


def table(by_policy: Mapping[str, Sequence[Figures]]) -> str:
    """Write the figures of policies beside each other, as ``mean (least..most)`` where there are several traces."""
    spreads = {policy: spreads_of(figures) for policy, figures in by_policy.items()}
    lines = [["", *spreads]]
    for title, name, places in _ROWS:
        lines.append([title, *(_cell(found[name], places) for found in spreads.values())])
        if name == "refused":
            nothing = Spread(0, 0, 0, 0)
            for reason in _reasons(by_policy.values()):
                cells = (found.get(f"refusals.{reason}", nothing) for found in spreads.values())
                lines.append([f"  {reason}", *(_cell(cell, 0) for cell in cells)])
    if any(found["judged"].most for found in spreads.values()):
        lines += [
            [title, *(_cell(found[name], places) for found in spreads.values())] for title, name, places in _LOSS_ROWS
        ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def to_json(by_policy: Mapping[str, Sequence[Figures]], traces: Sequence[str]) -> dict[str, Any]:
    """Return the figures of each trace and their spread, as values for JSON."""
    return {
        policy: {
            "traces": [{"trace": trace, **asdict(one)} for trace, one in zip(traces, figures, strict=True)],
            "over_all": {name: asdict(spread) for name, spread in spreads_of(figures).items()},
        }
        for policy, figures in by_policy.items()
    }


def _reasons(groups: Any) -> list[str]:
    """Return all reasons of refusals, the most frequent first."""
    counts: Counter[str] = Counter()
    for figures in groups:
        for one in figures:
            counts.update(one.refusals)
    return [reason for reason, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _cell(spread: Spread, places: int) -> str:
    if spread.least == spread.most:
        return f"{spread.mean:,.{places}f}"
    mean_places = max(1, places) if places == 0 else places
    return f"{spread.mean:,.{mean_places}f} ({spread.least:,.{places}f}..{spread.most:,.{places}f})"
