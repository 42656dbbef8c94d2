"""The most worth that a scheduler with perfect foresight earns, and a proof of how much more nobody can earn.

Tasks run without preemption, each on one node. A few tasks are solved whole by OR-tools CP-SAT. Of many, the schedule
grows from a greedy one by solving one window of neighbouring tasks after the other while all else stays (a large
neighbourhood search), and the bound sinks from that of prices on GPU time (``prices``) by solving one group of tasks
after the other (``groups``). What is returned is checked by ``check_schedule``, which shares nothing with the search.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from taskoffer.simulation.extras import load
from taskoffer.simulation.groups import GroupBound, cut
from taskoffer.simulation.guide import Guide
from taskoffer.simulation.plan import Plan, by_density, gpu_time
from taskoffer.simulation.prices import Prices, PriceSearch, for_seconds
from taskoffer.simulation.run import Run
from taskoffer.simulation.schedule_check import InfeasibleScheduleError, check_schedule
from taskoffer.simulation.task import Task
from taskoffer.simulation.ticks import PER_SECOND, Choice, Place, reachable, relaxed
from taskoffer.simulation.window import Effort, Option, Solved, Stop, WindowModel, whole

__all__ = ["Best", "best_schedule", "check_schedule"]

_WHOLE = 40
"""Up to so many tasks are solved at once first."""
_PROVEN = 1e-5
"""The relative gap from which on a schedule counts as proven: whole-number objectives round by about this."""
_CELLS = 8_000
_FINEST_CELL = 60.0
"""The grid of prices has about so many cells, each of at least so many seconds."""
_SHARE_OF_BOUND = 0.3
"""The share of the time that goes into the bound, while that helps."""
_FIRST_GROUP = 12
_TRIED, _MOST_SOLVED = 4, 0.5
"""The bound is first proven for groups of up to so many tasks, then for twice as many, and so on. It is given up when,
after so many groups, less than this share was solved: then larger groups would only take time."""
_SHORTEST_SOLVE = 2.0
_WINDOW_SECONDS = 2.0
_SMALLEST_WINDOW, _FIRST_WINDOW, _LARGEST_WINDOW = 8.0, 24.0, 80.0
"""Windows shrink when they cannot be solved in their seconds, and grow when they are solved in a quarter of them."""
_SLACKS = (0.05, 0.15, 1.0)
"""What an option may lose at the prices to be looked at, as a share of its task's worth: in turn, from the left end of
the trace to the right."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best schedule that was found, by start, and the least bound that was proven.

    ``worth`` is what the schedule earns, ``bound`` what no schedule can exceed, ``proven`` whether they are the same
    (to a hundred-thousandth), and ``seconds`` how long the search took.
    """

    runs: tuple[Run, ...]
    worth: float
    bound: float
    proven: bool
    seconds: float

    @property
    def gap(self) -> float:
        """The share of the bound that the schedule does not reach."""
        return 0.0 if self.bound <= 0 else max(0.0, 1 - self.worth / self.bound)


Progress = Callable[[float, float, float], None]
"""Called with the seconds so far, the worth found and the bound, each time that one of the two gets better."""


def best_schedule(
    tasks: Sequence[Task],
    gpus: int = 8,
    nodes: int = 1,
    seconds: float = 600,
    workers: int = 2,
    seed: int = 0,
    hint: Sequence[Run] = (),
    progress: Progress | None = None,
) -> Best:
    """Search for the schedule that earns most on ``nodes`` nodes of ``gpus`` GPUs each.

    SIGINT ends the search early, with what was found until then. Searches of few tasks that end before their time
    always find the same with one worker.

    Args:
        tasks: The tasks, with names of their own.
        gpus: The GPUs of each node.
        nodes: How many nodes there are.
        seconds: How long to search at most.
        workers: Threads of the solver.
        seed: Seed of all random choices.
        hint: A schedule to begin with, as of a policy; those of its runs that a task could make are taken over.
        progress: Told what the search has reached.

    Raises:
        MissingExtraError: when OR-tools is not installed.
        ValueError: when two tasks have the same name.
    """
    load("ortools.sat.python.cp_model")
    if len({task.name for task in tasks}) != len(tasks):
        raise ValueError("two tasks have the same name")
    search = _Search(tasks, gpus, nodes, Effort(seconds, workers, seed), progress)
    search.begin(hint)
    interrupted = False
    with ThreadPoolExecutor(max_workers=1) as pool:
        # The search runs in a thread, so that this one hears SIGINT while the solver is busy. It looks up now and then,
        # because a signal that another thread was given does not end its wait.
        running = pool.submit(search.run)
        try:
            while not running.done():
                try:
                    if interrupted:
                        # Said again and again, because a solver that has not quite begun does not hear it.
                        search.stop.set()
                    wait([running], timeout=0.2)
                except KeyboardInterrupt:
                    interrupted = True
            running.result()
        finally:
            search.stop.set()
    return search.result()


class _Search:
    """The search, from the greedy schedule to the last bound."""

    def __init__(self, tasks: Sequence[Task], gpus: int, nodes: int, effort: Effort, progress: Progress | None) -> None:
        self.stop = Stop()
        self._tasks = tasks
        self._gpus = gpus
        self._nodes = nodes
        self._effort = effort
        self._progress = progress
        self._began = time.monotonic()
        self._random = random.Random(effort.seed)
        self._choices = [choice for task in _by_arrival(tasks) if (choice := reachable(task, gpus)) is not None]
        self._relaxed = [choice for task in _by_arrival(tasks) if (choice := relaxed(task, gpus)) is not None]
        self._plan = Plan(gpus, nodes)
        self._hinted: tuple[Run, ...] = ()
        self._bound = sum(choice.task.worth for choice in self._relaxed)
        self._sizes = dict.fromkeys(_SLACKS, _FIRST_WINDOW)
        self._sweep, self._position = 0, 0

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def _done(self) -> bool:
        return self.stop.wanted or self._elapsed >= self._effort.seconds or self._proven

    @property
    def _proven(self) -> bool:
        return self._bound - self._plan.worth <= _PROVEN * self._bound

    def begin(self, hint: Sequence[Run]) -> None:
        """Take the best of some greedy schedules and the hint, which is filled up."""
        self._hinted = self._exact_hint(hint)
        plans = [Plan(self._gpus, self._nodes) for _ in range(3)]
        plans[0].fill(by_density(self._choices), gpu_time)
        plans[1].fill(self._choices, gpu_time)
        self._take_over(plans[2], hint)
        plans[2].fill(by_density(self._choices), gpu_time)
        self._plan = max(plans, key=lambda plan: plan.worth)
        self._tell()

    def _exact_hint(self, hint: Sequence[Run]) -> tuple[Run, ...]:
        """Return the hint's runs that earn, if they could be made as they are."""
        earning = tuple(run for run in hint if run.outcome == "InTime")
        try:
            check_schedule(self._tasks, earning, self._gpus, self._nodes)
        except InfeasibleScheduleError:
            return ()
        return earning

    def _take_over(self, plan: Plan, hint: Sequence[Run]) -> None:
        choices = {choice.task.name: choice for choice in self._choices}
        numbers = {node: n % self._nodes for n, node in enumerate(sorted({run.node for run in hint}))}
        for run in sorted(hint, key=lambda run: (run.start, run.name)):
            choice = choices.get(run.name)
            if choice is None or run.name in plan.places:
                continue
            modes = [mode for mode in choice.modes if mode.gpus == run.gpus]
            for mode in modes:
                place = plan.earliest(choice, mode, numbers[run.node], min(int(run.start * PER_SECOND), mode.last))
                if place is not None:
                    plan.add(place)

    def run(self) -> None:
        """Search until it is proven, stopped, or out of time."""
        if len(self._relaxed) <= _WHOLE and self._solve_whole():
            return
        if self._done:
            return
        prices = self._price()
        guide = Guide(self._choices, prices)
        self._plan = max(self._plan, guide.plan(self._gpus, self._nodes), key=lambda plan: plan.worth)
        self._tell()
        rounds = self._tighten(prices)
        tightening, improving = 0.0, 0.0
        while not self._done:
            before = self._elapsed
            if tightening * (1 - _SHARE_OF_BOUND) < improving * _SHARE_OF_BOUND and next(rounds, False):
                tightening += self._elapsed - before
            else:
                self._improve(guide)
                improving += self._elapsed - before

    def _solve_whole(self) -> bool:
        """Solve all tasks at once, for the schedule and for the bound; tell whether nothing is left to be found.

        Both are one model where all times are whole ticks. Where they are not, the two may end apart: a schedule that
        needs a start in the very moment of an end can be lost to rounding, as ``proven`` then says.
        """
        effort = replace(self._effort, seconds=(self._effort.seconds - self._elapsed) / 3)
        solved = self._solve([(choice, whole(choice)) for choice in self._choices], effort)
        optimal = solved.optimal
        if self._choices != self._relaxed:
            model = WindowModel(self._gpus, self._nodes)
            for choice in self._relaxed:
                model.add(choice, whole(choice))
            solved = model.solve({}, self._within_time(effort), self.stop)
        self._lower(solved.bound)
        return optimal and solved.optimal

    def _price(self) -> Prices:
        """Bound the worth by prices."""
        horizon = max(task.last_start for task in self._tasks)
        step = max(_FINEST_CELL, horizon / _CELLS)
        search = PriceSearch(self._tasks, self._gpus, self._gpus * self._nodes, step)
        share = 0.1 * (self._effort.seconds - self._elapsed)
        bound, prices = search.search(self._plan.worth, for_seconds(share, lambda: self.stop.wanted))
        self._lower(bound)
        return prices

    def _tighten(self, prices: Prices) -> Iterator[bool]:
        """Lower the bound group by group, in rounds of ever larger groups as long as most of them are solved."""
        most, groups = _FIRST_GROUP, cut(self._relaxed, prices, _FIRST_GROUP // 2, _FIRST_GROUP)
        while True:
            bound, solved = GroupBound(groups, prices, self._gpus * self._nodes), 0
            self._lower(bound.total)
            for index in range(len(groups)):
                left = (self._effort.seconds - self._elapsed) * _SHARE_OF_BOUND / (len(groups) - index)
                effort = replace(self._effort, seconds=max(_SHORTEST_SOLVE, left))
                solved += bound.solve(index, self._within_time(effort), self.stop).optimal
                self._lower(bound.total)
                yield True
                if index >= _TRIED and solved < _MOST_SOLVED * index:
                    return
            if len(groups) == 1:
                return
            most *= 2
            groups = cut(self._relaxed, prices, most // 2, most)

    def _improve(self, guide: Guide) -> None:
        """Solve one window of neighbouring tasks anew, among what else is placed."""
        slack = _SLACKS[self._sweep % len(_SLACKS)]
        size = round(self._sizes[slack])
        free: list[tuple[Choice, list[Option]]] = []
        begin = self._position
        while len(free) < size and self._position < len(self._choices):
            choice = self._choices[self._position]
            options = guide.options(choice, slack, self._plan.places.get(choice.task.name))
            if options:
                free.append((choice, options))
            self._position += 1
        if self._position < len(self._choices):
            # Windows overlap by half.
            self._position = (begin + self._position + 1) // 2
        else:
            self._sweep += 1
            self._position = self._random.randrange(max(1, min(size, len(self._choices)) // 2))
        effort = replace(self._effort, seconds=_WINDOW_SECONDS, seed=self._random.randrange(1 << 30))
        began = self._elapsed
        solved = self._solve(free, effort)
        if not solved.optimal:
            self._sizes[slack] = max(_SMALLEST_WINDOW, self._sizes[slack] * 0.9)
        elif self._elapsed - began < _WINDOW_SECONDS / 4:
            self._sizes[slack] = min(_LARGEST_WINDOW, self._sizes[slack] * 1.03)

    def _solve(self, free: Sequence[tuple[Choice, Sequence[Option]]], effort: Effort) -> Solved:
        """Place the free tasks anew beside all others, if that earns no less."""
        model = WindowModel(self._gpus, self._nodes)
        for choice, options in free:
            model.add(choice, options)
        names = {choice.task.name for choice, _ in free}
        start = min((choice.first for choice, _ in free), default=0)
        end = max((choice.last + choice.longest for choice, _ in free), default=0)
        for node in range(self._nodes):
            for place in self._plan.touching(node, start, end):
                if place.choice.task.name not in names:
                    model.keep(place)
        solved = model.solve(self._plan.places, self._within_time(effort), self.stop)
        if solved.places is not None:
            self._accept(names, solved.places)
        return solved

    def _within_time(self, effort: Effort) -> Effort:
        return replace(effort, seconds=max(0.0, min(effort.seconds, self._effort.seconds - self._elapsed)))

    def _accept(self, names: Iterable[str], places: Sequence[Place]) -> None:
        """Take the free tasks' new places over unless they earn less than the ones before."""
        before = [self._plan.places[name] for name in names if name in self._plan.places]
        gain = _earned(places) - _earned(before)
        if gain < 0:
            return
        for place in before:
            self._plan.remove(place.choice.task.name)
        for place in places:
            self._plan.add(place)
        if gain > 0:
            self._tell()

    def _lower(self, bound: float) -> None:
        if bound < self._bound:
            self._bound = bound
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._elapsed, self._plan.worth, self._bound)

    def result(self) -> Best:
        """Return the best that was found, checked.

        Raises:
            InfeasibleScheduleError: when the search has made a mistake.
        """
        runs = tuple(place.run() for place in self._plan.places.values())
        runs = max(runs, self._hinted, key=_worth)
        check_schedule(self._tasks, runs, self._gpus, self._nodes)
        worth = _worth(runs)
        # Sums of floating-point numbers in another order may differ in their last digits.
        bound = max(self._bound, worth) if math.isclose(self._bound, worth, rel_tol=1e-9) else self._bound
        if bound < worth:
            raise InfeasibleScheduleError(f"the schedule earns {worth}, more than the bound {bound}")
        ordered = tuple(sorted(runs, key=lambda run: (run.start, run.name)))
        return Best(ordered, worth, bound, bound - worth <= _PROVEN * bound, self._elapsed)


def _earned(places: Iterable[Place]) -> float:
    return math.fsum(place.choice.task.worth for place in places)


def _worth(runs: Iterable[Run]) -> float:
    return math.fsum(run.worth for run in runs)


def _by_arrival(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (task.arrival, task.name))
