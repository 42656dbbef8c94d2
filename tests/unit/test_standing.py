"""Offers that wait: put aside between cycles, and yet decided as if each cycle looked at every one of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import Object, make_node, make_offer, make_pod, make_policy, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.decision.cycle import Plan, plan
from taskoffer.decision.snapshot import Snapshot
from taskoffer.decision.verdict import Verdict
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
