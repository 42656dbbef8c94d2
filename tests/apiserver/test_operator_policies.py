"""Policies: missing, default, broken, changed and deleted ones, and what their status says."""

from __future__ import annotations

from typing import Any

import pytest

from operator_bench import GROUP, Bench, condition
from operator_process import OperatorProcess
from taskoffer_lab.api_client import MERGE_PATCH

pytestmark = pytest.mark.usefixtures("operator")

DEFAULT = "taskoffer.dev/is-default-policy"


def overlapping(policy: dict[str, Any]) -> list[dict[str, Any]]:
    """Return size classes of which the second begins inside the first: the schema cannot see that."""
    classes: list[dict[str, Any]] = policy["spec"]["sizeClasses"]
    return [{**classes[0], "maxParameters": 2_000_000}, *classes[1:]]


def make_default(bench: Bench, value: str | None) -> None:
    """Annotate the bench's policy as the default one, or not."""
    path = f"{GROUP}/capacitypolicies/{bench.policy_name}"
    bench.api.request("PATCH", path, {"metadata": {"annotations": {DEFAULT: value}}}, MERGE_PATCH)


def test_an_offer_for_a_missing_policy_waits_until_it_is_created(bench: Bench) -> None:
    bench.node()
    bench.offer("early")
    offer = bench.decided("early", "PolicyNotFound")
    assert f"CapacityPolicy {bench.policy_name} does not exist: create it" in condition(offer, "Admitted")["message"]
    assert condition(offer, "Finished") == {}
    bench.policy()
    bench.decided("early", "Admitted")
    assert len(bench.status_writes("early")) == 2


def test_an_offer_that_names_no_policy_is_decided_by_the_default_one(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.create(bench.make_offer("free", spec={"policyName": None}))
    offer = bench.decided("free", "PolicyNotFound")
    assert f"{DEFAULT}=true" in condition(offer, "Admitted")["message"]
    make_default(bench, "true")
    admitted = bench.decided("free", "Admitted")
    assert admitted["status"]["admission"]["policyRef"]["name"] == bench.policy_name
    make_default(bench, None)
    bench.create(bench.make_offer("later", spec={"policyName": None}))
    bench.decided("later", "PolicyNotFound")


def test_a_policy_that_breaks_leaves_its_last_good_version_in_force(bench: Bench) -> None:
    bench.node()
    good = bench.policy()
    bench.patch_policy({"sizeClasses": overlapping(good)})
    policy = bench.policy_condition("Ready", "InvalidPolicy")
    ready = condition(policy, "Ready")
    assert ready["status"] == "False"
    assert "sizeClasses[Medium] starts at 1000000, inside Small" in ready["message"]
    assert "generation 1 stays in force" in ready["message"]
    assert policy["status"]["activeGeneration"] == 1
    assert policy["status"]["activeSpec"]["sizeClasses"][0]["maxParameters"] == 1_000_000
    offer = bench.admitted("under-the-old", 2)
    assert offer["status"]["admission"]["policyRef"]["generation"] == 1
    bench.bound_pod("under-the-old")


def test_a_restart_keeps_the_last_good_version_of_a_broken_policy(bench: Bench, operator: OperatorProcess) -> None:
    bench.node()
    good = bench.policy()
    bench.patch_policy({"sizeClasses": overlapping(good)})
    bench.policy_condition("Ready", "InvalidPolicy")
    with bench.audit.excused():
        assert operator.terminate() == 0
        operator.start()
    offer = bench.admitted("after", 2)
    assert offer["status"]["admission"]["policyRef"]["generation"] == 1
    bench.bound_pod("after")


def test_a_policy_that_breaks_while_no_operator_runs_keeps_its_last_good_version(
    bench: Bench, operator: OperatorProcess
) -> None:
    bench.node()
    good = bench.policy()
    with bench.audit.excused():
        assert operator.terminate() == 0
        bench.patch_policy({"sizeClasses": overlapping(good)})
        operator.start()
    policy = bench.policy_condition("Ready", "InvalidPolicy")
    assert "generation 1 stays in force" in condition(policy, "Ready")["message"]
    assert policy["status"]["activeGeneration"] == 1
    assert bench.admitted("after", 2)["status"]["admission"]["policyRef"]["generation"] == 1


def test_a_mended_policy_is_in_force_again(bench: Bench) -> None:
    bench.node()
    good = bench.policy()
    bench.patch_policy({"sizeClasses": overlapping(good)})
    bench.policy_condition("Ready", "InvalidPolicy")
    bench.patch_policy({"sizeClasses": good["spec"]["sizeClasses"]})
    policy = bench.policy_condition("Ready", "Ready")
    assert policy["status"]["activeGeneration"] == policy["metadata"]["generation"] == 3
    assert bench.admitted("after")["status"]["admission"]["policyRef"]["generation"] == 3


def test_offers_of_a_policy_that_was_never_valid_wait(bench: Bench) -> None:
    bench.node()
    made = bench.make_policy()
    classes = made["spec"]["sizeClasses"]
    made["spec"]["sizeClasses"] = overlapping(made)
    bench.api.request("POST", f"{GROUP}/capacitypolicies", made)
    policy = bench.policy_condition("Ready", "InvalidPolicy")
    assert "no valid version is known: mend spec" in condition(policy, "Ready")["message"]
    bench.offer("early")
    offer = bench.decided("early", "PolicyNotReady")
    assert "sizeClasses[Medium]" in condition(offer, "Admitted")["message"]
    bench.patch_policy({"sizeClasses": classes})
    bench.decided("early", "Admitted")


def test_a_changed_policy_decides_waiting_offers_anew(bench: Bench) -> None:
    bench.node()
    bench.policy(filters={"maxConcurrentJobs": 1})
    bench.admitted("first")
    bench.offer("second")
    bench.decided("second", "WaitingForJobSlot")
    bench.patch_policy({"filters": {"maxConcurrentJobs": 2}})
    offer = bench.decided("second", "Admitted")
    assert offer["status"]["admission"]["policyRef"]["generation"] == 2


def test_a_rejection_is_final_even_when_the_policy_changes(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("long", hours=40)
    before = bench.decided("long", "TimeLimitTooLong")
    bench.patch_policy({"filters": {"maxTimeLimitSeconds": 360_000}})
    bench.policy_condition("Ready", "Ready")
    bench.admitted("as-long", hours=40)
    assert bench.get("long")["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


def test_a_running_job_keeps_the_settings_that_it_was_admitted_with(bench: Bench) -> None:
    bench.node()
    bench.policy(attempts={"maxAttempts": 2})
    bench.admitted("running")
    pod = bench.run("running")
    bench.patch_policy({"attempts": {"maxAttempts": 1}, "podTemplate": {"image": "another:1"}})
    bench.policy_condition("Ready", "Ready")
    bench.end(pod, 1)
    second = bench.bound_pod("running", attempt=2)
    image = bench.api.request("GET", bench.path("pods", second, api="/api/v1"))["spec"]["containers"][0]["image"]
    assert image == "taskoffer-trainer:0.1.0"


def test_deleting_a_policy_stops_admission_and_leaves_running_jobs_alone(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("running")
    pod = bench.run("running")
    bench.api.request("DELETE", f"{GROUP}/capacitypolicies/{bench.policy_name}")
    bench.offer("late")
    bench.decided("late", "PolicyNotFound")
    bench.end(pod)
    bench.finished("running", "Succeeded")


def test_the_status_counts_gpus_and_offers(bench: Bench) -> None:
    first, second = bench.node("a", gpus=4), bench.node("b", gpus=2)
    bench.policy()
    bench.admitted("four", 4)
    bench.admitted("one", 1)
    bench.offer("waits", 4)
    bench.decided("waits", "WaitingForCapacity")
    bench.booked(second, 1)
    policy = bench.policy_until(lambda p: p["status"]["capacity"]["pending"] == 1, "1 pending")
    capacity = policy["status"]["capacity"]
    assert {key: capacity[key] for key in ("total", "used", "pending", "running")} == {
        "total": 6,
        "used": 5,
        "pending": 1,
        "running": 2,
    }
    assert capacity["nodes"] == [
        {"name": first, "allocatable": 4, "booked": 4, "ready": True},
        {"name": second, "allocatable": 2, "booked": 1, "ready": True},
    ]
    bench.delete("waits")
    bench.policy_until(lambda p: p["status"]["capacity"]["pending"] == 0, "0 pending")


def test_findings_of_a_policy_are_in_its_status(bench: Bench) -> None:
    bench.node(gpus=4)
    bench.policy(filters={"minScore": "0.99"})
    policy = bench.policy_condition("Linted", "LintFindings")
    found = {f["field"]: f for f in policy["status"]["lint"]}
    assert found["filters.minScore"]["severity"] == "Error"
    assert "rejects everything" in found["filters.minScore"]["message"]
    bench.offer("hopeless")
    assert "0.99" in condition(bench.decided("hopeless", "ScoreTooLow"), "Admitted")["message"]


def test_an_unchanged_policy_status_is_not_written_again(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("paused", active=False)
    bench.decided("paused", "Suspended")
    version = bench.policy_until(lambda p: p["status"]["capacity"]["pending"] == 1, "1 pending")["metadata"]
    # Each makes the operator look at all policies once more; the last one shows that it has.
    bench.node("b", gpus=0)
    bench.offer("long", hours=40)
    bench.decided("long", "TimeLimitTooLong")
    assert bench.get_policy()["metadata"]["resourceVersion"] == version["resourceVersion"]
