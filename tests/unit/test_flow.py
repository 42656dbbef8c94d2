"""When a replica holds its watches for dead, and when it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from taskoffer.reconcile.flow import Flow, SilentWatchError

WINDOW = 20
QUIET, DEAD = 44, 46
"""Seconds of silence that are still borne, and that are not any more."""
BLOCKED = 15
"""Seconds for which events may lie there unhandled."""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flow(clock: Clock) -> Flow:
    return Flow(("Pod", "Node"), WINDOW, clock)


def alive(flow: Flow) -> None:
    for kind in ("Pod", "Node"):
        flow.heard(kind, event=False)


def test_bookmarks_alone_are_enough(flow: Flow, clock: Clock) -> None:
    for _ in range(20):
        clock.now += WINDOW
        alive(flow)
        assert flow.problem() is None


@pytest.mark.parametrize(("seconds", "dead"), [(QUIET, False), (DEAD, True)])
def test_one_silent_stream_among_talking_ones_is_found(flow: Flow, clock: Clock, seconds: float, dead: bool) -> None:
    clock.now += seconds
    flow.heard("Node", event=True)
    flow.handled("Node")
    found = flow.problem()
    assert (found is not None) is dead
    if found is not None:
        assert found.startswith(f"the watch of Pod has been silent for {seconds} s while the API server answers")


def test_a_stream_that_is_only_opened_again_and_again_says_nothing(flow: Flow, clock: Clock) -> None:
    clock.now += DEAD
    assert not flow.listed("Node")
    with pytest.raises(SilentWatchError, match="Pod"):
        flow.check()


def test_silence_counts_from_when_the_server_answers_again(flow: Flow, clock: Clock) -> None:
    for _ in range(10):
        clock.now += 10
        flow.server_away()
    assert flow.problem() is None
    clock.now += QUIET
    assert flow.problem() is None
    clock.now += DEAD - QUIET
    assert flow.problem() is not None


@pytest.mark.parametrize(("seconds", "blocked"), [(14, False), (16, True)])
def test_events_that_nobody_handles_are_found(flow: Flow, clock: Clock, seconds: float, blocked: bool) -> None:
    flow.heard("Pod", event=True)
    clock.now += seconds
    alive(flow)
    assert (flow.problem() is not None) is blocked


def test_a_handled_event_starts_the_count_anew(flow: Flow, clock: Clock) -> None:
    for take in (lambda: flow.heard("Pod", event=True), lambda: flow.handled("Pod")) * 3:
        take()
        clock.now += 10
        alive(flow)
    assert flow.problem() is None


def test_a_second_list_is_told_from_the_first(flow: Flow) -> None:
    answers: list[Callable[[], bool]] = [lambda: flow.listed("Pod"), lambda: flow.listed("Pod")]
    assert [ask() for ask in answers] == [False, True]
    assert not flow.listed("Node")


def test_a_process_that_was_paused_holds_that_against_nobody(flow: Flow, clock: Clock) -> None:
    flow.runs()
    flow.heard("Pod", event=True)
    clock.now += 10 * DEAD
    flow.runs()
    assert flow.problem() is None
    for _ in range(2 * BLOCKED):
        clock.now += 0.5
        flow.runs()
    assert flow.problem() is None
    clock.now += 0.5
    assert flow.problem() == f"events of Pod have arrived and none has been handled for {BLOCKED + 0.5:.0f} s"


def test_a_process_that_runs_all_the_time_is_not_taken_for_a_paused_one(flow: Flow, clock: Clock) -> None:
    for _ in range(DEAD):
        clock.now += 1
        flow.runs()
    assert flow.problem() is not None
