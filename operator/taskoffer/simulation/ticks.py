"""Tasks in whole ticks of time, rounded so that what is shown about them holds for the real ones.

Two roundings, for two statements:

* ``reachable``: durations are rounded up and the window of starts inwards, so that every schedule of the rounded tasks
  is one of the real tasks. The schedule that is returned is searched among these.
* ``relaxed``: the window's ends are rounded up and durations down, so that every schedule of the real tasks gives one
  of the rounded tasks with the same worth: round every start up. Proof: a task that really runs from s for d is rounded
  to the ticks t with ``ceil(s) <= t <= ceil(s) + floor(d) - 1``. For each of them ``s <= t < s + d``, so that the real
  task runs at the moment t as well, and at no tick more GPUs are in use than really were at that moment. Upper bounds
  are proven for these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskoffer.simulation.run import Run
from taskoffer.simulation.task import Task

PER_SECOND = 10
"""Ticks in a second: fine enough that rounding costs nothing that counts, coarse enough for 64-bit energies."""


@dataclass(frozen=True, slots=True)
class Mode:
    """So many GPUs for so many ticks, from a start not later than ``last``."""

    gpus: int
    ticks: int
    last: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A task in ticks: it starts from ``first`` on, in one of its modes."""

    task: Task
    first: int
    modes: tuple[Mode, ...]

    @property
    def last(self) -> int:
        """The last tick at which any of its modes can start."""
        return max(mode.last for mode in self.modes)

    @property
    def longest(self) -> int:
        """The ticks of its longest mode."""
        return max(mode.ticks for mode in self.modes)


@dataclass(frozen=True, slots=True)
class Place:
    """Where and when a task runs, in ticks."""

    choice: Choice
    mode: Mode
    start: int
    node: int

    @property
    def end(self) -> int:
        """The first tick at which its GPUs are free again."""
        return self.start + self.mode.ticks

    def run(self) -> Run:
        """Return the run in seconds, with the task's exact duration."""
        task = self.choice.task
        start = min(max(self.start / PER_SECOND, task.arrival), task.last_start_on(self.mode.gpus))
        end = start + task.seconds_by_gpus[self.mode.gpus]
        return Run(task.name, start, end, self.mode.gpus, f"node-{self.node}", "InTime", task.worth)


def startable(task: Task, gpus: int) -> list[int]:
    """Return the GPU counts with which a task can start once it is there on nodes of ``gpus`` GPUs, and earn."""
    if task.worth <= 0:
        return []
    return sorted(n for n in task.seconds_by_gpus if n <= gpus and task.last_start_on(n) >= task.arrival)


def reachable(task: Task, gpus: int) -> Choice | None:
    """Return the task rounded so that its places are real ones, or None if nothing of it fits ``gpus`` GPUs.

    Of several GPU counts one that can only start between two ticks is left out.
    """
    counts = startable(task, gpus)
    first = math.ceil(task.arrival * PER_SECOND)
    lasts = {count: math.floor(task.last_start_on(count) * PER_SECOND) for count in counts}
    early = 0.0
    if counts and first > max(lasts.values()):
        # The window lies between two ticks: the task holds its GPUs from the tick before, and starts at its arrival.
        first = math.floor(task.arrival * PER_SECOND)
        early = task.arrival * PER_SECOND - first
        lasts = dict.fromkeys(counts, first)
    modes = [
        Mode(count, math.ceil(task.seconds_by_gpus[count] * PER_SECOND + early), last)
        for count, last in lasts.items()
        if last >= first
    ]
    return Choice(task, first, tuple(modes)) if modes else None


def relaxed(task: Task, gpus: int) -> Choice | None:
    """Return the task rounded so that real schedules stay possible, or None if nothing of it fits ``gpus`` GPUs."""
    modes = [
        Mode(
            count,
            math.floor(task.seconds_by_gpus[count] * PER_SECOND),
            math.ceil(task.last_start_on(count) * PER_SECOND),
        )
        for count in startable(task, gpus)
    ]
    return Choice(task, math.ceil(task.arrival * PER_SECOND), tuple(modes)) if modes else None
