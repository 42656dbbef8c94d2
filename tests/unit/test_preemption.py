"""Running jobs that save, stop and go on later so that an offer can start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_builders import (
    HIGH_TAKES,
    at,
    claim,
    claims_of,
    condition,
    cycle,
    node,
    offer,
    policy,
    releases_of,
    running,
    snapshot,
)
from taskoffer.api.base import rfc3339
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.cycle import Plan, plan
from taskoffer.decision.forecast import forecasts
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import open_ledger
from taskoffer.decision.placed_jobs import MoveRequest, Resumption, Running
from taskoffer.decision.preemption import Preemptions, goes_on
from taskoffer.decision.snapshot import OfferView, PolicyView, Shape, Snapshot, Waiting, end_of, shape_of, waiting

QUEUE = {"priorities": ["low", "middle", "high"]}
RULED = policy(queue=QUEUE, preemption=HIGH_TAKES)
HOURLY = {"gpuMemory": "80G", "duration": {"startSeconds": 0, "reserveSeconds": 0}}
fast = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def high(name: str = "new", gpus: int = 1, **fields: Any) -> OfferView:
    return offer(name, gpus=gpus, priority_class="high", **fields)


def world(
    offers: list[OfferView],
    jobs: list[Running],
    *,
    rules: PolicyView = RULED,
    resumptions: tuple[Resumption, ...] = (),
    nodes: list[Any] | None = None,
) -> Snapshot:
    return snapshot(
        offers,
        policies=[rules],
        nodes=nodes,
        claims=claims_of(jobs),
        releases=releases_of(jobs),
        running=jobs,
        resumptions=resumptions,
    )


def stopped(made: Plan) -> dict[str, str]:
    """Return for whom jobs are asked to stop."""
    return {it.key.name.removesuffix("-job"): it.preemptor.name for it in made.evictions}


def said(made: Plan) -> dict[str, str]:
    return {d.offer.key.name: d.answer.reason.value for d in made.decisions}


FULL = [running("a", 4), running("b", 2), running("c", 2)]

CHOICES: dict[str, tuple[list[OfferView], list[Running], dict[str, str]]] = {
    "one job that is large enough": ([high(gpus=1)], [running("a", 8)], {"a": "new"}),
    "as few jobs as needed": ([high(gpus=2)], FULL, {"b": "new"}),
    "several small ones where that frees enough": (
        [high(gpus=4)],
        [running("a", 2), running("b", 2), running("c", 2, level=1), running("d", 2, level=1)],
        {"a": "new", "b": "new"},
    ),
    "none while GPUs are free": ([high(gpus=1)], FULL[:2], {}),
    "what is free counts": ([high(gpus=2)], [running("a", 4), running("b", 2), running("c", 1)], {"c": "new"}),
    "not for an offer of the same priority": ([offer("new", gpus=1, priority_class="low")], FULL, {}),
    "not from a priority that no rule names": ([high(gpus=1)], [running("a", 8, level=1)], {}),
    "not from one that has just started": ([high(gpus=1)], [running("a", 8, started=-30)], {}),
    "not from one that has been stopped often enough": ([high(gpus=1)], [running("a", 8, preempted=3)], {}),
    "not from one that would be late": ([high(gpus=1)], [running("a", 8, deadline=at(3650))], {}),
    "from one without a deadline": ([high(gpus=1)], [running("a", 8, deadline=None)], {"a": "new"}),
    "nobody twice for two offers": (
        [high("one", gpus=2), high("two", gpus=2, created=at(1))],
        FULL,
        {"b": "one", "c": "two"},
    ),
    "whoever is asked already is not asked again": (
        [high(gpus=2, waits="WaitingForPreemption")],
        [running("a", 4), running("b", 4, leaving_for="new-uid", ends=60)],
        {},
    ),
    "whoever stops for an offer that is gone serves another": (
        [high(gpus=2)],
        [running("a", 4), running("b", 4, leaving_for="gone-uid", heir_is_gone=True, ends=60)],
        {},
    ),
    "whoever stops for another offer does not count": (
        [high("one", gpus=4), high("two", gpus=4, created=at(1))],
        [running("a", 4), running("b", 4, leaving_for="one-uid", ends=60)],
        {"a": "two"},
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_who_stops_for_whom(case: str) -> None:
    offers, jobs, wanted = CHOICES[case]
    made = plan(world([replace(o) for o in offers], jobs, rules=LONG_ENOUGH))
    assert stopped(made) == wanted


LONG_ENOUGH = policy(queue=QUEUE, preemption={**HIGH_TAKES, "resumeSeconds": 60}, estimation=HOURLY)


def test_of_two_nodes_the_one_is_chosen_where_less_is_lost() -> None:
    jobs = [running("a", 4, on="n1"), running("b", 4, on="n1"), running("c", 8, on="n2", score=1.0)]
    made = plan(world([high(gpus=2)], jobs, nodes=[node("n1"), node("n2")], rules=LONG_ENOUGH))
    assert stopped(made) == {"a": "new"}


@pytest.mark.parametrize(
    ("rules", "jobs", "wanted"),
    [
        (
            {"lanes": [{"name": "only", "gpus": 4, "rules": [{"gpusPerTask": 2}]}]},
            [running("a", 2, lane="only"), running("b", 2, lane="only")],
            {"a": "new"},
        ),
        ({"filters": {"maxConcurrentJobs": 2}}, [running("a", 2), running("b", 2)], {"a": "new"}),
        (
            {"namespaces": [{"name": "default", "gpus": 4}]},
            [running("a", 2, quota="default"), running("b", 2, quota="other")],
            {},
        ),
        (
            {"namespaces": [{"name": "default", "gpus": 3}]},
            [running("a", 2, quota="default"), running("b", 2, quota="other")],
            {"a": "new"},
        ),
    ],
    ids=["a lane", "a job slot", "a quota that is not reached", "a quota"],
)
def test_a_job_stops_for_a_limit_of_the_policy_too(
    rules: dict[str, Any], jobs: list[Running], wanted: dict[str, str]
) -> None:
    preempting = policy(queue=QUEUE, preemption={**HIGH_TAKES, "resumeSeconds": 60}, estimation=HOURLY, **rules)
    made = plan(world([high(gpus=None if "lanes" in rules else 2)], jobs, rules=preempting))
    assert stopped(made) == wanted


def test_without_preemption_in_the_policy_nobody_stops() -> None:
    made = plan(world([high(gpus=2)], FULL, rules=policy(queue=QUEUE)))
    assert made.evictions == ()
    assert said(made) == {"new": "WaitingForCapacity"}


def test_the_answer_names_who_stops_and_is_given_once() -> None:
    jobs = [running("a", 4), running("b", 4, leaving_for="new-uid", ends=60)]
    first = plan(world([high(gpus=2)], jobs, rules=LONG_ENOUGH))
    assert said(first) == {"new": "WaitingForPreemption"}
    assert "default/b (4) on node-a save, stop and go on later" in first.decisions[0].answer.message
    again = plan(world([high(gpus=2, waits="WaitingForPreemption")], jobs, rules=LONG_ENOUGH))
    assert again.decisions == ()
    assert again.waiting == 1


def test_what_is_free_beside_the_leaving_jobs_is_kept_for_the_offer() -> None:
    jobs = [running("a", 6), running("b", 1)]
    pending = [high("new", gpus=2), offer("low", gpus=1, priority_class="low", created=at(1))]
    made = plan(world(pending, jobs, rules=LONG_ENOUGH))
    assert said(made) == {"new": "WaitingForPreemption", "low": "WaitingForCapacity"}
    assert stopped(made) == {"b": "new"}


def test_a_cycle_comes_when_a_job_has_run_for_long_enough() -> None:
    shown = world([high(gpus=1, waits="WaitingForCapacity")], [running("a", 8, started=-500)])
    for made in (plan(shown), plan(standing(shown, {"new-uid"}))):
        assert stopped(made) == {}
        assert made.wake_at == at(100)


def leaving(job: Running, for_uid: str) -> Resumption:
    return goes_on(replace(job, leaving_for=for_uid), at(0), 60)


def test_the_offer_gets_what_was_freed_for_it_before_the_job_goes_on_and_before_others() -> None:
    gone, stays = running("a", 4), running("b", 4)
    pending = [high("early", gpus=4), high("new", gpus=4, created=at(1), waits="WaitingForPreemption")]
    made = plan(world(pending, [stays], resumptions=(leaving(gone, "new-uid"),)))
    assert said(made)["new"] == "Admitted"
    assert made.moves == ()


def test_a_job_goes_on_before_the_offers_of_its_priority_and_after_higher_ones() -> None:
    gone = leaving(running("a", 4), "started-uid")
    same = offer("same", gpus=4, priority_class="low")
    made = plan(world([same], [running("b", 4)], resumptions=(gone,)))
    assert [move.key.name for move in made.moves] == ["a-job"]
    assert said(made) == {"same": "WaitingForCapacity"}
    made = plan(world([same, high(gpus=4)], [running("b", 4)], resumptions=(gone,), rules=policy(queue=QUEUE)))
    assert made.moves == ()
    assert said(made) == {"same": "WaitingForCapacity", "new": "Admitted"}


def test_a_job_that_would_be_late_by_now_goes_on_only_with_what_nobody_waits_for() -> None:
    late = replace(leaving(running("a", 4, deadline=at(60)), "started-uid"))
    same = offer("same", gpus=4, priority_class="low")
    made = plan(world([same], [running("b", 4)], resumptions=(late,)))
    assert (said(made), made.moves) == ({"same": "Admitted"}, ())
    made = plan(world([same], [], resumptions=(late,)))
    assert said(made) == {"same": "Admitted"}
    assert [move.key.name for move in made.moves] == ["a-job"]


def test_a_job_that_goes_on_keeps_to_the_limits_of_the_policy() -> None:
    gone = leaving(running("a", 1), "started-uid")
    one = policy(filters={"maxConcurrentJobs": 1})
    assert plan(world([], [running("b", 1)], resumptions=(gone,), rules=one)).moves == ()
    assert len(plan(world([], [running("b", 1)], resumptions=(gone,))).moves) == 1


# By expected value

GAIN = {"gainFactor": "1", "minRunSeconds": 0, "resumeSeconds": 600}
TASK = {"model": "meta-llama/Llama-3.1-8B", "parameters": 8_030_000_000, "rows": 100_000, "hours": 5, "gpus": 1}
SOON = rfc3339(at(600))


LABELS = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def earning(**preemption: Any) -> PolicyView:
    return policy(preset="expected-value", preemption={**GAIN, **preemption})


@pytest.mark.parametrize(
    ("fields", "job", "rules", "wanted"),
    [
        ({"expires_at": SOON}, {}, {}, {"a": "new"}),
        ({}, {}, {}, {}),
        ({"expires_at": rfc3339(at(7200))}, {}, {}, {}),
        ({"expires_at": SOON}, {"score": 9.0}, {}, {}),
        ({"expires_at": SOON}, {"at_stake": 50.0, "deadline": at(10_500)}, {}, {}),
        ({"expires_at": SOON}, {"at_stake": 50.0, "deadline": at(40_000)}, {}, {"a": "new"}),
        ({"expires_at": SOON}, {}, {"gpuHourPrice": "30"}, {}),
        ({"expires_at": SOON}, {}, {"gainFactor": "99"}, {}),
    ],
    ids=[
        "it would be gone before the next end",
        "it waits for ever",
        "something ends in time",
        "the job earns more",
        "the job might be late and has much to lose",
        "the job has time",
        "the GPUs are worth more",
        "the policy wants more gain",
    ],
)
def test_by_value_a_job_stops_only_where_more_is_won_than_lost(
    fields: dict[str, Any], job: dict[str, Any], rules: dict[str, Any], wanted: dict[str, str]
) -> None:
    jobs = [running("a", 8, **{"score": 0.1, "deadline": at(30_000), **job})]
    h100 = node(labels=LABELS)
    made = plan(world([offer("new", **TASK, **fields)], jobs, rules=earning(**rules), nodes=[h100]))
    assert set(said(made).values()) <= {"WaitingForPreemption", "WaitingForCapacity"}
    assert stopped(made) == wanted


def test_by_value_an_offer_goes_on_waiting_for_those_who_stop_for_it() -> None:
    h100 = node(labels=LABELS)
    jobs = [running("a", 8, ends=60, score=0.1, leaving_for="new-uid")]
    waits = offer("new", **TASK, expires_at=SOON, waits="WaitingForPreemption")
    made = plan(world([waits], jobs, rules=earning(), nodes=[h100]))
    assert (made.decisions, made.evictions, made.waiting) == ((), (), 1)


LARGE = {"model": "meta-llama/Llama-3.1-70B", "parameters": 70_000_000_000, "rows": 20_000, "hours": 30, "gpus": 8}
KEEPS_FROM_8 = {"reserveFromGpus": 8}


@pytest.mark.parametrize(
    ("queue", "nodes", "wanted"),
    [(None, 1, {"a": "new"}), (KEEPS_FROM_8, 1, {}), (None, 2, {"a": "new"}), (KEEPS_FROM_8, 2, {"b": "new"})],
    ids=["nothing is kept", "the only node is kept", "the cheaper job stops", "the job on the other node stops"],
)
def test_nobody_stops_on_a_node_that_is_kept_for_another_offer(
    queue: dict[str, Any] | None, nodes: int, wanted: dict[str, str]
) -> None:
    # The new one would be done before the large one is to start, but the stopped job would not.
    jobs = [running("a", 8, on="n1", ends=9000, score=0.1, deadline=at(90_000))]
    jobs += [running("b", 8, on="n2", ends=9500, score=0.2, deadline=at(90_000))][: nodes - 1]
    h100 = [node(f"n{number}", labels=LABELS) for number in range(1, nodes + 1)]
    pending = [offer("large", **LARGE, created=at(-100_000)), offer("new", **TASK, expires_at=SOON)]
    made = plan(world(pending, jobs, rules=policy(preset="expected-value", preemption=GAIN, queue=queue), nodes=h100))
    assert said(made)["large"] == "WaitingForCapacity"
    assert stopped(made) == wanted


def test_behind_an_offer_that_keeps_the_only_node_nobody_is_looked_at_who_might_have_jobs_stopped() -> None:
    jobs = [running("a", 8, score=0.1, deadline=at(30_000))]
    small = [offer(f"s{n}", **TASK, expires_at=SOON, waits="WaitingForCapacity") for n in range(50)]
    shown = world(
        [offer("large", **LARGE, created=at(-100_000)), *small], jobs, rules=earning(), nodes=[node(labels=LABELS)]
    )
    with patch.object(Preemptions, "_would_miss", side_effect=Preemptions._would_miss) as asked:
        made = plan(standing(shown, {view.uid for view in small}))
    assert [call.args[2].key.name for call in asked.call_args_list] == ["large"]
    assert (stopped(made), made.waiting) == ({}, 51)


# Looking ahead


def test_the_predicted_start_takes_in_who_stops_and_who_goes_on() -> None:
    jobs = [running("a", 8, ends=7200, deadline=at(40_000))]
    waits = [high(gpus=8, hours=1), offer("low", gpus=8, priority_class="low", hours=1, created=at(5))]
    resources = [{"name": "nvidia.com/gpu", "counts": [1, 2, 4, 8]}]
    rules = policy(queue=QUEUE, preemption={**HIGH_TAKES, "resumeSeconds": 60}, resources=resources)
    found = forecasts(world(waits, jobs, rules=rules), waits)[0]
    assert found.starts["new-uid"] == at(60)
    # The stopped job goes on first, for the rest of its two hours.
    assert found.starts["low-uid"] == at(60 + 3600 + 7200 - 0 + 60)


# In every world


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[OfferView], list[Running]]:
    names = ["low", "middle", "high"]
    offers = [
        offer(
            f"o{i}",
            gpus=draw(st.sampled_from([1, 2, 4])),
            priority_class=draw(st.sampled_from(names)),
            hours=draw(st.sampled_from([0.5, 1, 3])),
            created=at(-draw(st.integers(0, 500))),
            expires_at=draw(st.sampled_from([None, rfc3339(at(900))])),
        )
        for i in range(draw(st.integers(0, 8)))
    ]
    jobs: list[Running] = []
    free = {"n1": 8, "n2": 4}
    for i in range(draw(st.integers(0, 8))):
        place, gpus = draw(st.sampled_from(["n1", "n2"])), draw(st.sampled_from([1, 2, 4]))
        if free[place] < gpus:
            continue
        free[place] -= gpus
        asked = draw(st.sampled_from([None, None, None, "o0-uid", "gone-uid"]))
        jobs.append(
            running(
                f"j{i}",
                gpus,
                on=place,
                level=draw(st.integers(0, 2)),
                started=-draw(st.sampled_from([60, 6000])),
                ends=draw(st.sampled_from([60, 3600, 9000])),
                deadline=draw(st.sampled_from([None, at(4000), at(200_000)])),
                preempted=draw(st.integers(0, 3)),
                leaving_for=asked,
                heir_is_gone=asked == "gone-uid" or (asked is not None and not offers),
            )
        )
    return offers, jobs


NODES = [node("n1", 8), node("n2", 4)]


@given(crowds())
@fast
def test_who_is_promised_gpus_gets_them_once_they_are_free_and_nothing_is_given_twice(
    crowd: tuple[list[OfferView], list[Running]],
) -> None:
    offers, jobs = crowd
    shown = world(offers, jobs, nodes=NODES)
    made = plan(shown)
    booked = open_ledger(shown.claims).booked
    for decision in made.decisions:
        for part in decision.answer.admission.assignments if decision.answer.admission else ():
            booked[part.node_name] = booked.get(part.node_name, 0) + part.count
    assert all(booked.get(one.name, 0) <= one.allocatable for one in NODES)
    holders = [it.holder for it in made.evictions]
    assert len(holders) == len(set(holders))
    by_holder = {job.holder: job for job in jobs}
    levels = {o.uid: ["low", "middle", "high"].index(o.spec.priority_class_name) for o in offers}  # type: ignore[union-attr,arg-type]
    for it in made.evictions:
        job = by_holder[it.holder]
        assert (levels[it.preemptor_uid], job.level) == (2, 0)
        assert job.leaving_for is None
        assert job.preempted < 3
    waiting = {o.uid for o in offers} - {d.offer.uid for d in made.decisions if d.answer.verdict.value != "Wait"}
    promised = {d.offer.uid for d in made.decisions if d.answer.reason.value == "WaitingForPreemption"}
    assert {it.preemptor_uid for it in made.evictions} <= promised
    # All that were asked have stopped: nobody that was promised something waits any longer.
    gone = {it.holder: it.preemptor_uid for it in made.evictions}
    gone |= {job.holder: job.leaving_for for job in jobs if job.leaving_for is not None}
    started = [
        running(
            d.offer.key.name,
            d.answer.admission.assignments[0].count,
            on=d.answer.admission.assignments[0].node_name,
            level=2,
        )
        for d in made.decisions
        if d.answer.admission is not None
    ]
    left = [job for job in jobs if job.holder not in gone] + started
    back = tuple(leaving(by_holder[holder], heir) for holder, heir in gone.items())
    rest = [o for o in offers if o.uid in waiting]
    then = plan(world(rest, left, nodes=NODES, resumptions=back))
    admitted = {d.offer.uid for d in then.decisions if d.answer.admission is not None}
    assert promised <= admitted


@given(crowds(), st.sampled_from([RULED, None]))
@fast
def test_what_was_tried_in_vain_would_be_tried_in_vain_again(
    crowd: tuple[list[OfferView], list[Running]], rules: PolicyView | None
) -> None:
    offers, jobs = crowd
    if rules is None:
        value = {"expectedValue": {}, "terms": None}
        rules = policy(queue=QUEUE, scoring=value, estimation=HOURLY, preemption={"gainFactor": "1"})
    shown = world(offers, jobs, nodes=NODES, rules=rules)
    with pytest.MonkeyPatch.context() as patch:
        made = plan(shown)
        patch.setattr(Preemptions, "_tried_in_vain", lambda *_: False)
        assert plan(shown) == made


KEEPING: dict[str, Any] = {"queue": {**QUEUE, "reserveFromGpus": 2}, "estimation": HOURLY}
KEPT = [
    policy(**KEEPING, preemption=HIGH_TAKES),
    policy(**KEEPING, preemption={"gainFactor": "1"}, scoring={"expectedValue": {}, "terms": None}),
]


def standing(shown: Snapshot, uids: set[str]) -> Snapshot:
    """Return the same snapshot with these offers put aside, as they are between cycles while they wait for capacity."""
    groups: dict[Shape, list[Waiting]] = {}
    for view in shown.offers:
        evaluation = shown.evaluations[view.uid, "lab"]
        if view.uid in uids and not evaluation.refusals:
            shape = shape_of("lab", evaluation, "WaitingForCapacity")
            groups.setdefault(shape, []).append(waiting(view, evaluation, shown.now))
    aside = {place.offer.uid for group in groups.values() for place in group}
    ends = [end_of(place.offer, place.evaluation) for group in groups.values() for place in group]
    return replace(
        shown,
        offers=[view for view in shown.offers if view.uid not in aside],
        standing={shape: sorted(group) for shape, group in groups.items()},
        standing_end=min((end for end in ends if end is not None), default=None),
    )


@given(crowds(), st.sampled_from(KEPT), st.sets(st.integers(0, 7)))
@fast
def test_where_nodes_are_kept_offers_that_stand_are_decided_as_if_each_were_looked_at(
    crowd: tuple[list[OfferView], list[Running]], rules: PolicyView, aside: set[int]
) -> None:
    offers, jobs = crowd
    waits = condition("Admitted", False, "WaitingForCapacity")
    offers = [replace(view, conditions=(waits,), observed_generation=1) for view in offers]
    shown = world(offers, jobs, nodes=NODES, rules=rules)
    uids = {f"o{number}-uid" for number in aside} - shown.heirs
    each, made = plan(shown), plan(standing(shown, uids))
    assert {d.offer.uid: d for d in made.decisions} == {d.offer.uid: d for d in each.decisions}
    assert (made.evictions, made.waiting) == (each.evictions, each.waiting)
    # One that has just been admitted may still wake the next cycle; one that waits must.
    assert each.wake_at is None or (made.wake_at is not None and made.wake_at <= each.wake_at)


def test_an_offer_that_stands_with_its_wait_is_looked_at_when_jobs_may_be_stopped_for_it() -> None:
    # tests/unit/test_standing.py compares the two ways of deciding in random worlds.
    waits = high(gpus=1, waits="WaitingForCapacity")
    assert cycle([waits], policies=[LONG_ENOUGH], claims=claims_of(FULL), running=FULL).evictions


LAST = Assignment(node_name="node-a", resource_name="nvidia.com/gpu", count=4)


@pytest.mark.parametrize(("busy", "wanted"), [(4, [LAST]), (5, [])], ids=["its node has room", "its node is taken"])
def test_without_its_policy_a_stopped_job_goes_on_where_it_was_or_not_at_all(busy: int, wanted: list[Any]) -> None:
    gone = replace(leaving(running("a", 4), "started-uid"), policy="deleted", last=LAST)
    made = plan(world([], [running("b", busy)], resumptions=(gone,), nodes=[node(), node("node-b")]))
    assert [part for move in made.moves for part in move.assignments] == wanted


@pytest.mark.parametrize(("avoids", "wanted"), [((), [LAST]), (("node-a",), [])])
def test_without_its_policy_an_attempt_that_must_move_has_its_own_place_alone(
    avoids: tuple[str, ...], wanted: list[Any]
) -> None:
    request = MoveRequest(OfferKey("default", "a-job"), "a-uid", "deleted", 4, None, frozenset(avoids), last=LAST)
    booked = [claim("a-uid", count=4), claim("b-uid", count=4)]
    made = cycle([], moves=[request], claims=booked, nodes=[node(), node("node-b")])
    assert [part for move in made.moves for part in move.assignments] == wanted


def test_what_a_job_without_its_policy_goes_on_with_is_given_to_nobody_else() -> None:
    size = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}
    rules = policy(queue=QUEUE, estimation=HOURLY, size_classes=[size], gpu_choice="EarliestEnd")
    large = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "rows": 300_000}
    # The one GPU that is free is too slow for the first, and then the job takes it: the last must not have it too.
    first = offer("first", **large, spec={"deadline": rfc3339(at(5000))}, priority_class="high")
    last = offer("last", **large, gpus=1, priority_class="low")
    one = Assignment(node_name="node-a", resource_name="nvidia.com/gpu", count=1)
    gone = replace(leaving(running("a", 1, level=1), "started-uid"), policy="deleted", last=one)
    made = plan(world([first, last], [running("b", 7, ends=9000)], resumptions=(gone,), rules=rules))
    assert [move.key.name for move in made.moves] == ["a-job"]
    assert said(made) == {"first": "WaitingForCapacity", "last": "WaitingForCapacity"}
