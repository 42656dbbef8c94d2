"""The most that perfect foresight earns: known optima, brute force, bounds that hold, a checker that sees mistakes."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from task_traces import trace
from taskoffer.simulation.clairvoyant import Best, best_schedule
from taskoffer.simulation.extras import MissingExtraError
from taskoffer.simulation.groups import GroupBound, cut
from taskoffer.simulation.guide import Guide
from taskoffer.simulation.plan import Plan, by_density, gpu_time
from taskoffer.simulation.prices import Prices, PriceSearch, for_seconds
from taskoffer.simulation.run import Run
from taskoffer.simulation.schedule_check import InfeasibleScheduleError, check_schedule
from taskoffer.simulation.task import Task
from taskoffer.simulation.ticks import reachable, relaxed
from taskoffer.simulation.window import Effort, Stop


def task(
    name: str,
    seconds_by_gpus: Mapping[int, float],
    arrival: float = 0,
    patience: float = 0,
    worth: float = 1,
    deadline: float = math.inf,
) -> Task:
    return Task(name, arrival, arrival + patience, worth, seconds_by_gpus, deadline)


def run(of: Task, start: float, gpus: int, node: str = "n1") -> Run:
    return Run(of.name, start, start + of.seconds_by_gpus[gpus], gpus, node, "InTime", of.worth)


def solve(tasks: Sequence[Task], gpus: int = 8, nodes: int = 1, seconds: float = 20, **more: object) -> Best:
    return best_schedule(tasks, gpus, nodes, seconds, 1, **more)  # type: ignore[arg-type]


def brute_force(tasks: Sequence[Task], gpus: int, nodes: int) -> float:
    """Return the most worth, by trying every order of every subset in every mode, each task as early as it can.

    Some best schedule starts its tasks, in the order of their starts, at their arrival or when something ends: moving a
    start forward to the next such moment never needs more than it needed.
    """

    def extend(left: frozenset[Task], placed: tuple[Run, ...], since: float) -> Iterator[float]:
        yield sum(one.worth for one in placed)
        for chosen in left:
            for count, node in itertools.product(chosen.seconds_by_gpus, range(nodes)):
                for start in {max(since, chosen.arrival), *(one.end for one in placed)}:
                    candidate = run(chosen, start, count, str(node))
                    if start < since or not fits((*placed, candidate), chosen, candidate):
                        continue
                    yield from extend(left - {chosen}, (*placed, candidate), start)

    def fits(runs: tuple[Run, ...], chosen: Task, candidate: Run) -> bool:
        if not chosen.arrival <= candidate.start <= chosen.last_start or candidate.end > chosen.deadline:
            return False
        used = sum(one.gpus for one in runs if one.node == candidate.node and one.start <= candidate.start < one.end)
        return used <= gpus

    return max(extend(frozenset(_Hashed(one) for one in tasks), (), 0.0))


class _Hashed(Task):
    """A task in a set: its mapping cannot be hashed, its name can."""

    __slots__ = ()

    def __init__(self, of: Task) -> None:
        super().__init__(of.name, of.arrival, of.last_start, of.worth, of.seconds_by_gpus, of.deadline)

    def __hash__(self) -> int:
        return hash(self.name)


KNOWN = {
    "nothing to do": ([], 8, 1, 0),
    "a task without a GPU count": ([task("a", {})], 8, 1, 0),
    "a task that is larger than a node": ([task("a", {8: 10})], 4, 3, 0),
    "one task": ([task("a", {2: 10}, worth=3)], 2, 1, 3),
    "two that fit beside each other": ([task("a", {4: 10}), task("b", {4: 10})], 8, 1, 2),
    "two of which one must go": ([task("a", {5: 10}), task("b", {5: 10}, worth=2)], 8, 1, 2),
    "the second waits for the first": ([task("a", {8: 10}), task("b", {8: 10}, patience=10)], 8, 1, 2),
    "the second is one second short of patience": ([task("a", {8: 10}), task("b", {8: 10}, patience=9)], 8, 1, 1),
    "idle for the better one": ([task("a", {8: 10}, worth=1), task("b", {8: 10}, arrival=5, worth=3)], 8, 1, 3),
    "the longer mode leaves room": ([task("a", {8: 10, 4: 19}), task("b", {4: 19})], 8, 1, 2),
    "the shorter mode leaves time": ([task("a", {4: 19, 8: 10}), task("b", {8: 10}, arrival=10)], 8, 1, 2),
    "each on its node": ([task("a", {5: 10}), task("b", {5: 10})], 8, 2, 2),
    "no task is spread over nodes": ([task("a", {5: 10}), task("b", {5: 10}), task("c", {6: 10})], 8, 2, 2),
    "a deadline for the slower count": (
        [task("a", {1: 10, 2: 5}, patience=99, deadline=10), task("b", {1: 5}, worth=2)],
        2,
        1,
        3,
    ),
    "no time is left for the slower count": (
        [task("a", {1: 10, 2: 5}, patience=99, deadline=10), task("b", {1: 5}), task("c", {1: 5})],
        2,
        1,
        3,
    ),
    "the deadline comes before patience ends": (
        [task("a", {1: 9}), task("b", {1: 9}, patience=99, deadline=17)],
        1,
        1,
        1,
    ),
    "the deadline leaves just enough": ([task("a", {1: 9}), task("b", {1: 9}, patience=99, deadline=18)], 1, 1, 2),
    "no count meets the deadline": ([task("a", {1: 9, 2: 5}, patience=99, deadline=4)], 2, 1, 0),
    "one count meets the deadline at once": ([task("a", {1: 9, 2: 5}, patience=99, deadline=5)], 2, 1, 1),
    "a window between two ticks": ([task("a", {1: 10}, arrival=0.123), task("b", {1: 10}, arrival=10.323)], 1, 1, 2),
    "a start in the same moment as an end": (
        [task("a", {1: 1 / 3}), task("b", {1: 1 / 3}, arrival=1 / 3, patience=0.2)],
        1,
        1,
        2,
    ),
}


@pytest.mark.parametrize(("tasks", "gpus", "nodes", "most"), KNOWN.values(), ids=KNOWN)
def test_the_best_of_a_few_tasks_is_found_and_proven(tasks: list[Task], gpus: int, nodes: int, most: float) -> None:
    best = solve(tasks, gpus, nodes)
    assert (best.worth, best.proven) == (pytest.approx(most), True)
    assert best.worth <= best.bound == pytest.approx(most, rel=1e-5)
    check_schedule(tasks, best.runs, gpus, nodes)


@pytest.mark.parametrize("seed", range(12))
def test_nobody_who_tries_everything_finds_more(seed: int) -> None:
    dice = random.Random(seed)
    gpus, nodes = dice.choice([(2, 1), (3, 1), (2, 2)])
    tasks = [
        task(
            str(n),
            {count: dice.randint(10, 30) / count for count in dice.sample(range(1, gpus + 1), 2)},
            arrival=dice.randint(0, 30),
            patience=dice.choice([0, 5, 15]),
            worth=dice.randint(1, 9),
            # In whole seconds, so that rounding to ticks leaves the proof whole.
            deadline=dice.choice([math.inf, dice.randint(15, 60)]),
        )
        for n in range(5)
    ]
    best = solve(tasks, gpus, nodes)
    assert (best.worth, best.proven) == (pytest.approx(brute_force(tasks, gpus, nodes)), True)


def with_deadlines(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Give half of the tasks a deadline that the faster counts meet for longer than the slower ones."""
    dice = random.Random(seed)
    return [
        replace(one, deadline=one.arrival + dice.uniform(1.0, 2.0) * max(one.seconds_by_gpus.values()))
        if dice.random() < 0.5 and one.seconds_by_gpus
        else one
        for one in tasks
    ]


@pytest.mark.parametrize("load", [0.5, 2.0])
def test_with_deadlines_the_bound_is_never_below_what_is_reached_and_every_run_ends_in_time(load: float) -> None:
    tasks = with_deadlines(trace(60, load), seed=4)
    due = {one.name: one.deadline for one in tasks}
    best = solve(tasks, seconds=1.5)
    check_schedule(tasks, best.runs)
    assert 0 < best.worth <= best.bound <= sum(one.worth for one in tasks)
    assert all(one.end <= due[one.name] + 1e-6 for one in best.runs)
    assert any(due[one.name] < math.inf for one in best.runs)


@pytest.mark.parametrize("seed", range(3))
def test_with_deadlines_every_bound_holds_for_the_optimum(seed: int) -> None:
    tasks = with_deadlines(trace(12, load=1.5, seed=seed), seed)
    optimum = solve(tasks)
    assert optimum.proven
    by_price, prices = PriceSearch(tasks, 8, 8, step=120).search(0.0, for_seconds(1, lambda: False))
    choices = [choice for one in tasks if (choice := relaxed(one, 8)) is not None]
    groups = GroupBound(cut(choices, prices, 3, 5), prices, 8)
    for index in range(len(groups.groups)):
        groups.solve(index, Effort(5, 1, 0), Stop())
    assert optimum.worth <= groups.total * (1 + 1e-9)
    assert optimum.worth <= by_price


def test_a_count_that_can_only_start_between_two_ticks_is_left_out_beside_another_one() -> None:
    found = reachable(task("a", {1: 10, 2: 5}, arrival=0.01, patience=9, deadline=10.05), 2)
    assert found is not None
    assert [mode.gpus for mode in found.modes] == [2]
    whole = relaxed(task("a", {1: 10, 2: 5}, arrival=0.01, patience=9, deadline=10.05), 2)
    assert whole is not None
    assert [(mode.gpus, mode.last) for mode in whole.modes] == [(1, 1), (2, 51)]


def test_one_worker_and_one_seed_always_find_the_same() -> None:
    tasks = trace(14, load=2, seed=3)
    assert solve(tasks, seed=5).runs == solve(tasks, seed=5).runs


def test_a_task_that_the_best_schedule_leaves_out_does_not_run() -> None:
    best = solve([task("a", {8: 10}), task("b", {8: 10}, worth=2)])
    assert [one.name for one in best.runs] == ["b"]


@pytest.mark.parametrize("load", [0.5, 1.0, 2.0])
def test_the_bound_is_never_below_what_is_reached_in_a_trace_that_is_too_long_to_solve(load: float) -> None:
    tasks = trace(60, load)
    told: list[tuple[float, float]] = []
    best = solve(tasks, seconds=1.0, progress=lambda _, worth, bound: told.append((worth, bound)))
    check_schedule(tasks, best.runs)
    assert 0 < best.worth <= best.bound <= sum(one.worth for one in tasks)
    assert told[0][0] < best.worth
    assert all(worth <= bound * (1 + 1e-9) for worth, bound in told)


@pytest.mark.parametrize("seed", range(4))
def test_every_bound_holds_for_the_optimum_of_a_trace(seed: int) -> None:
    tasks = trace(12, load=1.5, seed=seed)
    optimum = solve(tasks)
    assert optimum.proven
    by_price, prices = PriceSearch(tasks, 8, 8, step=120).search(0.0, for_seconds(1, lambda: False))
    choices = [choice for one in tasks if (choice := relaxed(one, 8)) is not None]
    groups = GroupBound(cut(choices, prices, 3, 5), prices, 8)
    unsolved = groups.total
    for index in range(len(groups.groups)):
        groups.solve(index, Effort(5, 1, 0), Stop())
    assert len(groups.groups) > 2
    assert optimum.worth <= groups.total * (1 + 1e-9)
    assert groups.total <= unsolved
    assert optimum.worth <= by_price


def test_groups_see_that_tasks_are_not_divisible_where_prices_do_not() -> None:
    rivals = [task(f"{day}{n}", {5: 1000}, arrival=day * 10_000, worth=1) for day in range(4) for n in range(3)]
    by_price, prices = PriceSearch(rivals, 8, 8, step=100).search(0.0, for_seconds(2, lambda: False))
    choices = [choice for one in rivals if (choice := relaxed(one, 8)) is not None]
    groups = GroupBound(cut(choices, prices, 2, 3), prices, 8)
    for index in range(len(groups.groups)):
        groups.solve(index, Effort(5, 1, 0), Stop())
    assert by_price == pytest.approx(4 * 8 / 5, rel=0.01)
    assert groups.total == pytest.approx(4, rel=1e-5)


def test_where_rounding_costs_a_task_nothing_is_claimed_to_be_proven() -> None:
    best = solve([task("a", {1: 10}, arrival=0.123), task("b", {1: 10}, arrival=10.123)], gpus=1)
    assert (best.worth, best.proven) == (1, False)
    assert best.bound == pytest.approx(2)


def test_prices_are_read_exactly_between_their_cells() -> None:
    prices = Prices(10.0, [1.0, 0.0, 2.0])
    assert prices.only(5, 25) == pytest.approx(15)
    assert prices.only(25, 100) == pytest.approx(10)
    assert prices.cheapest(10, 0, 20) == pytest.approx(0)
    assert prices.cheapest(10, 15, 20) == pytest.approx(10)


@pytest.mark.parametrize("load", [0.5, 2.0])
def test_no_greedy_schedule_is_better_than_the_bound_by_prices(load: float) -> None:
    tasks = trace(80, load, seed=1)
    bound, prices = PriceSearch(tasks, 8, 8, step=300).search(0.0, for_seconds(0.5, lambda: False))
    choices = [choice for one in tasks if (choice := reachable(one, 8)) is not None]
    plans = [Plan(8, 1), Plan(8, 1), Guide(choices, prices).plan(8, 1)]
    plans[0].fill(by_density(choices), gpu_time)
    plans[1].fill(choices, gpu_time)
    for plan in plans:
        check_schedule(tasks, [place.run() for place in plan.places.values()])
        assert 0 < plan.worth <= bound < sum(one.worth for one in tasks)


def test_a_hint_is_where_the_search_begins() -> None:
    tasks = trace(60, load=2.0, seed=2)
    good = solve(tasks, seconds=2)
    again = solve(tasks, seconds=0.2, hint=good.runs)
    assert again.worth >= good.worth


def test_of_a_hint_only_what_can_be_done_is_taken() -> None:
    tasks = [task("a", {8: 10}), task("b", {8: 10})]
    late = replace(run(tasks[0], 0, 8), outcome="Late", worth=0)
    unknown = replace(run(tasks[0], 0, 8), name="somebody else's")
    assert solve(tasks, hint=[late, run(tasks[1], 0, 8, "n9"), unknown]).worth == 1


def test_an_interrupt_gives_the_best_found_so_far() -> None:
    tasks = trace(60, load=2.0)
    told: list[float] = []

    def interrupt(_seconds: float, worth: float, _bound: float) -> None:
        told.append(worth)
        if len(told) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    # Whoever starts the tests in the background may have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        best = solve(tasks, seconds=300, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert best.seconds < 60
    assert best.worth >= told[2]
    check_schedule(tasks, best.runs)


def test_two_tasks_of_one_name_are_not_solved() -> None:
    with pytest.raises(ValueError, match="same name"):
        solve([task("a", {1: 1}), task("a", {1: 1})])


def test_without_the_solver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python.cp_model", None)
    with pytest.raises(
        MissingExtraError, match=r"ortools is not installed: pip install '.\[simulate\]' in the checkout"
    ):
        solve([])


A = task("a", {2: 10, 4: 6}, arrival=5, patience=10)
B = task("b", {2: 10}, arrival=5, patience=10)
DUE = task("due", {1: 8, 2: 5}, patience=9, deadline=10)
WRONG = {
    "after its deadline": ([run(DUE, 3, 1)], "ends at 11, later than 10"),
    "above capacity": ([run(A, 5, 2), run(B, 14, 2)], "4 of 3 GPUs are used on n1 at 14"),
    "before it arrives": ([run(A, 4, 2)], "before it arrives"),
    "after its last start": ([run(A, 16, 2)], "later than 15"),
    "too short": ([replace(run(A, 5, 2), end=14.0)], "takes 9.0 s in place of 10 s"),
    "on a count that it cannot use": ([replace(run(A, 5, 2), gpus=1)], "cannot run on 1 GPUs"),
    "twice": ([run(A, 5, 2), run(A, 15, 2)], "runs twice"),
    "no task": ([replace(run(A, 5, 2), name="c")], "c is not a task"),
    "of another worth": ([replace(run(A, 5, 2), worth=7)], "earns 7 in place of 1"),
    "on a node too many": ([run(A, 5, 2, "n1"), run(B, 5, 2, "n2")], "2 nodes are used, there are 1"),
}


@pytest.mark.parametrize(("runs", "told"), WRONG.values(), ids=WRONG)
def test_the_checker_sees(runs: list[Run], told: str) -> None:
    with pytest.raises(InfeasibleScheduleError, match=told):
        check_schedule([A, B, DUE], runs, gpus=3, nodes=1)


def test_the_checker_lets_pass_what_can_be_done() -> None:
    check_schedule([A, B], [run(A, 5, 2), run(B, 15, 2)], gpus=2)
    check_schedule([A, B], [run(A, 5, 2, "n1"), run(B, 5, 2, "n2")], gpus=2, nodes=2)
