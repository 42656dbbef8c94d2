"""Offers that wait: put aside between cycles, and yet decided as if each cycle looked at every one of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import Object, make_node, make_offer, make_pod, make_policy, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.decision.cycle import Plan, _Cycle, plan
from taskoffer.decision.snapshot import Snapshot
from taskoffer.decision.verdict import Verdict
from taskoffer.reconcile.views import OfferState
from taskoffer.reconcile.world import World
from taskoffer.render.offers import decision_patch

LANES = [
    {"name": "one", "gpus": 1, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}]},
    {"name": "rest", "gpus": 8, "rules": [{"gpusPerTask": 2}]},
]
BORROWING = [{**LANES[0], "borrowFrom": ["rest"]}, {**LANES[1], "gpus": 4}]
FLOOR = [{"name": "InstructText", "accepted": True, "weight": "0.35", "successRate": "0.9", "dailyFloor": 2}]
PREDICTING = {"gpuMemory": "80G", "duration": {"startSeconds": 40, "reserveSeconds": 20}}
"""Every task takes a minute, so that an offer with a deadline has a last start one minute before it."""
POLICIES: list[Object | None] = [
    make_policy(name="lab"),
    make_policy(name="lab", estimation=PREDICTING),
    make_policy(name="lab", lanes=LANES),
    make_policy(name="lab", filters={"maxConcurrentJobs": 2}),
    make_policy(name="lab", filters={"onFull": "Reject"}),
    make_policy(name="lab", filters={"offerTtlSeconds": 60}),
    make_policy(name="lab", estimation=PREDICTING, filters={"maxConcurrentJobs": 2}),
    make_policy(name="lab", default=False),
    make_policy(name="lab", lanes=BORROWING),
    make_policy(name="lab", queue={"priorities": ["low", "mid", "high"], "raiseAfterSeconds": 70}),
    make_policy(name="lab", queue={"reserveFromGpus": 4}),
    make_policy(name="lab", queue={"reserveFromGpus": 2}, estimation=PREDICTING, lanes=BORROWING),
    make_policy(name="lab", namespaces=[{"name": "default", "gpus": 4, "highestPriority": None}]),
    make_policy(name="lab", gpu_choice="EarliestEnd", estimation=PREDICTING),
    make_policy(
        name="lab",
        scoring={"terms": None, "expectedValue": {"urgencySeconds": 60, "spareShare": "0.5"}},
        gpu_choice="MostValue",
        filters={"minScore": "0"},
        estimation=PREDICTING,
    ),
    make_policy(name="lab", filters={"minScore": "0.8", "floorMinScore": "0.5"}, task_types=FLOOR),
    None,
]
OFFERS = st.fixed_dictionaries(
    {
        "parameters": st.sampled_from([500_000, 2_000_000, 5_000_000]),
        "task_id": st.sampled_from(["t1", "t2", None, None, None]),
        "active": st.sampled_from([None, None, None, False]),
        "expires_at": st.sampled_from([None, None, rfc3339(at(50)), rfc3339(at(150))]),
        "spec": st.sampled_from([{}, {}, {"deadline": rfc3339(at(100))}, {"deadline": rfc3339(at(200))}]),
        "rows": st.sampled_from([None, 100, 200_000_000]),
        "priority_class": st.sampled_from([None, "low", "high"]),
        "policy": st.sampled_from([None, None, "lab", "other", "missing"]),
        "model": st.sampled_from(["x/llama", "x/mistral", "x/phi-4"]),
    }
)
NAMES = st.sampled_from([f"o{number}" for number in range(6)])
FATES = st.lists(st.sampled_from(["written", "lost", "refused"]), max_size=6)
STEPS = st.one_of(
    st.tuples(st.just("offer"), NAMES, OFFERS),
    st.tuples(st.just("offer"), NAMES, OFFERS),
    st.tuples(st.just("gone"), NAMES, st.none()),
    st.tuples(st.just("node"), st.integers(0, 8), st.booleans()),
    st.tuples(st.just("policy"), st.sampled_from(POLICIES), st.none()),
    st.tuples(st.just("pod"), st.integers(0, 4), st.none()),
    st.tuples(st.just("later"), st.integers(1, 100), st.none()),
    *[st.tuples(st.just("cycle"), st.lists(st.sampled_from(["written", "lost", "refused"]), max_size=6), st.none())]
    * 4,
)


@dataclass
class Cluster:
    """A world that is told of every change, and what is stored at the moment."""

    world: World = field(default_factory=World)
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    now: datetime = NOW
    versions: Any = field(default_factory=lambda: itertools.count(1))

    def put(self, kind: str, uid: str, made: Object | None, **metadata: Any) -> None:
        version = str(next(self.versions))
        if made is None:
            before = self.objects.pop((kind, uid), None)
            if before is not None:
                raw = {**before, "metadata": {**before["metadata"], "resourceVersion": version}}
                getattr(self.world, kind).observe("DELETED", raw)
            return
        raw = stored(made, uid=uid, resource_version=version, **metadata)
        self.objects[kind, uid] = raw
        getattr(self.world, kind).observe("MODIFIED", raw)

    def fresh(self) -> World:
        """Return a world that knows the same from one list."""
        made = World()
        for kind in ("nodes", "pods", "policies", "offers"):
            listed = [raw for (of, _), raw in self.objects.items() if of == kind]
            getattr(made, kind).replace(listed, str(next(self.versions)))
        made.in_flight |= self.world.in_flight
        made.held_back |= self.world.held_back
        made.assumed |= self.world.assumed
        for uid, entry in self.world.by_state[OfferState.HOLDING].items():
            # Who has not admitted an offer predicts it anew, by a policy that may have changed since.
            anew = made.offers.get(uid)
            if anew is not None and entry.admission is not None and entry.evaluation is not None:
                count = sum(part.count for part in entry.admission.assignments)
                anew.occupies = entry.evaluation.made.seconds_on(count)
        return made


def one_by_one(made: Snapshot) -> Snapshot:
    """Return the same snapshot with no offer put aside."""
    offers, evaluations = list(made.offers), dict(made.evaluations)
    for shape, group in made.standing.items():
        for *_, offer, evaluation in group:
            offers.append(offer)
            evaluations[offer.uid, shape.policy] = evaluation
    return replace(made, offers=offers, evaluations=evaluations, standing={}, standing_end=None)


def decided(made: Plan) -> dict[str, object]:
    return {d.offer.uid: (d.offer.resource_version, d.answer, d.policy) for d in made.decisions}


def run_cycle(cluster: Cluster, fates: list[str]) -> None:
    """Decide both ways and compare; then let the answers be written, get lost, or be refused for good."""
    world = cluster.world
    made = plan(world.snapshot(cluster.now))
    expected = plan(one_by_one(cluster.fresh().snapshot(cluster.now)))
    assert decided(made) == decided(expected)
    assert made.waiting == expected.waiting
    # An offer that has just been admitted may still wake the next cycle; one that waits must.
    assert made.wake_at == expected.wake_at or (
        made.wake_at is not None and (expected.wake_at is None or made.wake_at < expected.wake_at) and made.decisions
    )
    for decision in made.decisions:
        world.send(decision.offer.uid, decision.answer.admission)
    for decision, fate in itertools.zip_longest(made.decisions, fates[: len(made.decisions)], fillvalue="written"):
        assert not isinstance(decision, str)
        uid = decision.offer.uid
        if fate == "written":
            before = cluster.objects["offers", uid]
            status = decision_patch(decision, cluster.now)["status"]
            answered = {**before, "status": {**before.get("status", {}), **status}}
            cluster.put("offers", uid, answered, generation=before["metadata"]["generation"])
        else:
            world.assumed.pop(uid, None)
            if fate == "refused" and decision.answer.verdict is not Verdict.ADMIT:
                world.held_back.add(uid)
        world.in_flight.discard(uid)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_each_cycle_decides_as_if_it_looked_at_every_offer(steps: list[tuple[str, Any, Any]]) -> None:
    cluster = Cluster()
    cluster.put("nodes", "node-a", make_node("node-a", gpus=2))
    cluster.put("policies", "lab", make_policy(name="lab", estimation=PREDICTING))
    cluster.put("policies", "other", make_policy(name="other", default=False))
    for number in range(3):
        due = {"deadline": rfc3339(at(100 + 20 * number))}
        cluster.put("offers", f"start-{number}", make_offer(name=f"start-{number}", parameters=2_000_000, spec=due))
    for what, first, second in steps:
        if what == "offer":
            before = cluster.objects.get(("offers", first))
            generation = before["metadata"]["generation"] + 1 if before else 1
            made = make_offer(name=first, **second)
            if before is not None and "status" in before:
                made["status"] = before["status"]
            cluster.put("offers", first, made, generation=generation)
        elif what == "gone":
            cluster.put("offers", first, None)
        elif what == "node":
            cluster.put("nodes", "node-a", make_node("node-a", gpus=first, ready=second))
        elif what == "policy":
            # One that was deleted and made again would have another UID; here each version has another generation.
            generation = next(cluster.versions)
            cluster.put("policies", "lab", first, **({} if first is None else {"generation": generation}))
        elif what == "pod":
            cluster.put("pods", "foreign", make_pod("foreign", gpus=first, node="node-a") if first else None)
        elif what == "later":
            cluster.now = max(cluster.now, at(first))
        else:
            run_cycle(cluster, first)
    run_cycle(cluster, [])
    run_cycle(cluster, [])


ONE_SIZE = {
    "name": "All",
    "minParameters": 0,
    "gpus": 1,
    "sizeEfficiency": "1",
    "lora": {"r": 64, "loraAlpha": 128},
    "train": {"maxLength": 2048, "perDeviceTrainBatchSize": 4, "numTrainEpochs": 3},
}


def hurried(slots: int | None = None, choice: str = "EarliestEnd", **fields: Any) -> Object:
    """Return a policy under which offers may choose their count, as their deadlines allow."""
    return make_policy(
        name="lab",
        gpu_choice=choice,
        size_classes=[ONE_SIZE],
        resources=[{"name": "nvidia.com/gpu", "counts": [1, 2, 4, 8]}],
        filters={"maxTimeLimitSeconds": 100_000, "minScore": "0", "maxConcurrentJobs": slots},
        estimation={"gpuMemory": "80G", "duration": {"tokensPerRow": 1024, "startSeconds": 10, "reserveSeconds": 0}},
        **fields,
    )


SPARING = {"terms": None, "expectedValue": {"urgencySeconds": 600, "spareShare": "0.75"}}
HURRIED = [
    hurried(),
    hurried(slots=2),
    hurried(queue={"reserveFromGpus": 8}),
    hurried(queue={"reserveFromGpus": 2, "priorities": ["low", "high"]}),
    hurried(namespaces=[{"name": "default", "gpus": 4, "highestPriority": None}]),
    hurried(choice="FewestGpuHours"),
    hurried(choice="FewestGpuHours", queue={"reserveFromGpus": 2, "priorities": ["low", "high"]}),
    hurried(choice="MostValue", scoring={"terms": None, "expectedValue": {"urgencySeconds": 600}}),
    hurried(choice="MostValue", scoring=SPARING, queue={"reserveFromGpus": 4}),
    hurried(slots=3, choice="MostValue", scoring=SPARING),
    hurried(choice="MostValue", scoring=SPARING, namespaces=[{"name": "default", "gpus": 4, "highestPriority": None}]),
]
LLAMA: dict[str, Any] = {"model": "meta-llama/Meta-Llama-3-8B", "parameters": 8_030_000_000, "hours": 20}
"""10,000 rows take 77 minutes on one GPU and 10 on eight, so that a deadline decides the count."""
HURRIES = st.fixed_dictionaries(
    {
        "rows": st.sampled_from([8_000, 10_000, 12_000]),
        "hours": st.sampled_from([1, 20]),
        "spec": st.sampled_from([{"deadline": rfc3339(at(seconds))} for seconds in (1000, 1800, 3000, 6000, 9000)]),
        "gpus": st.sampled_from([None, None, None, None, 1, 8]),
        "priority_class": st.sampled_from([None, None, "high"]),
    }
)
NODES = ["node-a", "node-b"]
HURRIED_STEPS = st.one_of(
    st.tuples(st.just("offers"), st.lists(st.tuples(st.integers(0, 8), HURRIES), max_size=9)),
    st.tuples(st.just("pod"), st.tuples(st.sampled_from(NODES), st.integers(0, 8))),
    st.tuples(st.just("ended"), st.integers(0, 8)),
    st.tuples(st.just("later"), st.integers(1, 900)),
    *[st.tuples(st.just("cycle"), FATES)] * 4,
)


@given(st.sampled_from(HURRIED), st.integers(0, 8), st.integers(0, 8), st.lists(HURRIED_STEPS, max_size=25))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_those_for_whom_no_free_count_is_in_time_are_decided_as_if_each_were_looked_at(
    rules: Object, here: int, there: int, steps: list[tuple[str, Any]]
) -> None:
    cluster = Cluster()
    cluster.put("policies", "lab", rules)
    for name, taken in zip(NODES, (here, there), strict=True):
        cluster.put("nodes", name, make_node(name, gpus=8))
        cluster.put("pods", f"on-{name}", make_pod(f"on-{name}", gpus=taken, node=name) if taken else None)
    for what, value in steps:
        if what == "offers":
            for number, fields in value:
                made = make_offer(name=f"o{number}", **{**LLAMA, **fields})
                if ("offers", f"o{number}") not in cluster.objects:
                    cluster.put("offers", f"o{number}", made, generation=1)
        elif what == "pod":
            name, taken = value
            cluster.put("pods", f"on-{name}", make_pod(f"on-{name}", gpus=taken, node=name) if taken else None)
        elif what == "ended":
            cluster.put("offers", f"o{value}", None)
        elif what == "later":
            cluster.now += timedelta(seconds=value)
        else:
            run_cycle(cluster, value)
    run_cycle(cluster, [])
    run_cycle(cluster, [])


def in_a_hurry(count: int, rules: Object | None = None) -> Cluster:
    """Return a cluster of which one GPU is free, with offers that are in time on more than that only."""
    cluster = Cluster()
    cluster.put("nodes", "node-a", make_node("node-a", gpus=8))
    cluster.put("pods", "foreign", make_pod("foreign", gpus=7, node="node-a"))
    cluster.put("policies", "lab", rules or hurried())
    for number in range(count):
        due = {"deadline": rfc3339(at(3600))}
        cluster.put("offers", f"o{number}", make_offer(name=f"o{number}", **LLAMA, rows=10_000, spec=due))
    return cluster


def test_a_queue_that_is_too_late_for_what_is_free_is_asked_once_and_not_offer_by_offer() -> None:
    cluster = in_a_hurry(50)
    run_cycle(cluster, [])
    made = cluster.world.snapshot(cluster.now)
    assert made.offers == []
    found = [(shape.reason, shape.counts, shape.in_time, len(group)) for shape, group in made.standing.items()]
    assert found == [("WaitingForCapacity", (1, 2, 4, 8), (2, 4, 8), 50)]
    with patch.object(_Cycle, "_choose", side_effect=AssertionError("an offer was looked at")):
        assert plan(made).waiting == 50


def test_a_count_that_becomes_too_slow_for_offers_that_stand_is_taken_out_of_their_choice() -> None:
    cluster = in_a_hurry(5)
    run_cycle(cluster, [])
    cluster.put("pods", "foreign", make_pod("foreign", gpus=6, node="node-a"))
    cluster.now = at(2400)
    made = cluster.world.snapshot(cluster.now)
    assert [(shape.in_time, len(group)) for shape, group in made.standing.items()] == [((4, 8), 5)]
    run_cycle(cluster, [])
    assert plan(cluster.world.snapshot(cluster.now)).decisions == ()


def test_those_that_slept_through_the_cycle_are_looked_at_once_a_count_in_time_is_free() -> None:
    cluster = in_a_hurry(5)
    run_cycle(cluster, [])
    cluster.put("pods", "foreign", make_pod("foreign", gpus=6, node="node-a"))
    made = plan(cluster.world.snapshot(cluster.now))
    assert [
        (d.answer.verdict, d.answer.admission.assignments[0].count) for d in made.decisions if d.answer.admission
    ] == [(Verdict.ADMIT, 2)]


def test_those_that_come_after_what_has_changed_the_room_are_woken_up() -> None:
    cluster = in_a_hurry(5, hurried(slots=1))
    run_cycle(cluster, [])
    assert {len(group) for group in cluster.world.snapshot(cluster.now).standing.values()} == {5}
    between = make_offer(name="o2-and-a-half", gpus=1, rows=100, **LLAMA)
    cluster.put("offers", "o2-and-a-half", between)
    made = plan(cluster.world.snapshot(cluster.now))
    assert {d.offer.key.name: d.answer.reason.value for d in made.decisions} == {
        "o2-and-a-half": "Admitted",
        "o3": "WaitingForJobSlot",
        "o4": "WaitingForJobSlot",
    }
    assert made.waiting == 5
    run_cycle(cluster, [])


def told(cluster: Cluster) -> dict[str, str]:
    """Decide both ways and return the new reasons by offer."""
    made = plan(cluster.world.snapshot(cluster.now))
    run_cycle(cluster, [])
    return {d.offer.key.name: d.answer.reason.value for d in made.decisions}


def test_those_that_are_too_late_for_what_is_free_wait_for_more_once_it_is_predicted_to_be_free() -> None:
    cluster = in_a_hurry(2)
    run_cycle(cluster, [])
    cluster.put("pods", "foreign", make_pod("foreign", gpus=3, node="node-a"))
    cluster.put("offers", "a1", make_offer(name="a1", gpus=4, rows=100, **LLAMA))
    assert told(cluster) == {"a1": "Admitted", "o0": "WaitingForEarlierEnd"}


def test_those_that_are_too_late_for_what_is_free_are_told_what_else_they_wait_for() -> None:
    cluster = in_a_hurry(2, hurried(namespaces=[{"name": "default", "gpus": 4, "highestPriority": None}]))
    cluster.put("pods", "foreign", make_pod("foreign", gpus=5, node="node-a"))
    cluster.put("offers", "a1", make_offer(name="a1", gpus=2, rows=100_000, **LLAMA))
    assert told(cluster) == {"a1": "Admitted", "o0": "WaitingForCapacity", "o1": "WaitingForCapacity"}
    cluster.put("pods", "foreign", make_pod("foreign", gpus=4, node="node-a"))
    cluster.put("offers", "a2", make_offer(name="a2", gpus=1, rows=100_000, **LLAMA))
    assert told(cluster) == {"a2": "Admitted", "o0": "WaitingForQuota", "o1": "WaitingForQuota"}
    for name in ("a1", "a2"):
        cluster.put("offers", name, None)
    cluster.put("pods", "foreign", make_pod("foreign", gpus=7, node="node-a"))
    assert told(cluster) == {"o0": "WaitingForCapacity", "o1": "WaitingForCapacity"}


def test_one_whose_smallest_count_is_not_free_keeps_its_node_though_it_is_too_late_for_that_count() -> None:
    cluster = in_a_hurry(0, hurried(queue={"reserveFromGpus": 2}))
    cluster.put("pods", "foreign", make_pod("foreign", gpus=6, node="node-a"))
    cluster.put("offers", "a1", make_offer(name="a1", gpus=1, rows=2_500, **LLAMA))
    assert told(cluster) == {"a1": "Admitted"}
    due = {"spec": {"deadline": rfc3339(at(2000))}, "hours": 1}
    cluster.put("offers", "o0", make_offer(name="o0", rows=10_000, **{**LLAMA, **due}))
    assert told(cluster) == {"o0": "WaitingForCapacity"}
    assert [shape.in_time for shape in cluster.world.snapshot(cluster.now).standing] == [(4, 8)]
    cluster.put("offers", "z1", make_offer(name="z1", gpus=1, rows=100_000, **LLAMA))
    assert told(cluster) == {"z1": "WaitingBehindReservation"}


def test_a_kept_node_that_is_lent_to_short_tasks_only_is_no_answer_for_the_whole_group() -> None:
    cluster = in_a_hurry(0, hurried(queue={"reserveFromGpus": 4, "priorities": ["low", "high"]}))
    cluster.put("pods", "foreign", make_pod("foreign", gpus=4, node="node-a"))
    for name, gpus, rows in (("on-two", 2, 20_000), ("on-one", 1, 10_000)):
        cluster.put("offers", name, make_offer(name=name, gpus=gpus, rows=rows, priority_class="high", **LLAMA))
    assert told(cluster) == {"on-two": "Admitted", "on-one": "Admitted"}
    for name, rows in (("short", 8_000), ("very-long", 12_000)):
        due = {"deadline": rfc3339(at(3600))}
        cluster.put("offers", name, make_offer(name=name, rows=rows, spec=due, **LLAMA))
    assert told(cluster) == {"short": "WaitingForCapacity", "very-long": "WaitingForCapacity"}
    assert [len(group) for group in cluster.world.snapshot(cluster.now).standing.values()] == [2]
    cluster.put("offers", "large", make_offer(name="large", gpus=4, rows=100, priority_class="high", **LLAMA))
    assert told(cluster) == {"large": "WaitingForCapacity", "very-long": "WaitingBehindReservation"}


def test_those_that_prefer_a_count_stand_for_the_next_one_once_theirs_has_become_too_slow() -> None:
    cluster = in_a_hurry(5, hurried(choice="FewestGpuHours"))
    cluster.put("pods", "foreign", make_pod("foreign", gpus=8, node="node-a"))
    run_cycle(cluster, [])
    made = cluster.world.snapshot(cluster.now)
    assert [(shape.gpus, len(group)) for shape, group in made.standing.items()] == [(2, 5)]
    woken = plan(made).wake_at
    assert woken is not None
    cluster.now = woken
    cluster.put("pods", "foreign", make_pod("foreign", gpus=5, node="node-a"))
    made = cluster.world.snapshot(cluster.now)
    assert [(shape.gpus, len(group)) for shape, group in made.standing.items()] == [(4, 5)]
    assert plan(made).decisions == ()
    run_cycle(cluster, [])
    cluster.put("pods", "foreign", make_pod("foreign", gpus=4, node="node-a"))
    assert told(cluster) == {"o0": "Admitted"}


def test_a_long_queue_is_asked_once_and_not_offer_by_offer() -> None:
    cluster = Cluster()
    cluster.put("nodes", "node-a", make_node("node-a", gpus=1))
    cluster.put("policies", "lab", make_policy(name="lab"))
    for number in range(50):
        cluster.put("offers", f"o{number}", make_offer(name=f"o{number}", parameters=500_000))
    run_cycle(cluster, [])
    made = cluster.world.snapshot(cluster.now)
    assert made.offers == []
    assert [(shape.reason, len(group)) for shape, group in made.standing.items()] == [("WaitingForCapacity", 49)]
    assert plan(made).waiting == 49


def test_an_offer_that_waits_is_looked_at_again_at_its_last_start() -> None:
    cluster = Cluster()
    cluster.put("policies", "lab", make_policy(name="lab", estimation=PREDICTING))
    due = {"deadline": rfc3339(at(100))}
    cluster.put("offers", "late", make_offer(name="late", parameters=500_000, spec=due))
    run_cycle(cluster, [])
    cluster.now = at(39)
    run_cycle(cluster, [])
    assert len(cluster.world.standing) == 1
    assert at(39) < (plan(cluster.world.snapshot(cluster.now)).wake_at or NOW) < at(41)
    cluster.now = at(41)
    made = plan(cluster.world.snapshot(cluster.now))
    assert [d.answer.reason.value for d in made.decisions] == ["CannotFinishInTime"]
