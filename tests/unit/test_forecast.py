"""The queue as it is told: its order, its predicted starts, and what it says it does not know."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_builders import NOW, at, claim, condition, cycle, node, offer, places, policy, snapshot
from taskoffer.api.base import rfc3339
from taskoffer.api.inquiry import Queued
from taskoffer.decision.forecast import forecasts
from taskoffer.decision.ledger import Claim, Release
from taskoffer.decision.queue import LOOKED_AHEAD, queue
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot, shape_of, waiting

PRIORITIES = {"priorities": ["low", "mid", "high"], "raiseAfterSeconds": 500}
LANES = [
    {"name": "small", "gpus": 1, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}], "borrowFrom": ["rest"]},
    {"name": "rest", "gpus": 4, "rules": [{"gpusPerTask": 2}]},
]
ONE_GPU = [node(gpus=1)]


def job(holder: str, seconds: float, count: int = 1, at_node: str = "node-a") -> dict[str, Any]:
    return {"claims": [claim(holder, at_node, count)], "releases": [_release(holder, seconds, count, at_node)]}


def _release(holder: str, seconds: float, count: int = 1, at_node: str = "node-a") -> Release:
    return Release(holder, at_node, count, at(seconds), "lab", None, "default", f"default/{holder}")


def told(pending: list[OfferView], limit: int = 100, **world: Any) -> dict[str, Queued]:
    return {found.name: found for found in queue(snapshot(pending, **world), limit).offers}


def starts(found: dict[str, Queued]) -> dict[str, datetime | None]:
    return {name: one.start.expected if one.start is not None else None for name, one in found.items()}


def test_one_after_another_each_starts_when_the_one_before_is_predicted_to_end() -> None:
    pending = [offer(f"o{i}", created=at(i), hours=1) for i in range(3)]
    found = told(pending, nodes=ONE_GPU, **job("x", 600))
    # Nothing is predicted of these, so each holds its GPU for its time limit of an hour.
    assert starts(found) == {"o0": at(600), "o1": at(600 + 3600), "o2": at(600 + 7200)}
    assert [one.position for one in found.values()] == [1, 2, 3]


def test_the_bounds_are_remaining_times_off_by_the_spread_of_the_policy() -> None:
    start = told([offer()], nodes=ONE_GPU, **job("x", 1000))["offer"].start
    assert start is not None
    assert start.latest is not None
    assert (start.earliest - NOW).total_seconds() == int(1000 / 1.1618342427)
    assert (start.latest - NOW).total_seconds() == int(1000 * 1.1618342427)
    estimation = {"gpuMemory": "80G", "duration": {"startSeconds": 60, "reserveSeconds": 0}}
    scoring = {"terms": None, "expectedValue": {"durationSpread": "0.5"}}
    sized = {"name": "A", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}
    unsure = policy(scoring=scoring, estimation=estimation, size_classes=[sized], filters={"minScore": None})
    wide = told([offer(rows=1000)], nodes=ONE_GPU, policies=[unsure], **job("x", 1000))["offer"].start
    assert wide is not None
    assert (wide.earliest - NOW).total_seconds() == int(1000 / 1.6487212707)


def test_a_small_offer_is_predicted_to_overtake_a_large_one_that_does_not_fit() -> None:
    pending = [offer("large", gpus=4, created=at(-9)), offer("small", gpus=1)]
    world: dict[str, Any] = {
        "nodes": [node(gpus=4)],
        "claims": [claim("a", count=1), claim("b", count=3)],
        "releases": [_release("a", 100, 1), _release("b", 200, 3)],
    }
    assert starts(told(pending, **world)) == {"small": at(100), "large": at(100 + 3600)}
    reserving = policy(queue={"reserveFromGpus": 4})
    assert starts(told(pending, policies=[reserving], **world)) == {"large": at(200), "small": at(200 + 3600)}


def test_a_job_that_is_overdue_is_looked_for_in_as_long_again() -> None:
    assert starts(told([offer()], nodes=ONE_GPU, **job("x", -500))) == {"offer": at(500)}


def test_what_is_refused_before_it_can_start_says_so() -> None:
    found = told([offer(expires_at=rfc3339(at(300)))], nodes=ONE_GPU, **job("x", 600))["offer"]
    assert found.start is None
    assert found.outlook == "predicted to be refused as Expired at about 2026-01-31T12:10:00Z"


def test_where_nothing_says_when_a_holder_ends_there_is_no_start_and_a_note() -> None:
    shown = snapshot([offer()], nodes=ONE_GPU, claims=[claim("foreign", policy=None)])
    made = queue(shown, 10)
    assert made.offers[0].outlook == "no predicted end of a job makes room for it"
    assert "nothing says when 1 holder(s) of GPUs end, so theirs count as taken" in made.notes


def test_more_ends_than_are_looked_ahead_to_are_told_as_such() -> None:
    pending = [offer("large", gpus=4)]
    booked = [claim(f"x{i}", f"n{i}", 2) for i in range(80)]
    ends = [_release(f"x{i}", 100 + i, 2, f"n{i}") for i in range(79)]
    nodes = [node(f"n{i}", 2) for i in range(79)] + [node("n79", 4)]
    found = told(pending, nodes=nodes, claims=booked, releases=[*ends, _release("x79", 999, 2, "n79")])["large"]
    assert found.outlook == "not within the next 64 ends of jobs"


def test_an_offer_that_has_no_order_is_listed_last_and_without_a_place() -> None:
    pending = [
        offer("paused", active=False, created=at(-9)),
        offer("nowhere", policy="nope", created=at(-8)),
        offer("waits"),
    ]
    found = told(pending, nodes=ONE_GPU, **job("x", 60))
    assert [(one.name, one.position, one.reason) for one in found.values()] == [
        ("waits", 1, "WaitingForCapacity"),
        ("paused", None, "Suspended"),
        ("nowhere", None, "PolicyNotFound"),
    ]


def test_what_is_admitted_or_refused_by_the_next_cycle_does_not_wait() -> None:
    pending = [offer("fits", gpus=1), offer("never", hours=40), offer("waits", gpus=4, created=at(9))]
    made = queue(snapshot(pending, claims=[claim("x", count=7)]), 10)
    assert [one.name for one in made.offers] == ["waits"]
    assert made.waiting == 1


def test_what_the_next_cycle_admits_takes_its_gpus_before_those_that_wait() -> None:
    pending = [offer("fits", gpus=2, created=at(-9)), offer("waits", gpus=4)]
    # Without the first one's two GPUs the second could start at once.
    assert starts(told(pending, nodes=[node(gpus=4)])) == {"waits": at(3600)}


def test_a_part_of_the_queue_keeps_the_places_of_the_whole() -> None:
    other = policy("other", default=False)
    pending = [offer(f"o{i}", created=at(i), namespace="b" if i % 2 else "a") for i in range(4)]
    pending.append(offer("p", created=at(9), policy="other", namespace="b"))
    shown = snapshot(pending, policies=[policy(), other], nodes=ONE_GPU, **job("x", 60))
    made = queue(shown, 1, namespace="b")
    assert [(one.name, one.position) for one in made.offers] == [("o1", 2)]
    assert (made.waiting, made.matching) == (5, 3)
    assert [one.name for one in queue(shown, 9, policy="other").offers] == ["p"]
    assert queue(shown, 9, policy="other", namespace="a").matching == 0


def test_starts_are_estimated_for_the_first_ones_only_and_that_is_said() -> None:
    pending = [offer(f"o{i:03}", created=at(i)) for i in range(LOOKED_AHEAD + 20)]
    nodes = [node(f"n{i}", 8) for i in range(30)]
    booked = [claim(f"x{i}", f"n{i}", 8) for i in range(30)]
    ends = [_release(f"x{i}", 100 + i, 8, f"n{i}") for i in range(30)]
    rules = policy(filters={"maxConcurrentJobs": None})
    made = queue(snapshot(pending, nodes=nodes, claims=booked, releases=ends, policies=[rules]), 1000)
    assert made.estimated == LOOKED_AHEAD
    assert f"estimated for the first {LOOKED_AHEAD} of {LOOKED_AHEAD + 20}" in made.notes[1]
    assert [one.start is not None for one in made.offers] == [True] * LOOKED_AHEAD + [False] * 20


OFFERS = st.lists(
    st.fixed_dictionaries(
        {
            "created": st.sampled_from([at(-2000), at(-600), at(-1), NOW]),
            "model": st.sampled_from(["x/llama", "x/qwen", "x/phi-4"]),
            "priority_class": st.sampled_from([None, "low", "mid", "high"]),
            "spec": st.sampled_from([{}, {}, {"deadline": rfc3339(at(900_000))}, {"deadline": rfc3339(at(950_000))}]),
            "parameters": st.sampled_from([500_000, 2_000_000]),
        }
    ),
    max_size=8,
)
quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(OFFERS, st.sampled_from([policy(), policy(queue=PRIORITIES)]))
def test_the_order_is_the_one_in_which_offers_are_admitted_as_gpus_appear_one_by_one(
    fields: list[dict[str, Any]], rules: PolicyView
) -> None:
    pending = [offer(f"o{i}", gpus=1, **f) for i, f in enumerate(fields)]
    listed = [one.name for one in queue(snapshot(pending, policies=[rules], claims=[claim("x", count=8)]), 99).offers]
    admitted: list[str] = []
    left = list(pending)
    for _ in pending:
        (name,) = places(cycle(left, policies=[rules], claims=[claim("x", count=7)]))
        admitted.append(name)
        left = [view for view in left if view.key.name != name]
    assert listed == admitted


def grouped(shown: Snapshot) -> Snapshot:
    """Put the waiting offers into standing groups, as the cache does."""
    groups: dict[Any, list[Any]] = {}
    rest: list[OfferView] = []
    found = {one.name: one.reason for one in queue(shown, 1000).offers}
    for view in shown.offers:
        assert view.spec is not None
        chosen = shown.policy_for(view.spec)[0]
        reason = found.get(view.key.name)
        if chosen is None or reason is None or not reason.startswith("Waiting"):
            rest.append(view)
            continue
        said = replace(view, conditions=(condition("Admitted", False, reason),), observed_generation=view.generation)
        evaluation = shown.evaluations[view.uid, chosen.name]
        shape = shape_of(chosen.name, evaluation, reason)
        groups.setdefault(shape, []).append(waiting(said, evaluation, shown.now))
    kept = {view.uid for view in rest}
    evaluations = {key: value for key, value in shown.evaluations.items() if key[0] in kept}
    standing = {shape: sorted(group) for shape, group in groups.items()}
    return replace(shown, offers=rest, standing=standing, evaluations=evaluations)


@quick
@given(
    OFFERS,
    st.sampled_from(
        [policy(), policy(queue=PRIORITIES), policy(lanes=LANES), policy(queue={"reserveFromGpus": 2})],
    ),
    st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(-100, 5000)), min_size=1, max_size=4),
)
def test_offers_that_stand_aside_between_cycles_are_told_as_if_they_were_looked_at_one_by_one(
    fields: list[dict[str, Any]], rules: PolicyView, jobs: list[tuple[int, int]]
) -> None:
    pending = [offer(f"o{i}", **f) for i, f in enumerate(fields)]
    booked: list[Claim] = [claim(f"j{i}", count=count) for i, (count, _) in enumerate(jobs)]
    ends = [_release(f"j{i}", seconds, count) for i, (count, seconds) in enumerate(jobs)]
    shown = snapshot(pending, policies=[rules], nodes=[node(gpus=4)], claims=booked, releases=ends)
    assert queue(grouped(shown), 99) == queue(shown, 99)


@quick
@given(OFFERS, st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5000)), min_size=1, max_size=3))
def test_a_predicted_start_is_no_earlier_than_the_first_end_and_none_is_lost(
    fields: list[dict[str, Any]], jobs: list[tuple[int, int]]
) -> None:
    pending = [offer(f"o{i}", **f) for i, f in enumerate(fields)]
    nodes = [node(f"n{i}", count) for i, (count, _) in enumerate(jobs)]
    booked = [claim(f"j{i}", f"n{i}", count) for i, (count, _) in enumerate(jobs)]
    ends = [_release(f"j{i}", seconds, count, f"n{i}") for i, (count, seconds) in enumerate(jobs)]
    shown = snapshot(pending, nodes=nodes, claims=booked, releases=ends)
    first = forecasts(shown, pending)[0]
    assert set(first.starts).isdisjoint(first.refused)
    assert all(start >= min(r.ends for r in ends) for start in first.starts.values())
    largest = max(count for count, _ in jobs)
    if first.complete:
        gpus = {view.uid: shown.evaluations[view.uid, "lab"].gpus for view in pending}
        assert set(first.starts) == {uid for uid, count in gpus.items() if count <= largest} - set(first.refused)


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_queue_is_an_answer_too(count: int) -> None:
    made = queue(snapshot([offer() for _ in range(count)]), 10)
    assert (made.waiting, made.offers) == (0, ())
