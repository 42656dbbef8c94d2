"""A tighter upper bound: prices between groups of tasks, and the solver's proof within each.

The tasks are cut by their arrival into groups. Where tasks of two groups can run at the same time the GPUs are priced
(see ``prices``); each group on its own keeps to the capacity at all times. For any prices p >= 0 in these zones

    worth <= C * integral of p over the zones + sum over groups of the most that a group's worth less its price can be

Each group's most is bounded by the solver, for tasks in ``relaxed`` ticks. The price of a run is a function of its
start; the solver sees the start's window in pieces and in each the least price that a real start in it has. A group's
bound is never taken above the one that prices alone give, so that the sum is never above the bound of ``prices``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from taskoffer.simulation.prices import Prices
from taskoffer.simulation.ticks import PER_SECOND, Choice
from taskoffer.simulation.window import Effort, Option, Solved, Stop, WindowModel

_PIECES = 8
_SHORTEST_PIECE = 300.0
"""A start's window is cut into at most so many pieces, each of at least so many seconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that arrive one after another, and when they can run, in seconds."""

    choices: tuple[Choice, ...]
    start: float
    end: float


def _span(choices: Sequence[Choice]) -> tuple[float, float]:
    """Return from when to when the tasks can run, in seconds of real time."""
    tasks = [(choice.task, choice.modes) for choice in choices]
    start = min(task.arrival for task, _ in tasks)
    return start, max(task.last_start_on(m.gpus) + task.seconds_by_gpus[m.gpus] for task, modes in tasks for m in modes)


def cut(choices: Sequence[Choice], prices: Prices, fewest: int, most: int) -> list[Group]:
    """Cut the tasks into groups so that the zones between them are as cheap as can be.

    A cut costs what a GPU costs from the first arrival after it to the last moment at which a task before it can run.
    """
    ordered = sorted(choices, key=lambda choice: choice.task.arrival)
    costs, latest = [0.0], 0.0
    for index, choice in enumerate(ordered):
        latest = max(latest, _span([choice])[1])
        following = ordered[index + 1].task.arrival if index + 1 < len(ordered) else latest
        costs.append(prices.only(following, latest) if following < latest else 0.0)
    # The least cost of cutting off the first n tasks, and where the last group then begins.
    least, begins = [0.0], [0]
    for n in range(1, len(ordered) + 1):
        options = [b for b in range(max(0, n - most), n - fewest + 1) if math.isfinite(least[b])]
        if not options and n == len(ordered):
            options = [b for b in range(n) if math.isfinite(least[b])]
        begin = min(options, key=lambda b: (least[b], b), default=0)
        least.append(least[begin] + costs[n] if options else math.inf)
        begins.append(begin)
    groups: list[Group] = []
    end = len(ordered)
    while end > 0:
        members = ordered[begins[end] : end]
        groups.append(Group(tuple(members), *_span(members)))
        end = begins[end]
    return groups[::-1]


class GroupBound:
    """The bound of all groups together, which sinks with each group that is solved."""

    def __init__(self, groups: Sequence[Group], prices: Prices, capacity: int) -> None:
        self.groups = groups
        self._capacity = capacity
        zones = list(_zones(groups))
        self._zone_prices = prices.within(zones)
        end = max((group.end for group in groups), default=0.0)
        self._zones = capacity * self._zone_prices.only(0.0, end)
        gains = [sum(_gain(choice, prices) for choice in group.choices) for group in groups]
        outside = [
            max(0.0, prices.only(group.start, group.end) - self._zone_prices.only(group.start, group.end))
            for group in groups
        ]
        # What lies in no zone can be used by one group only; what no group can use at all counts for nothing.
        self.bounds = [gain + capacity * alone for gain, alone in zip(gains, outside, strict=True)]

    @property
    def total(self) -> float:
        """The bound on what all tasks can earn."""
        return self._zones + sum(self.bounds)

    def solve(self, index: int, effort: Effort, stop: Stop) -> Solved:
        """Let the solver prove how much a group can bring, and keep what is less."""
        model = WindowModel(self._capacity, 1)
        for choice in self.groups[index].choices:
            options = list(_options(choice, self._zone_prices))
            if options:
                model.add(choice, options)
        solved = model.solve({}, effort, stop)
        self.bounds[index] = min(self.bounds[index], solved.bound)
        return solved


def _zones(groups: Sequence[Group]) -> Iterator[tuple[float, float]]:
    """Return when two groups can run at the same time."""
    latest = -math.inf
    for group in groups:
        if group.start < latest:
            yield group.start, min(latest, group.end)
        latest = max(latest, group.end)


def _gain(choice: Choice, prices: Prices) -> float:
    """Return the most that a task's worth less its price can be."""
    task = choice.task
    price = min(
        mode.gpus * prices.cheapest(task.seconds_by_gpus[mode.gpus], task.arrival, task.last_start_on(mode.gpus))
        for mode in choice.modes
    )
    return max(0.0, task.worth - price)


def _options(choice: Choice, prices: Prices) -> Iterator[Option]:
    """Return the pieces of a task's window, each with what a start in it brings at most; none that brings nothing."""
    task = choice.task
    for mode in choice.modes:
        seconds, last_start = task.seconds_by_gpus[mode.gpus], task.last_start_on(mode.gpus)
        if prices.only(task.arrival, last_start + seconds) == 0.0:
            yield Option(mode, choice.first, mode.last, task.worth)
            continue
        pieces = max(1, min(_PIECES, int((last_start - task.arrival) / _SHORTEST_PIECE)))
        edges = [choice.first + (mode.last + 1 - choice.first) * n // pieces for n in range(pieces + 1)]
        for first, after in pairwise(edges):
            if first >= after:
                continue
            # A real start in ((first - 1), after - 1] ticks is rounded up to a tick of the piece.
            begin = max(task.arrival, (first - 1) / PER_SECOND)
            finish = min(last_start, (after - 1) / PER_SECOND)
            value = task.worth - mode.gpus * prices.cheapest(seconds, begin, max(begin, finish))
            if value > 0:
                yield Option(mode, first, after - 1, value)
