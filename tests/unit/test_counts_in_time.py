"""Offers whose count of GPUs the policy prefers by GPU-hours or by value: they get one on which they are in time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_builders import (
    HIGH_TAKES,
    answers,
    at,
    claim,
    claims_of,
    cycle,
    decide,
    node,
    offer,
    policy,
    releases_of,
    running,
)
from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.ledger import Claim, NodeView, Release
from taskoffer.decision.snapshot import OfferView, PolicyView
from taskoffer.decision.verdict import Answer

ALL = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
HOURLY = {"gpuMemory": "80G", "duration": {"startSeconds": 60, "reserveSeconds": 0}}
TASK: dict[str, Any] = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "rows": 300_000}
"""4.84 hours on one GPU, 2.43 on two, 73 minutes on four."""


def choosing(choice: str, spare: str | None = None, **fields: Any) -> PolicyView:
    scoring = {"terms": None, "expectedValue": {"spareShare": spare}}
    counts = [{"name": "nvidia.com/gpu", "counts": [1, 2, 4, 8]}]
    shared = {"filters": {"minScore": "0"}, "estimation": HOURLY, "size_classes": [ALL], "resources": counts}
    return policy(gpu_choice=choice, scoring=scoring, **{**shared, **fields})


FEWEST = choosing("FewestGpuHours")
DEAREST = choosing("MostValue")
SPARING = choosing("MostValue", "0.75")
PREFERRING = pytest.mark.parametrize("rules", [FEWEST, DEAREST, SPARING], ids=["GPU-hours", "value", "spare"])


def due(seconds: float) -> dict[str, Any]:
    return {"spec": {"deadline": rfc3339(at(seconds))}}


def booked(gpus: int, until: float) -> dict[str, Any]:
    return {"claims": [claim("x", count=gpus)], "releases": [Release("x", "node-a", gpus, at(until), "lab")]}


def given_to(answer: Answer) -> int | str:
    return answer.admission.assignments[0].count if answer.admission else answer.reason.value


@PREFERRING
@pytest.mark.parametrize(("hours", "count"), [(18, 1), (5, 1), (4, 2), (2, 4), (1, 8)])
def test_the_preferred_one_of_the_counts_in_time_for_the_deadline_is_taken(
    rules: PolicyView, hours: float, count: int
) -> None:
    made = decide(offer(**TASK, **due(hours * 3600)), policies=[rules], nodes=[node(gpus=count)])
    assert given_to(made.answer) == count


@PREFERRING
def test_nothing_is_started_on_a_count_that_would_miss_the_deadline_while_another_is_to_be_free(
    rules: PolicyView,
) -> None:
    view = offer(**TASK, **due(7200))
    made = cycle([view], policies=[rules], **booked(6, 600))
    assert answers(made) == {"offer": ("Wait", "WaitingForCapacity")}
    assert "needs 4 x nvidia.com/gpu" in made.decisions[0].answer.message
    assert given_to(decide(view, policies=[rules], claims=[claim("x", count=4)]).answer) == 4


@PREFERRING
def test_an_offer_is_looked_at_again_when_a_count_becomes_too_slow_and_waits_for_the_next_one(
    rules: PolicyView,
) -> None:
    view = offer(**TASK, **due(9000))
    made = cycle([view], policies=[rules], **booked(7, 40_000))
    assert "needs 2 x" in made.decisions[0].answer.message
    assert made.wake_at is not None
    assert at(9000 - 8760) < made.wake_at < at(9000 - 8700)
    (later,) = cycle([view], policies=[rules], **booked(7, 40_000), now=made.wake_at).decisions
    assert "needs 4 x" in later.answer.message


@PREFERRING
def test_it_is_refused_once_the_fastest_count_would_miss_the_deadline(rules: PolicyView) -> None:
    made = decide(offer(**TASK, **due(1800)), policies=[rules]).answer
    assert made.reason is Reason.CANNOT_FINISH_IN_TIME
    assert made.message.startswith("predicted to take 37.2 min")


@PREFERRING
def test_the_count_that_it_waits_for_is_the_one_that_a_node_is_kept_for(rules: PolicyView) -> None:
    assert rules.spec is not None
    queue = {"priorities": ["low", "high"], "reserveFromGpus": 4}
    keeping = choosing(str(rules.spec.gpu_choice), "0.75" if rules is SPARING else None, queue=queue)
    first, small = offer("first", **TASK, **due(7200)), offer("small", **{**TASK, "hours": 18}, gpus=1)
    made = answers(cycle([first, small], policies=[keeping], nodes=[node(gpus=4)], **booked(2, 600)))
    assert made == {"first": ("Wait", "WaitingForCapacity"), "small": ("Wait", "WaitingBehindReservation")}


def test_jobs_are_stopped_for_the_count_on_which_it_is_in_time() -> None:
    rules = choosing("MostValue", "0.75", queue={"priorities": ["low", "high"]}, preemption=HIGH_TAKES)
    jobs = [running(name, 2, ends=30_000, deadline=at(90_000)) for name in ("a", "b", "c")]
    view = offer(**TASK, **due(7200), priority_class="high")
    world = {"claims": claims_of(jobs), "releases": releases_of(jobs), "running": jobs}
    made = cycle([view], policies=[rules], **world)
    assert answers(made) == {"offer": ("Wait", "WaitingForPreemption")}
    assert "needs 4 x" in made.decisions[0].answer.message
    assert len(made.evictions) == 1


@pytest.mark.parametrize("spare", [None, "0.75"])
def test_a_namespace_gets_the_most_valuable_one_of_the_counts_that_it_may_hold(spare: str | None) -> None:
    # On one GPU the task is in time, but not surely enough.
    view = offer(**{**TASK, "hours": 5.5})
    assert given_to(decide(view, policies=[DEAREST]).answer) == 2
    limited = choosing("MostValue", spare, namespaces=[{"name": "default", "gpus": 1}])
    assert given_to(decide(view, policies=[limited]).answer) == 1


@PREFERRING
def test_a_namespace_that_may_hold_too_few_is_told_so(rules: PolicyView) -> None:
    assert rules.spec is not None
    limits = [{"name": "default", "gpus": 1}]
    limited = choosing(str(rules.spec.gpu_choice), "0.75" if rules is SPARING else None, namespaces=limits)
    made = decide(offer(**{**TASK, "hours": 4}), policies=[limited]).answer
    assert made.reason is Reason.GPU_COUNT_NOT_ALLOWED
    assert "once namespaces[default].gpus is raised" in made.explanation[-1].message


def test_a_share_of_the_idle_gpus_bounds_the_most_valuable_count_and_not_the_one_that_ends_first() -> None:
    for choice, count in (("MostValue", 4), ("EarliestEnd", 8)):
        assert given_to(decide(offer(**TASK), policies=[choosing(choice, "0.75")]).answer) == count


LIMITED = [{"name": "default", "gpus": 2}]
CHOOSING = [
    FEWEST,
    DEAREST,
    SPARING,
    choosing("EarliestEnd"),
    choosing("FewestGpuHours", namespaces=LIMITED),
    choosing("MostValue", "0.75", namespaces=LIMITED),
    choosing("MostValue", queue={"priorities": ["low", "high"], "reserveFromGpus": 4}),
]


@st.composite
def hurries(draw: st.DrawFn) -> list[OfferView]:
    return [
        offer(
            f"o{i}",
            created=at(-i),
            **{**TASK, "rows": draw(st.sampled_from([30_000, 100_000, 300_000]))},
            **draw(st.sampled_from([{}, *(due(seconds) for seconds in (600, 1800, 3600, 7200, 18_000))])),
        )
        for i in range(draw(st.integers(1, 5)))
    ]


NODES = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=2).map(
    lambda sizes: [node(f"n{i}", gpus) for i, gpus in enumerate(sizes)]
)
BOOKED = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 4, 7]), st.sampled_from([None, 60, 1200, 9000])))


def in_time(spec: TaskOfferSpec, rules: PolicyView, count: int) -> bool:
    assert rules.spec is not None
    found = evaluate(spec.model_copy(update={"gpu_count": count}), rules.spec, "default")
    return not found.refusals and (spec.deadline is None or at(found.seconds) < spec.deadline)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CHOOSING), hurries(), NODES, BOOKED)
def test_whatever_is_free_what_starts_is_in_time_and_what_could_be_is_not_refused(
    rules: PolicyView, pending: list[OfferView], nodes: list[NodeView], held: list[tuple[int, int, int | None]]
) -> None:
    claims: list[Claim] = [claim(f"h{i}", f"n{at_node}", count) for i, (at_node, count, _) in enumerate(held)]
    ends = [Release(f"h{i}", f"n{n}", count, at(end), "lab") for i, (n, count, end) in enumerate(held) if end]
    for made in cycle(pending, policies=[rules], nodes=nodes, claims=claims, releases=ends).decisions:
        spec = made.offer.full_spec
        assert spec is not None
        if made.answer.admission is not None:
            assert in_time(spec, rules, made.answer.admission.assignments[0].count)
        elif made.answer.verdict.value == "Reject":
            assert not any(in_time(spec, rules, count) for count in (1, 2, 4, 8))
