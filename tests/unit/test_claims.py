"""What stored objects claim of a node: kept up to date with every change, and the same as after a fresh list."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    make_admission,
    make_condition,
    make_job,
    make_node,
    make_offer,
    make_pod,
    make_policy,
    make_training_job,
    stored,
)
from taskoffer.reconcile.world import World

GPU = "nvidia.com/gpu"
OFFER, JOB = "offer-uid", "a-offer-ui"
LABELS = {"taskoffer.dev/offer-uid": OFFER, "taskoffer.dev/job": JOB}
ATTEMPT = {"jobName": f"{JOB}-1", "createdAt": "2026-01-31T12:00:00Z"}


def admission(node: str) -> dict[str, Any]:
    return make_admission(gpus=2, node=node, job=JOB)


def attempts(*nodes: str) -> dict[str, Any]:
    return {
        "attempts": [
            ATTEMPT | {"jobName": f"{JOB}-{number}", "assignments": admission(node)["assignments"]}
            for number, node in enumerate(nodes, 1)
        ]
    }


def training_job(status: dict[str, Any] | None = None) -> dict[str, Any]:
    made = make_training_job(name=JOB, offer="a", offer_uid=OFFER, status=status)
    owner = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "TaskOffer", "name": "a", "uid": OFFER, "controller": True}
    made["metadata"]["ownerReferences"] = [owner]
    return made


# Each state of each object, as (store, raw object without its version). The same UID is the same object.
ADMITTED = {"admission": admission("node-a"), "conditions": [make_condition("Admitted", True, "Admitted")]}
STATES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "offers": [
        (make_offer(name="a"), OFFER),
        (make_offer(name="a", status=ADMITTED), OFFER),
        (
            make_offer(name="a", status=ADMITTED | {"conditions": [make_condition("Finished", True, "Succeeded")]}),
            OFFER,
        ),
    ],
    "jobs": [
        (training_job(), "job-uid"),
        (training_job(attempts("node-a")), "job-uid"),
        (training_job(attempts("node-a", "node-b")), "job-uid"),
    ],
    "batch_jobs": [
        (make_job(training_job=JOB, offer_uid=OFFER, gpus=2), "batch-uid"),
        (
            make_job(
                training_job=JOB, offer_uid=OFFER, gpus=2, status={"conditions": [{"type": "Failed", "status": "True"}]}
            ),
            "batch-uid",
        ),
        (make_job(training_job=JOB, offer_uid=OFFER, gpus=2, attempt=2, node="node-b"), "batch2-uid"),
    ],
    "pods": [
        (make_pod("p", gpus=2, labels=LABELS, job_uid="batch-uid"), "pod-uid"),
        (make_pod("p", gpus=2, labels=LABELS, phase="Succeeded", job_uid="batch-uid"), "pod-uid"),
        (make_pod("foreign", gpus=1, node="node-b"), "foreign-uid"),
        (make_pod("unbound", gpus=1, node=None), "unbound-uid"),
    ],
}
CHANGES = [(kind, number) for kind, states in STATES.items() for number in range(len(states))]


def claims(world: World, resource: str = GPU) -> Counter[tuple[str, str, int, str]]:
    return Counter((c.holder, c.node, c.count, c.source) for c in world.claims(resource))


@given(
    st.lists(
        st.tuples(st.sampled_from(CHANGES), st.sampled_from(["MODIFIED", "MODIFIED", "DELETED", "ask"])), max_size=24
    )
)
@settings(max_examples=300, deadline=None)
def test_after_any_changes_the_claims_are_those_of_a_fresh_list(
    changes: list[tuple[tuple[str, int], str]],
) -> None:
    seen, now = World(), {}
    seen.policies.replace([stored(make_policy(), uid="policy")], "1")
    for version, ((kind, number), what) in enumerate(changes, start=2):
        if what == "ask":
            claims(seen)
            continue
        made, uid = STATES[kind][number]
        raw = stored(made, uid=uid, resource_version=str(version))
        getattr(seen, kind).observe(what, raw)
        now[kind, uid] = None if what == "DELETED" else raw
    fresh = World()
    for kind in STATES:
        listed = [raw for (of, _), raw in now.items() if of == kind and raw is not None]
        getattr(fresh, kind).replace(listed, str(len(changes) + 2))
    assert claims(seen) == claims(fresh)


@pytest.mark.parametrize(
    ("kind", "number", "expected"),
    [
        ("offers", 1, {(OFFER, "node-a", 2, "admission")}),
        ("offers", 2, set()),
        ("batch_jobs", 0, {(OFFER, "node-a", 2, "job")}),
        ("batch_jobs", 1, set()),
        ("pods", 0, {(OFFER, "node-a", 2, "pod")}),
        ("pods", 1, set()),
        ("pods", 2, {("pod:foreign-uid", "node-b", 1, "pod")}),
        ("pods", 3, set()),
    ],
)
def test_each_kind_of_object_claims_what_it_holds(
    kind: str, number: int, expected: set[tuple[str, str, int, str]]
) -> None:
    world = World()
    made, uid = STATES[kind][number]
    getattr(world, kind).observe("ADDED", stored(made, uid=uid))
    assert set(claims(world)) == expected


def test_a_move_of_the_job_moves_the_claim_of_its_offer() -> None:
    world = World()
    world.offers.observe("ADDED", stored(STATES["offers"][1][0], uid=OFFER))
    world.jobs.observe("ADDED", stored(STATES["jobs"][2][0], uid="job-uid"))
    assert set(claims(world)) == {(OFFER, "node-b", 2, "admission")}


@pytest.mark.parametrize(
    ("spec", "claimed"),
    [
        ({}, False),
        ({"completions": 2}, True),
        ({"backoffLimit": 1}, True),
        ({"podFailurePolicy": {"rules": [{"action": "Ignore"}]}}, True),
    ],
    ids=["one pod, whatever comes", "two pods", "a second try", "some ends do not count"],
)
@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_job_whose_only_pod_has_ended_claims_nothing_any_more(
    spec: dict[str, Any], claimed: bool, phase: str
) -> None:
    world = World()
    made = make_job(training_job=JOB, offer_uid=OFFER, gpus=2)
    world.batch_jobs.observe("ADDED", stored({**made, "spec": {**made["spec"], **spec}}, uid="batch-uid"))
    pod = make_pod("p", gpus=2, labels=LABELS, job_uid="batch-uid")
    world.pods.observe("ADDED", stored(pod, uid="pod-uid", resource_version="2"))
    assert {c.source for c in world.claims(GPU)} == {"job", "pod"}
    pod["status"]["phase"] = phase
    world.pods.observe("MODIFIED", stored(pod, uid="pod-uid", resource_version="3"))
    assert [c.source for c in world.claims(GPU)] == (["job"] if claimed else [])


def test_claims_follow_the_resource_that_policies_hand_out() -> None:
    world = World()
    world.pods.observe("ADDED", stored(make_pod("other", gpus=1), uid="u"))
    assert claims(world, "example.com/gpu") == Counter()
    assert set(claims(world, GPU)) == {("pod:u", "node-a", 1, "pod")}


def test_a_node_is_away_since_it_was_seen_to_be_so_whatever_its_own_clock_says() -> None:
    world = World()
    seen = []
    for version, (ready, said) in enumerate(
        [(True, "12:00:00"), (False, "01:00:00"), (False, "23:00:00"), (True, "12:30:00")], start=1
    ):
        raw = stored(make_node("node-a", ready=ready), uid="n", resource_version=str(version))
        raw["status"]["conditions"] = [
            {**c, "lastTransitionTime": f"2026-01-31T{said}Z"} if c["type"] == "Ready" else c
            for c in raw["status"]["conditions"]
        ]
        world.nodes.observe("MODIFIED", raw)
        (node,) = world.nodes
        seen.append(node.health)
    assert [health.ready for health in seen] == [True, False, False, True]
    times = [health.since for health in seen]
    assert times[1] == times[2]
    assert times == sorted(times, key=lambda moment: (moment is None, moment))
    assert times[0] != times[1] != times[3]
