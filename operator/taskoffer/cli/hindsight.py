"""Options of ``taskoffer simulate`` that need the extra ``simulate``: a plot, and the best schedule in hindsight."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskoffer.cli.errors import CommandError
from taskoffer.cli.output_file import check_writable

if TYPE_CHECKING:
    from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
    from taskoffer.simulation.engine import Fleet
    from taskoffer.simulation.hindsight import Hindsight
    from taskoffer.simulation.report import Figures
    from taskoffer.simulation.run import Run
    from taskoffer.simulation.trace import Trace

_TOLD_EVERY = 10.0
"""Seconds between two lines about a search."""
_BEST = "best in hindsight"
_MOST_HOURS = 1e6
"""A century: longer than any trace that somebody wants to see."""


def add_options(simulate: argparse.ArgumentParser) -> None:
    """Add the options to the command's."""
    simulate.add_argument(
        "--best",
        type=_seconds,
        metavar="SECONDS",
        help="search so long for the best schedule that perfect foresight could make of each trace, with OR-tools, and "
        "print what each policy earns of it, and the proven bound",
    )
    simulate.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the GPUs over time under each policy, as .svg or .png"
    )
    simulate.add_argument(
        "--plot-hours",
        type=_hours,
        nargs=2,
        default=(0.0, 48.0),
        metavar=("FROM", "TO"),
        help="draw the first trace from this hour to that one (default: 0 48)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Say what is wrong with the options before anything is computed.

    Raises:
        CommandError: when a library is missing, a file could not be written, or an option makes no sense.
    """
    from taskoffer.simulation.extras import MissingExtraError, load

    if args.plot is not None and args.plot.suffix.lower() not in (".svg", ".png"):
        raise CommandError(f"--plot {args.plot} is neither .svg nor .png: choose one of them", 2)
    if not args.plot_hours[0] < args.plot_hours[1]:
        raise CommandError("--plot-hours needs an earlier and a later hour, as 0 48", 2)
    targets = [path for path in (args.json, args.plot) if path is not None and str(path) != "-"]
    if len({path.absolute() for path in targets}) < len(targets):
        raise CommandError(f"--json and --plot would both write {targets[0]}: give each a file of its own", 2)
    for path in targets:
        check_writable(path)
    try:
        if args.best is not None:
            load("ortools.sat.python.cp_model")
        if args.plot is not None:
            load("matplotlib")
    except MissingExtraError as error:
        raise CommandError(str(error), 1) from None


def check_policies(args: argparse.Namespace, policies: Sequence[tuple[str, CapacityPolicySpec]]) -> None:
    """Say before anything is computed what cannot be drawn.

    Raises:
        CommandError: when a policy to draw shares GPUs.
    """
    shared = [name for name, spec in policies if spec.resources[0].units_per_gpu is not None]
    if args.plot is not None and shared:
        raise CommandError(f"--plot draws whole GPUs, and {shared[0]} shares them: leave it out", 2)


def search(
    traces: Sequence[tuple[str, Callable[[], Trace]]],
    policies: Sequence[tuple[str, CapacityPolicySpec]],
    fleet: Fleet,
    by_policy: Mapping[str, Sequence[Figures]],
    *,
    seconds: float,
    workers: int,
) -> list[Hindsight]:
    """Search for the best schedule of each trace, trained as under the policy that earns the most on all of them."""
    from taskoffer.simulation.engine import simulate
    from taskoffer.simulation.hindsight import in_hindsight

    best = max(by_policy, key=lambda name: sum(one.earned for one in by_policy[name]))
    chosen = next((name, spec) for name, spec in policies if name == best)
    found = []
    for title, make in traces:
        trace = make()
        hint = simulate(trace, chosen[1], name=best, fleet=fleet).runs
        found.append(
            in_hindsight(trace, chosen, fleet, seconds, hint=hint, workers=workers, progress=_progress(title, seconds))
        )
    return found


def lines_about(found: Sequence[Hindsight], by_policy: Mapping[str, Sequence[Figures]], seconds: float) -> list[str]:
    """Write what was found, what is proven, and the share of it that each policy has earned."""
    worth, bound = (_mean([getattr(one, name) for one in found]) for name in ("worth", "bound"))
    lines = [
        "",
        f"Best schedule found in hindsight, {seconds:g} s each, trained as under {found[0].policy}: "
        f"{worth:,.1f}; no schedule earns more than {bound:,.1f} (proven).",
        "Of the best schedule, and of the bound, each policy earns:",
    ]
    width = max(map(len, by_policy))
    for name, figures in by_policy.items():
        shares = [one.share(had.earned) for one, had in zip(found, figures, strict=True)]
        of_bound = _mean([had.earned / one.bound for one, had in zip(found, figures, strict=True) if one.bound])
        spread = f" ({min(shares):.3f}..{max(shares):.3f})" if len(shares) > 1 else ""
        lines.append(f"  {name.ljust(width)}  {_mean(shares):.3f}{spread}  {of_bound:.3f}")
    return lines


def as_json(found: Sequence[Hindsight]) -> list[dict[str, Any]]:
    """Return what was found as values for JSON, a schedule for each trace."""
    return [asdict(one) for one in found]


def plot(
    make: Callable[[], Trace],
    policies: Sequence[tuple[str, CapacityPolicySpec]],
    fleet: Fleet,
    args: argparse.Namespace,
    best: Sequence[Run] | None,
) -> None:
    """Draw the GPUs over time under each policy, and in hindsight where that is known."""
    from taskoffer.simulation.engine import simulate
    from taskoffer.simulation.timeline import draw

    trace = make()
    runs: dict[str, Sequence[Run]] = {
        name: simulate(trace, spec, name=name, fleet=fleet).runs for name, spec in policies
    }
    if best is not None:
        runs[_BEST] = best
    start, end = args.plot_hours
    try:
        draw(runs, args.plot, gpus=fleet.gpus, title="GPUs over time", start_hours=start, end_hours=end)
    except (OSError, ValueError) as error:
        raise CommandError(f"{args.plot} cannot be drawn: {error}", 1) from None


def _progress(title: str, seconds: float) -> Callable[[float, float, float], None]:
    told = time.monotonic()

    def tell(passed: float, worth: float, bound: float) -> None:
        nonlocal told
        if time.monotonic() - told < _TOLD_EVERY:
            return
        told = time.monotonic()
        print(
            f"{title}: {passed:.0f} of {seconds:g} s, found {worth:,.1f}, bound {bound:,.1f}",
            file=sys.stderr,
            flush=True,
        )

    return tell


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _hours(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _MOST_HOURS:
        raise argparse.ArgumentTypeError(f"{text} is not an hour of a trace: give 0 to {_MOST_HOURS:,.0f}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 1 <= number <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a time to search for: give 1 to 86400 seconds")
    return number
