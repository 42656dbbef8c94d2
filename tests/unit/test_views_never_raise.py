"""Raw objects of any shape are reduced without an error: one bad object must not blind the operator to the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
from core_builders import NOW
from taskoffer.reconcile.moments import moment
from taskoffer.reconcile.pod_views import batch_job_entry, pinned_node, pod_entry, requested
from taskoffer.reconcile.replica import concerns
from taskoffer.reconcile.views import OfferState, node_entry, offer_entry, policy_entry, training_job_entry

REDUCERS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "TaskOffer": (offer_entry, make_offer()),
    "TrainingJob": (training_job_entry, make_training_job()),
    "CapacityPolicy": (policy_entry, make_policy()),
    "Job": (batch_job_entry, make_job()),
    "Pod": (pod_entry, make_pod()),
    "Node": (node_entry, make_node()),
}
PULLING = {"reason": "ErrImagePull", "message": "m"}
ODD_PARTS: list[dict[str, Any]] = [
    {},
    {"spec": None, "status": None},
    {"spec": {}, "status": {}},
    {"status": {"conditions": None}},
    {"status": {"conditions": []}},
    {"status": {"conditions": [{}]}},
    {"status": {"conditions": [{"type": None, "status": None}]}},
    {"status": {"admission": {}}},
    {"status": {"admission": {"jobName": "x", "assignments": []}}},
    {"status": {"activeSpec": {"filters": 1}}},
    {"status": {"allocatable": None}},
    {"status": {"allocatable": {"nvidia.com/gpu": "many"}}},
    {"status": {"containerStatuses": None}},
    {"status": {"containerStatuses": [{"name": "trainer", "state": None}]}},
    {"status": {"observedGeneration": "x"}},
    {"spec": {"taskID": 7, "active": "no"}},
    {"spec": {"containers": None, "affinity": None}},
    {"spec": {"containers": [{}], "affinity": {"nodeAffinity": None}}},
    {"spec": {"template": None}},
    {"spec": {"offerRef": None}},
    {"spec": {"resources": [], "scoring": "none"}},
]


@pytest.mark.parametrize("kind", REDUCERS)
@pytest.mark.parametrize("odd", ODD_PARTS, ids=[str(i) for i in range(len(ODD_PARTS))])
def test_an_odd_object_is_reduced_all_the_same(kind: str, odd: dict[str, Any]) -> None:
    reduce, made = REDUCERS[kind]
    raw = {**stored(made, uid="u"), **odd}
    if odd == {}:
        raw.pop("spec")
    entry = reduce(raw)
    assert entry is not None
    if kind == "TaskOffer":
        view = entry.read_view()
        assert (view.spec is None) == (view.invalid is not None)


@pytest.mark.parametrize("kind", REDUCERS)
def test_an_ordinary_object_is_read_in_full(kind: str) -> None:
    reduce, made = REDUCERS[kind]
    assert reduce(stored(made, uid="u")) is not None


# Offers


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (None, OfferState.PENDING),
        ({"conditions": [make_condition("Admitted", False, "WaitingForCapacity")]}, OfferState.PENDING),
        ({"admission": make_admission()}, OfferState.HOLDING),
        ({"admission": {"broken": True}}, OfferState.HOLDING),
        (
            {"admission": make_admission(), "conditions": [make_condition("Finished", True, "Succeeded")]},
            OfferState.DONE,
        ),
        ({"conditions": [make_condition("Finished", True, "Rejected")]}, OfferState.DONE),
        ({"conditions": [make_condition("Finished", False, "Rejected")]}, OfferState.PENDING),
    ],
)
def test_an_offers_state_follows_from_its_status(status: dict[str, Any] | None, state: OfferState) -> None:
    entry = offer_entry(stored(make_offer(status=status), uid="u"))
    assert entry.state is state
    assert (entry.spec is None) == (state is OfferState.DONE), "the raw parts of a finished offer are dropped"


def test_an_offers_view_carries_what_was_seen() -> None:
    raw = stored(
        make_offer(status={"observedGeneration": 2, "conditions": [make_condition("Admitted", False, "Suspended")]}),
        uid="u",
        generation=3,
        resource_version="77",
    )
    entry = offer_entry(raw)
    view = entry.read_view()
    assert (view.uid, view.resource_version, view.generation, view.observed_generation) == ("u", "77", 3, 2)
    assert view.created == NOW
    assert view.conditions[0].reason == entry.reason == "Suspended"
    assert entry.read_view() is view


def test_a_spec_that_cannot_be_read_is_explained_by_its_fields() -> None:
    entry = offer_entry(stored(make_offer(spec={"taskType": "Nonsense", "timeLimitSeconds": "x"}), uid="u"))
    invalid = entry.read_view().invalid
    assert invalid is not None
    assert "taskType" in invalid
    assert "timeLimitSeconds" in invalid


# Policies


def test_an_invalid_policy_falls_back_to_the_version_in_its_status() -> None:
    good = make_policy()["spec"]
    broken = make_policy(scoring={"terms": []}, status={"activeSpec": good, "activeGeneration": 4})
    entry = policy_entry(stored(broken, uid="u", generation=5))
    assert (entry.view.generation, entry.generation) == (4, 5)
    assert entry.view.spec is not None
    assert "scoring.terms" in entry.view.problem


def test_only_the_annotation_true_makes_a_default_policy() -> None:
    assert policy_entry(stored(make_policy(), uid="u")).view.is_default
    assert not policy_entry(stored(make_policy(default=False), uid="u")).view.is_default


# Pods and nodes


def asks(limits: int | str, **fields: Any) -> dict[str, Any]:
    return {"name": "c", "resources": {"limits": {"nvidia.com/gpu": str(limits), "cpu": "1"}}, **fields}


@pytest.mark.parametrize(
    ("spec", "gpus"),
    [
        ({"containers": [asks(2), asks(1)]}, 3),
        ({"containers": [asks(1)], "initContainers": [asks(4)]}, 4),
        ({"containers": [asks(4)], "initContainers": [asks(1), asks(2)]}, 4),
        ({"containers": [asks(1)], "initContainers": [asks(2, restartPolicy="Always")]}, 3),
        ({"containers": [{"name": "c", "resources": {"requests": {"nvidia.com/gpu": "2"}}}]}, 2),
        ({"containers": [{"name": "c"}]}, 0),
    ],
)
def test_a_pod_is_counted_as_the_scheduler_counts_it(spec: dict[str, Any], gpus: int) -> None:
    assert requested(spec).get("nvidia.com/gpu", 0) == gpus
    assert "cpu" not in requested(spec)
    assert concerns({"metadata": {}, "spec": spec}) is bool(gpus)


def test_our_pods_matter_even_without_gpus() -> None:
    assert concerns({"metadata": {"labels": {"taskoffer.dev/job": "x"}}, "spec": {}})
    assert not concerns({"metadata": {"labels": None}, "spec": {"containers": [{}]}})


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown", "Succeeded", "Failed"])
def test_only_a_pod_that_has_ended_is_terminal(phase: str) -> None:
    view = pod_entry(stored(make_pod(phase=phase), uid="u")).view
    assert view.terminal is (phase in ("Succeeded", "Failed"))
    assert view.succeeded is (phase == "Succeeded")


def test_a_pod_that_is_being_deleted_is_not_terminal() -> None:
    assert not pod_entry(stored(make_pod(), uid="u", deleted="2026-01-31T12:00:00Z")).view.terminal


def test_a_pod_tells_how_its_container_ended() -> None:
    raw = stored(make_pod(phase="Failed"), uid="u")
    terminated = {
        "exitCode": 65,
        "message": "no column",
        "startedAt": "2026-01-31T12:00:00Z",
        "finishedAt": "2026-01-31T12:00:05Z",
    }
    raw["status"]["containerStatuses"] = [{"name": "trainer", "state": {"terminated": terminated}}]
    view = pod_entry(raw).view
    assert (view.exit_code, view.message, view.started_at) == (65, "no column", NOW)


@pytest.mark.parametrize(
    ("of_the_pod", "of_the_container", "reason"),
    [
        ({}, {"exitCode": 137, "reason": "OOMKilled"}, "OOMKilled"),
        ({"reason": "Evicted"}, {"exitCode": 143, "reason": "Error"}, "Error"),
        ({"reason": "Evicted"}, {}, "Evicted"),
        ({}, {}, ""),
    ],
)
def test_a_pod_tells_why_it_ended_in_the_kubelets_word(
    of_the_pod: dict[str, Any], of_the_container: dict[str, Any], reason: str
) -> None:
    raw = stored(make_pod(phase="Failed"), uid="u")
    ended = {"name": "trainer", "state": {"terminated": of_the_container}}
    raw["status"] |= {**of_the_pod, "containerStatuses": [ended]}
    assert pod_entry(raw).view.reason == reason


def test_a_pod_that_could_not_be_prepared_says_why_and_has_not_started() -> None:
    raw = stored(make_pod(phase="Failed"), uid="u")
    terminated = {"exitCode": 1, "message": "Permission denied", "startedAt": "2026-01-31T12:00:00Z"}
    raw["status"]["initContainerStatuses"] = [{"name": "folders", "state": {"terminated": terminated}}]
    raw["status"]["containerStatuses"] = [{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}]
    view = pod_entry(raw).view
    assert (view.exit_code, view.message, view.started_at) == (1, "Permission denied", None)


@pytest.mark.parametrize(
    ("status", "waiting"),
    [
        (
            {
                "containerStatuses": [
                    {"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull", "message": "m"}}}
                ]
            },
            "ErrImagePull m",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1"}]},
            "Unschedulable 0/1",
        ),
        ({}, ""),
    ],
)
def test_a_pod_that_waits_says_why(status: dict[str, Any], waiting: str) -> None:
    raw = stored(make_pod(phase="Pending"), uid="u")
    raw["status"].update(status)
    assert pod_entry(raw).view.waiting == waiting


def test_a_pod_without_node_is_charged_where_it_is_pinned() -> None:
    job = batch_job_entry(stored(make_job(gpus=2, node="n7"), uid="u"))
    assert (job.node, job.requests) == ("n7", {"nvidia.com/gpu": 2})
    raw = stored(make_pod(node=None), uid="u")
    raw["spec"] = make_job(node="n7")["spec"]["template"]["spec"]
    assert pod_entry(raw).node == "n7"
    assert pinned_node({"affinity": {"nodeAffinity": {}}}) is None


@pytest.mark.parametrize(
    ("node", "ready"),
    [
        (make_node(), True),
        (make_node(ready=False), False),
        (make_node(unschedulable=True), False),
    ],
)
def test_only_ready_and_schedulable_nodes_take_tasks(node: dict[str, Any], ready: bool) -> None:
    view = node_entry(stored(node, uid="u")).view("nvidia.com/gpu")
    assert view.ready is ready
    assert view.allocatable == 8


def test_a_node_that_is_being_deleted_takes_no_tasks() -> None:
    entry = node_entry(stored(make_node(), uid="u", deleted="2026-01-31T12:00:00Z"))
    assert not entry.view("nvidia.com/gpu").ready
    assert entry.health.ready


def test_a_cordoned_node_is_not_a_lost_node() -> None:
    assert node_entry(stored(make_node(unschedulable=True), uid="u")).health.ready


@pytest.mark.parametrize("text", [None, "", "yesterday"])
def test_what_is_no_time_is_none(text: str | None) -> None:
    assert moment(text) is None
