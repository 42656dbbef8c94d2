"""Prices on GPU time, and the upper bound on a schedule's worth that follows from them.

Let the GPUs cost p(t) per GPU and second at time t, with any p >= 0. A schedule never uses more than all C GPUs, so
that

    worth <= worth - paid + C * integral of p
          <= sum over tasks of max(0, worth - its cheapest run's price) + C * integral of p

(Lagrangian relaxation of the capacity, as in Fisher, "The Lagrangian relaxation method for solving integer
programming problems", Management Science 27, 1981). This holds for all prices; the search only looks for good ones.
With prices that are constant in each cell of a grid, the price of a run is piecewise linear in its start, so that the
cheapest one starts or ends on the grid, or starts at an end of its window: the minimum over real starts is exact, and
no time is rounded.

The least such bound is that of the linear relaxation with one capacity constraint per cell, in which each task is a
mixture of its starts. It is found by the subgradient method with Polyak's step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from taskoffer.simulation.extras import load
from taskoffer.simulation.task import Task
from taskoffer.simulation.ticks import startable

_SMOOTHING = 0.15
"""The share of the newest subgradient in the direction; smoothing damps the zigzag between cheapest runs."""
_PATIENCE = 30
_SHRINK = 0.7
_SMALLEST_STEP = 1e-4
"""After so many steps without a better bound the step shrinks, until it is this share of Polyak's."""


@dataclass(frozen=True)
class Prices:
    """What a GPU costs per second in each cell of ``step`` seconds, from 0 on; nothing after the last cell."""

    step: float
    by_cell: Any
    """An array of numpy."""

    def paid(self, moments: Any) -> Any:
        """Return what one GPU costs from 0 to each of the moments."""
        numpy = load("numpy")
        sums = numpy.concatenate(([0.0], numpy.cumsum(self.by_cell))) * self.step
        return numpy.interp(moments, numpy.arange(len(sums)) * self.step, sums)

    def only(self, start: float, end: float) -> float:
        """Return what one GPU costs from start to end."""
        return float(self.paid(end) - self.paid(start))

    def cheapest(self, seconds: float, first: float, last: float) -> float:
        """Return the least that one GPU costs for so many seconds that begin in [first, last]."""
        numpy = load("numpy")
        starts = _turns(numpy, self.step, seconds, first, last)
        return float((self.paid(starts + seconds) - self.paid(starts)).min())

    def within(self, spans: Sequence[tuple[float, float]]) -> Prices:
        """Return prices that are the same in the cells that lie inside one of the spans, and zero elsewhere."""
        numpy = load("numpy")
        kept = numpy.zeros_like(self.by_cell)
        for start, end in spans:
            cells = slice(math.ceil(start / self.step), max(0, math.floor(end / self.step)))
            kept[cells] = self.by_cell[cells]
        return Prices(self.step, kept)


def _turns(numpy: Any, step: float, seconds: float, first: float, last: float) -> Any:
    """Return the starts among which is the cheapest: where the price's slope can change, and the window's ends."""
    starting = numpy.arange(math.ceil(first / step), math.floor(last / step) + 1) * step
    ending = numpy.arange(math.ceil((first + seconds) / step), math.floor((last + seconds) / step) + 1) * step - seconds
    return numpy.clip(numpy.concatenate(([first, last], starting, ending)), first, last)


class PriceSearch:
    """The search for the prices with the least bound."""

    def __init__(self, tasks: Sequence[Task], gpus: int, capacity: int, step: float) -> None:
        """Lay out every run that could be a task's cheapest one.

        Args:
            tasks: The tasks; those that no node can run are left out.
            gpus: The GPUs of a node, the most that a task can have.
            capacity: The GPUs of all nodes.
            step: The grid's cell, in seconds.
        """
        self._np = numpy = load("numpy")
        self._capacity = capacity
        self._step = step
        starts: list[Any] = []
        ends: list[Any] = []
        counts: list[Any] = []
        owners: list[Any] = []
        worths: list[float] = []
        for task in tasks:
            usable = startable(task, gpus)
            if not usable:
                continue
            for count in usable:
                seconds = task.seconds_by_gpus[count]
                turns = _turns(numpy, step, seconds, task.arrival, task.last_start_on(count))
                starts.append(turns)
                ends.append(turns + seconds)
                counts.append(numpy.full(len(turns), float(count)))
                owners.append(numpy.full(len(turns), len(worths)))
            worths.append(task.worth)
        self._worths = numpy.array(worths)
        self._cells = 1
        if worths:
            self._gpus, owner = numpy.concatenate(counts), numpy.concatenate(owners)
            self._firsts = numpy.flatnonzero(numpy.diff(owner, prepend=-1))
            self._owner = owner
            self._from, self._from_share = self._on_grid(numpy.concatenate(starts))
            self._to, self._to_share = self._on_grid(numpy.concatenate(ends))
            self._cells = int(self._to.max()) + 1

    def _on_grid(self, moments: Any) -> tuple[Any, Any]:
        cells = self._np.floor(moments / self._step).astype(int)
        return cells, moments / self._step - cells

    def search(self, least: float, until: Callable[[], bool]) -> tuple[float, Prices]:
        """Return the least bound that was found, and its prices.

        Args:
            least: A worth that is known to be reachable, at which Polyak's step aims.
            until: Tells when to end.
        """
        numpy = self._np
        prices = numpy.zeros(self._cells)
        if not len(self._worths):
            return 0.0, Prices(self._step, prices)
        best, spare = self._bound(prices)
        best_prices, bound, direction = prices, best, spare
        share, since = 1.0, 0
        while share > _SMALLEST_STEP and best > least and not until():
            square = float((direction * direction).sum())
            if square == 0.0:
                break
            prices = numpy.maximum(0.0, prices - share * (bound - least) / square * direction)
            bound, spare = self._bound(prices)
            direction = (1 - _SMOOTHING) * direction + _SMOOTHING * spare
            since = 0 if bound < best * (1 - 1e-6) else since + 1
            if bound < best:
                best, best_prices = bound, prices
            if since >= _PATIENCE:
                share, since, prices = share * _SHRINK, 0, best_prices
                bound, direction = self._bound(prices)
        return best, Prices(self._step, best_prices / self._step)

    def _bound(self, prices: Any) -> tuple[float, Any]:
        """Return the bound at prices per cell, and its slope: the GPUs that stay free in each cell."""
        numpy = self._np
        sums, padded = numpy.concatenate(([0.0], numpy.cumsum(prices))), numpy.append(prices, 0.0)
        until = sums[self._to] + self._to_share * padded[self._to]
        since = sums[self._from] + self._from_share * padded[self._from]
        paid = self._gpus * (until - since)
        least = numpy.minimum.reduceat(paid, self._firsts)
        cheapest = numpy.flatnonzero(paid <= numpy.repeat(least, numpy.diff(self._firsts, append=len(paid))))
        _, of_task = numpy.unique(self._owner[cheapest], return_index=True)
        chosen = cheapest[of_task][self._worths > least]
        gains = numpy.maximum(0.0, self._worths - least)
        return float(self._capacity * prices.sum() + gains.sum()), self._capacity - self._used(chosen)

    def _used(self, chosen: Any) -> Any:
        """Return the GPUs in use in each cell, on average, if these runs are made."""
        numpy, gpus = self._np, self._gpus[chosen]
        ends = ((self._from, self._from_share, gpus), (self._to, self._to_share, -gpus))
        used = numpy.zeros(self._cells + 2)
        for cells, _, change in ends:
            numpy.add.at(used, cells[chosen] + 1, change)
        used = numpy.cumsum(used)
        for cells, shares, change in ends:
            numpy.add.at(used, cells[chosen], change * (1 - shares[chosen]))
        return used[: self._cells]


def for_seconds(seconds: float, stopped: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that tells when so many seconds have gone by, or the search is stopped."""
    end = time.monotonic() + seconds
    return lambda: stopped() or time.monotonic() >= end
