"""When what is booked is predicted to come free, from the stored objects."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from builders import make_admission, make_condition, make_node, make_offer, make_policy, make_training_job, stored
from core_builders import NOW, at
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.decision.ledger import Release
from taskoffer.reconcile.world import World

SIZES = [{"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 64}}]
SURE = {"gpuMemory": "80G", "duration": {"startSeconds": 90, "reserveSeconds": 0, "submitSeconds": 30}}
"""A tiny model's few rows take no time, so that a task takes two minutes."""
POLICY = make_policy(size_classes=SIZES, estimation=SURE)
TASK: dict[str, Any] = {"name": "a", "rows": 1, "seconds": 7200, "parameters": 500_000}


def world(*, policy: dict[str, Any] | None = POLICY, admitted: bool = True, **admission: Any) -> World:
    """Return a world with an offer, admitted at NOW under the policy lab-uid, on one GPU of node-a."""
    made = World()
    booked = make_admission(gpus=1, node="node-a", job="a-offer-ui", **admission)
    booked["policyRef"] = {"name": "lab", "uid": "lab-uid", "generation": 1}
    status = {"admission": booked, "conditions": [make_condition("Admitted", True, "Admitted")]} if admitted else None
    if policy is not None:
        made.policies.observe("ADDED", stored(policy, uid="lab-uid", resource_version="1"))
    made.nodes.observe("ADDED", stored(make_node(name="node-a"), uid="n", resource_version="1"))
    made.offers.observe("ADDED", stored(make_offer(**TASK, status=status), uid="offer-uid", resource_version="2"))
    return made


def ends(made: World, now: datetime = NOW) -> list[tuple[str, float]]:
    return [(r.holder, (r.ends - NOW).total_seconds()) for r in made.snapshot(now).releases]


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 120),
        ({"deadline": "2026-01-31T12:01:00Z"}, 60),
        ({"policy": None}, 7200),
        ({"policy": make_policy(size_classes=SIZES)}, 7200),
    ],
    ids=["as predicted", "at the latest at the deadline", "no policy any more", "a policy that does not predict"],
)
def test_a_booking_ends_when_its_task_is_predicted_to(fields: dict[str, Any], seconds: float) -> None:
    (found,) = ends(world(**fields))
    assert found == ("offer-uid", pytest.approx(seconds, abs=0.2))


def test_what_a_trainer_says_of_itself_counts_before_what_was_predicted() -> None:
    made = world()
    told = {"estimatedRemainingSeconds": 500, "lastUpdatedTime": "2026-01-31T12:10:00Z"}
    job = make_training_job(name="a-offer-ui", offer="a", offer_uid="offer-uid", status={"trainerStatus": told})
    owner = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "TaskOffer", "name": "a", "uid": "offer-uid"}
    job["metadata"]["ownerReferences"] = [{**owner, "controller": True}]
    made.jobs.observe("ADDED", stored(job, uid="job-uid", resource_version="3"))
    assert ends(made) == [("offer-uid", 1100)]


def test_a_job_that_ended_early_has_no_gpus_while_its_best_adapter_so_far_is_handed_over() -> None:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}
    over = {"jobName": "a-offer-ui-1", "assignments": [place], "createdAt": "2026-01-31T12:00:00Z", "outcome": "Failed"}
    early = {"earlyEnd": {"reason": "AttemptsExhausted", "message": "attempt 3 was killed"}}
    owner = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "TaskOffer", "name": "a", "uid": "offer-uid"}
    for more, booked in (({}, [("offer-uid", 120)]), (early, [])):
        made, status = world(), {"attempts": [over], **more}
        job = make_training_job(name="a-offer-ui", offer="a", offer_uid="offer-uid", status=status)
        job["metadata"]["ownerReferences"] = [{**owner, "controller": True}]
        made.jobs.observe("ADDED", stored(job, uid="job-uid", resource_version="3"))
        assert [(who, round(when)) for who, when in ends(made)] == booked


def test_an_admission_that_is_being_written_counts_from_its_own_moment_and_is_forgotten_with_it() -> None:
    made = world(admitted=False)
    made.snapshot(NOW)
    for minutes in (0, 5):
        booked = world().offers.get("offer-uid")
        assert booked is not None
        assert booked.admission is not None
        sent: Admission = booked.admission.model_copy(update={"decided_at": at(60 * minutes)})
        made.send("offer-uid", sent)
        (found,) = ends(made)
        assert found == ("offer-uid", pytest.approx(60 * minutes + 120, abs=0.2))
        made.in_flight.clear()
        made.assumed.clear()
        assert ends(made) == []


def test_a_release_knows_what_it_frees() -> None:
    (found,) = world().snapshot(NOW).releases
    assert found == Release("offer-uid", "node-a", 1, found.ends, "lab", None, "default", "default/a")


def test_a_job_that_has_moved_frees_the_node_that_it_is_on() -> None:
    made = world()
    moved = make_admission(gpus=1, node="node-b", job="a-offer-ui")["assignments"]
    attempts = [
        {"jobName": f"a-offer-ui-{number}", "createdAt": "2026-01-31T12:00:00Z", "assignments": places}
        for number, places in ((1, make_admission(gpus=1, node="node-a", job="a-offer-ui")["assignments"]), (2, moved))
    ]
    job = make_training_job(name="a-offer-ui", offer="a", offer_uid="offer-uid", status={"attempts": attempts})
    owner = {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "TaskOffer", "name": "a", "uid": "offer-uid"}
    job["metadata"]["ownerReferences"] = [{**owner, "controller": True}]
    made.jobs.observe("ADDED", stored(job, uid="job-uid", resource_version="3"))
    assert [r.node for r in made.snapshot(NOW).releases] == ["node-b"]
