"""``taskoffer simulate`` and ``taskoffer trace``: compare policies over traces of offers, without a cluster."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from taskoffer.cli import hindsight
from taskoffer.cli.errors import CommandError
from taskoffer.cli.output_file import check_writable
from taskoffer.cli.subcommand import GPUS, NODES, add_command, whole

if TYPE_CHECKING:
    from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
    from taskoffer.simulation.engine import Fleet
    from taskoffer.simulation.hindsight import Hindsight
    from taskoffer.simulation.report import Figures
    from taskoffer.simulation.trace import Trace

_QUIET_SECONDS = 2.0
"""What takes longer tells how far it is."""
_SEEDS, _LOAD, _COUNT = 5, 1.0, 1000
_LOADED = "GPU time that the offers need, as a multiple of what there is"

_SIMULATE = """\
Run offers through the operator's own admission under each policy, with a virtual clock and simulated nodes, and print
what would have been accepted, finished in time and earned. Nothing is started. The offers are those of trace files
(--offers) or are drawn at random after a published task market (--seeds, --load, --count)."""
_TRACE = """\
Draw offers at random after a published task market and write them as lines of JSON, for taskoffer simulate."""


@dataclass(frozen=True)
class _Work:
    """One trace under every policy: what a process is given to do."""

    title: str
    make: Callable[[], Trace]
    policies: tuple[tuple[str, CapacityPolicySpec], ...]
    fleet: Fleet


@dataclass(frozen=True)
class _Given:
    """A trace that was read from a file."""

    trace: Trace

    def __call__(self) -> Trace:
        return self.trace


@dataclass(frozen=True)
class _Drawn:
    """A trace that is drawn where it is needed: a seed is quicker to hand over than its offers."""

    seed: int
    load: float
    count: int
    gpus: int

    def __call__(self) -> Trace:
        from taskoffer.simulation.market import generate

        return generate(self.seed, self.load, self.count, gpus=self.gpus)


def add_commands(commands: Any) -> None:
    """Add the two commands to the parser's."""
    simulate = add_command(commands, "simulate", "compare policies over a trace of offers", _SIMULATE, _simulate)
    simulate.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="POLICY",
        help="name of a preset, or YAML file of one CapacityPolicy; may be given several times",
    )
    simulate.add_argument(
        "--offers",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="trace file, compressed if its name ends in .gz; may be given several times",
    )
    simulate.add_argument(
        "--seeds", type=whole, metavar="N", help=f"draw N traces, with the seeds 0 to N-1 (default: {_SEEDS})"
    )
    simulate.add_argument("--load", type=_load, metavar="LOAD", help=f"{_LOADED}; of drawn traces (default: {_LOAD:g})")
    simulate.add_argument("--count", type=_count, metavar="N", help=f"offers of each drawn trace (default: {_COUNT})")
    simulate.add_argument(
        "--nodes", type=whole, default=NODES, metavar="N", help="simulated nodes (default: %(default)s)"
    )
    simulate.add_argument(
        "--gpus", type=whole, default=GPUS, metavar="N", help="GPUs of each node (default: %(default)s)"
    )
    simulate.add_argument(
        "--jobs", type=whole, metavar="N", help="processes that share the traces (default: one for each CPU)"
    )
    simulate.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures of every trace as JSON; - prints them instead"
    )
    hindsight.add_options(simulate)

    trace = add_command(commands, "trace", "write a random trace of offers", _TRACE, _trace)
    trace.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="seed of the random numbers: the same one draws the same trace (default: %(default)s)",
    )
    trace.add_argument("--load", type=_load, default=_LOAD, metavar="LOAD", help=f"{_LOADED} (default: %(default)g)")
    trace.add_argument(
        "--count", type=_count, default=_COUNT, metavar="N", help="number of offers to draw (default: %(default)s)"
    )
    trace.add_argument(
        "--gpus", type=whole, default=GPUS, metavar="N", help="GPUs that the load refers to (default: %(default)s)"
    )
    trace.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, compressed if its name ends in .gz (default: standard output)",
    )


def _seed(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is too small: give 0 or more")
    return number


def _count(text: str) -> int:
    number = whole(text)
    if number > 1_000_000:
        raise argparse.ArgumentTypeError(f"{number} is too many: give a million or less")
    return number


def _load(text: str) -> float:
    number = float(text)
    if not 0.01 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a load: give a number from 0.01 to 100, as 0.5, 1 or 2")
    return number


def _trace(args: argparse.Namespace) -> int:
    from taskoffer.simulation.market import generate
    from taskoffer.simulation.trace import write_trace

    try:
        if args.output is not None:
            check_writable(args.output)
        trace = generate(args.seed, args.load, args.count, gpus=args.gpus)
        if args.output is None:
            write_trace(trace, sys.stdout)
            sys.stdout.flush()
        else:
            with _opened(args.output, "w") as file:
                write_trace(trace, file)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CommandError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"taskoffer: {args.output or 'the trace'} cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def _simulate(args: argparse.Namespace) -> int:
    try:
        hindsight.check_options(args)
        works = _works(args)
        hindsight.check_policies(args, works[0].policies)
        cpus = args.jobs or len(os.sched_getaffinity(0))
        by_policy = _figures(works, cpus)
        found = _best(works, by_policy, args.best, cpus) if args.best is not None else []
        _tell(works, by_policy, args.json, found, args.best)
        if args.plot is not None:
            first = works[0]
            hindsight.plot(first.make, first.policies, first.fleet, args, found[0].runs if found else None)
    except CommandError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return _interrupted()
    return 0


def _interrupted() -> int:
    print("taskoffer: interrupted", file=sys.stderr)
    return 1


def _works(args: argparse.Namespace) -> list[_Work]:
    """Read policies and traces, or say what is wrong with them."""
    from taskoffer.simulation.engine import Fleet

    fleet = Fleet(args.nodes, args.gpus)
    if len(set(args.policy)) < len(args.policy):
        raise CommandError("a --policy is given twice: name each one once", 2)
    policies = tuple((name, _policy(name)) for name in args.policy)
    drawn = (args.seeds, args.load, args.count)
    if not args.offers:
        seeds, load, count = (_SEEDS if args.seeds is None else args.seeds, args.load or _LOAD, args.count or _COUNT)
        return [_Work(f"seed {seed}", _Drawn(seed, load, count, fleet.total), policies, fleet) for seed in range(seeds)]
    if any(value is not None for value in drawn):
        raise CommandError(
            "--seeds, --load and --count draw traces: leave them out where --offers gives trace files", 2
        )
    return [_Work(str(path), _Given(_read(path)), policies, fleet) for path in args.offers]


def _policy(name: str) -> CapacityPolicySpec:
    from taskoffer import presets
    from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
    from taskoffer.cli.policy_file import read_policy

    if name in presets.names():
        return CapacityPolicySpec.model_validate(presets.load(name)["spec"])
    if not Path(name).exists():
        raise CommandError(f"{name} is neither a file nor a preset; presets are {', '.join(presets.names())}", 2)
    return read_policy(Path(name))


def _read(path: Path) -> Trace:
    from taskoffer.simulation.trace import TraceError, read_trace

    try:
        with _opened(path, "r") as file:
            return read_trace(file, str(path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CommandError(f"{path} cannot be read: {error}", 2) from None
    except TraceError as error:
        raise CommandError(str(error), 2) from None


@contextmanager
def _opened(path: Path, mode: Literal["r", "w"]) -> Iterator[TextIO]:
    """Open a trace file; one whose name ends in .gz is compressed."""
    with path.open(f"{mode}b") as raw:
        # Without a name and a time in its header the same trace is the same file.
        packed = gzip.GzipFile("", mode, fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        # Editors of Windows begin a file with a mark of its encoding.
        with io.TextIOWrapper(packed, encoding="utf-8-sig" if mode == "r" else "utf-8") as text:
            yield text


def _figures(works: Sequence[_Work], jobs: int) -> dict[str, list[Figures]]:
    """Run all traces under all policies, and return the figures by policy in the order of the traces."""
    found: dict[int, list[Figures]] = {}
    with _progress(len(works)) as tell:
        for number, figures in _each(works, min(jobs, len(works))):
            found[number] = figures
            tell(len(found))
    names = [name for name, _ in works[0].policies]
    return {name: [found[number][at] for number in range(len(works))] for at, name in enumerate(names)}


def _each(works: Sequence[_Work], jobs: int) -> Iterator[tuple[int, list[Figures]]]:
    if jobs == 1:
        for number, work in enumerate(works):
            yield number, _run(work)
        return
    # Fresh processes: what a fork copies of a running program may be in any state.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_let_die)
    try:
        futures = {pool.submit(_run, work): number for number, work in enumerate(works)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise CommandError(
            "a process of the simulation ended early (out of memory?): try again with fewer --jobs", 1
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _let_die() -> None:
    """Let Ctrl-C end a process at once and silently: the first one says what there is to say."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(work: _Work) -> list[Figures]:
    from taskoffer.simulation.engine import simulate
    from taskoffer.simulation.report import figures_of

    trace = work.make()
    return [figures_of(trace, simulate(trace, spec, name=name, fleet=work.fleet)) for name, spec in work.policies]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Tell on standard error from time to time how many traces are done, once it has taken a while."""
    on_terminal, begun = sys.stderr.isatty(), time.monotonic()
    done, told, over = 0, False, threading.Event()

    def tell(number: int) -> None:
        nonlocal done
        done = number

    def watch() -> None:
        nonlocal told
        pause = _QUIET_SECONDS
        while not over.wait(pause):
            text = f"{done} of {total} traces after {time.monotonic() - begun:.0f} s"
            print(f"\r{text}" if on_terminal else text, end="" if on_terminal else "\n", file=sys.stderr, flush=True)
            pause, told = _QUIET_SECONDS if on_terminal else 5 * _QUIET_SECONDS, True

    # A thread of its own, because a single trace can take long as well.
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield tell
    finally:
        over.set()
        watcher.join()
        if on_terminal and told:
            print(file=sys.stderr)


def _best(works: Sequence[_Work], by_policy: dict[str, list[Figures]], seconds: float, cpus: int) -> list[Hindsight]:
    first, traces = works[0], [(work.title, work.make) for work in works]
    return hindsight.search(traces, first.policies, first.fleet, by_policy, seconds=seconds, workers=cpus)


def _tell(
    works: Sequence[_Work],
    by_policy: dict[str, list[Figures]],
    target: Path | None,
    found: Sequence[Hindsight],
    seconds: float | None,
) -> None:
    from taskoffer.simulation.report import table, to_json

    if target is not None:
        fleet = works[0].fleet
        value = {
            "nodes": fleet.nodes,
            "gpus_per_node": fleet.gpus,
            "policies": to_json(by_policy, [work.title for work in works]),
            **({"best_in_hindsight": hindsight.as_json(found)} if found else {}),
        }
        text = json.dumps(value, indent=2)
        if str(target) == "-":
            print(text)
            return
        try:
            target.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{target} cannot be written: {error}", 1) from None
    print(_heading(works))
    print(table(by_policy))
    if found and seconds is not None:
        print("\n".join(hindsight.lines_about(found, by_policy, seconds)))


def _heading(works: Sequence[_Work]) -> str:
    fleet, count = works[0].fleet, len(works)
    first = works[0].make
    drawn = f" of {first.count} offers each, offered load {first.load:g}" if isinstance(first, _Drawn) else ""
    spread = "; mean (least..most)" if count > 1 else ""
    return f"{count} trace{'s' if count > 1 else ''}{drawn}, {fleet.nodes} x {fleet.gpus} GPUs{spread}\n"
