"""The best schedule of a few tasks among places that stay as they are, by OR-tools CP-SAT."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taskoffer.simulation.extras import load
from taskoffer.simulation.ticks import Choice, Mode, Place

_LARGEST = 1_000_000
"""What the dearest task becomes as a whole number; the objective is summed in these."""


class Stop:
    """A request to end the search, which also reaches the solver that runs at the moment."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._solver: Any = None

    @property
    def wanted(self) -> bool:
        """Tell whether the search is to end."""
        return self._event.is_set()

    def set(self) -> None:
        """End the search."""
        self._event.set()
        with self._lock:
            if self._solver is not None:
                self._solver.stop_search()

    def solve(self, solver: Any, model: Any) -> Any:
        """Run a solver, which is stopped when the search is to end."""
        with self._lock:
            self._solver = solver
        try:
            if self.wanted:
                solver.parameters.max_time_in_seconds = 0.0
            return solver.solve(model)
        finally:
            with self._lock:
                self._solver = None


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard the solver tries."""

    seconds: float
    workers: int
    seed: int


@dataclass(frozen=True, slots=True)
class Option:
    """What a task brings when it starts in [first, last], in ticks, in a mode."""

    mode: Mode
    first: int
    last: int
    value: float


@dataclass(frozen=True, slots=True)
class Solved:
    """What the solver found: places (None if it found none in time), and what it proved to be the most value."""

    places: tuple[Place, ...] | None
    bound: float
    optimal: bool


def whole(choice: Choice) -> list[Option]:
    """Return the options of a task that earns its worth whenever it starts in its window."""
    return [Option(mode, choice.first, mode.last, choice.task.worth) for mode in choice.modes]


class WindowModel:
    """Optional intervals, one per task, mode and node, under each node's GPUs."""

    def __init__(self, gpus: int, nodes: int) -> None:
        self._cp = load("ortools.sat.python.cp_model")
        self._model = self._cp.CpModel()
        self._gpus = gpus
        self._nodes = nodes
        self._choices: dict[str, Choice] = {}
        self._starts: dict[str, Any] = {}
        self._present: dict[str, list[tuple[Mode, int, Any]]] = {}
        self._intervals: defaultdict[int, list[tuple[Any, int]]] = defaultdict(list)
        self._earning: list[tuple[Any, float]] = []

    def add(self, choice: Choice, options: Iterable[Option]) -> None:
        """Add a task that may run in one of the options, or not at all."""
        name, model = choice.task.name, self._model
        by_mode: defaultdict[Mode, list[Option]] = defaultdict(list)
        for option in options:
            by_mode[option.mode].append(option)
        start = model.new_int_var(choice.first, choice.last, name)
        present = []
        for mode, of_mode in by_mode.items():
            on_nodes = []
            for node in range(self._nodes):
                here = model.new_bool_var("")
                interval = model.new_optional_fixed_size_interval_var(start, mode.ticks, here, "")
                self._intervals[node].append((interval, mode.gpus))
                present.append((mode, node, here))
                on_nodes.append(here)
            self._value(choice, start, of_mode, on_nodes)
        model.add_at_most_one([here for _, _, here in present])
        self._choices[name], self._starts[name], self._present[name] = choice, start, present

    def _value(self, choice: Choice, start: Any, options: Sequence[Option], on_nodes: list[Any]) -> None:
        """Let the task in one mode bring the value of the option in which it starts."""
        only = options[0]
        if len(options) == 1 and (only.first, only.last) == (choice.first, choice.last):
            self._earning += [(here, only.value) for here in on_nodes]
            return
        literals = []
        for option in options:
            literal = self._model.new_bool_var("")
            self._model.add(start >= option.first).only_enforce_if(literal)
            self._model.add(start <= option.last).only_enforce_if(literal)
            literals.append(literal)
            self._earning.append((literal, option.value))
        self._model.add(self._cp.LinearExpr.sum(literals) == self._cp.LinearExpr.sum(on_nodes))

    def keep(self, place: Place) -> None:
        """Add a place that stays as it is."""
        interval = self._model.new_fixed_size_interval_var(place.start, place.mode.ticks, "")
        self._intervals[place.node].append((interval, place.mode.gpus))

    def solve(self, hint: Mapping[str, Place], effort: Effort, stop: Stop) -> Solved:
        """Search, beginning from the hint, for the most value."""
        for intervals in self._intervals.values():
            self._model.add_cumulative([one for one, _ in intervals], [gpus for _, gpus in intervals], self._gpus)
        scale = _LARGEST / max((value for _, value in self._earning), default=1.0)
        # Rounded up, so that the bound on the whole numbers is one on the values as well.
        values = [math.ceil(value * scale) for _, value in self._earning]
        self._model.maximize(self._cp.LinearExpr.weighted_sum([literal for literal, _ in self._earning], values))
        self._hint(hint)
        solver = self._cp.CpSolver()
        solver.parameters.max_time_in_seconds = effort.seconds
        solver.parameters.num_workers = effort.workers
        solver.parameters.random_seed = effort.seed
        # Its own handler of SIGINT would leave the process without one when it is done.
        solver.parameters.catch_sigint_signal = False
        status = stop.solve(solver, self._model)
        if status == self._cp.MODEL_INVALID:
            raise ValueError(f"the solver takes its model for invalid: {self._model.validate()}")
        if status not in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            return Solved(None, math.inf, optimal=False)
        return Solved(tuple(self._places(solver)), solver.best_objective_bound / scale, status == self._cp.OPTIMAL)

    def _hint(self, hint: Mapping[str, Place]) -> None:
        for name, choice in self._choices.items():
            place = hint.get(name)
            self._model.add_hint(self._starts[name], place.start if place else choice.first)
            for mode, node, here in self._present[name]:
                self._model.add_hint(here, place is not None and (place.mode, place.node) == (mode, node))

    def _places(self, solver: Any) -> Iterator[Place]:
        for name, choice in self._choices.items():
            for mode, node, here in self._present[name]:
                if solver.boolean_value(here):
                    yield Place(choice, mode, solver.value(self._starts[name]), node)
