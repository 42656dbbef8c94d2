"""The operator's answers to offers, on a real API server: what is said, where, and how often it is written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from builders import claim
from operator_bench import Bench, condition, moment
from operator_process import OperatorProcess
from taskoffer.api.base import rfc3339

pytestmark = pytest.mark.usefixtures("operator")

REJECTIONS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "a time limit that is too long": (
        {"hours": 40},
        "TimeLimitTooLong",
        ("144000", "40 h", "72000", "20 h"),
    ),
    "a model of an unknown family": (
        {"model": "bigscience/bloom-560m", "parameters": 560_000_000},
        "ModelFamilyNotAccepted",
        ("bigscience/bloom-560m", "Llama, Mistral, Qwen"),
    ),
    "a GPU count that the policy does not hand out": (
        {"gpus": 8},
        "GpuCountNotAllowed",
        ("8 x nvidia.com/gpu", "1, 2, 4"),
    ),
    "a model whose size nobody knows": (
        {"model": "meta-llama/Llama-of-some-size", "parameters": None},
        "ParametersUnknown",
        ("meta-llama/Llama-of-some-size", "set model.parameters"),
    ),
    "a feature that is not there yet": (
        {"output": {**claim("outputs"), "repository": "me/adapter"}},
        "FeatureNotServed",
        ("output.repository",),
    ),
}


def offered(bench: Bench, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Create an offer in which `gpus` is the field gpuCount."""
    fields = dict(fields)
    made = bench.make_offer(name, **{k: v for k, v in fields.items() if k != "gpus"})
    if "gpus" in fields:
        made["spec"]["gpuCount"] = fields["gpus"]
    return bench.create(made)


@pytest.mark.parametrize(("gpus", "total"), [(1, "0.7350"), (2, "0.7250"), (4, "0.7150")])
def test_an_offer_that_fits_is_admitted_with_its_score_and_its_node(bench: Bench, gpus: int, total: str) -> None:
    node = bench.node()
    policy = bench.policy()
    offer = bench.admitted("fits", gpus)
    status, admitted = offer["status"], condition(offer, "Admitted")
    assert status["score"] == total
    assert admitted["status"] == "True"
    assert admitted["message"] == (
        f"score {total}; {gpus} x nvidia.com/gpu on {node}, where {gpus} of 8 are booked now"
    )
    made = status["admission"]
    assert made["jobName"] == f"fits-{offer['metadata']['uid'][:8]}"
    assert made["assignments"] == [{"nodeName": node, "resourceName": "nvidia.com/gpu", "count": gpus}]
    assert made["policyRef"] == {
        "name": bench.policy_name,
        "uid": policy["metadata"]["uid"],
        "generation": policy["metadata"]["generation"],
    }
    assert moment(made["deadline"]) - moment(made["decidedAt"]) == timedelta(hours=1)


def test_the_terms_of_the_explanation_sum_to_the_score(bench: Bench) -> None:
    bench.node()
    bench.policy()
    status = bench.admitted("explained", 2)["status"]
    terms = {item["name"]: Decimal(item["value"]) for item in status["explanation"] if item["type"] == "Term"}
    assert terms == {
        "TaskWeight": Decimal("0.1225"),
        "ModelPerformance": Decimal("0.2375"),
        "TaskSuccessRate": Decimal("0.1800"),
        "TimeEfficiency": Decimal("0.0950"),
        "SizeEfficiency": Decimal("0.0400"),
        "Bonus": Decimal("0.0500"),
    }
    assert sum(terms.values()) == Decimal(status["score"])


@pytest.mark.parametrize("case", REJECTIONS)
def test_an_offer_that_can_never_be_admitted_is_rejected_with_the_numbers(bench: Bench, case: str) -> None:
    fields, reason, words = REJECTIONS[case]
    bench.node()
    bench.policy()
    offered(bench, "refused", fields)
    offer = bench.decided("refused", reason)
    admitted, ended = condition(offer, "Admitted"), condition(offer, "Finished")
    assert admitted["status"] == "False"
    assert (ended["status"], ended["reason"]) == ("True", "Rejected")
    for word in words:
        assert word in admitted["message"]
    constraints = [item["name"] for item in offer["status"]["explanation"] if item["type"] == "Constraint"]
    assert reason in constraints
    assert "admission" not in offer["status"]
    assert len(bench.status_writes("refused")) == 1


def test_a_rejection_names_every_reason_and_not_only_the_first(bench: Bench) -> None:
    bench.node()
    bench.policy()
    offered(bench, "hopeless", {"hours": 40, "gpus": 8, "model": "bigscience/bloom-560m"})
    offer = bench.decided("hopeless", "ModelFamilyNotAccepted")
    named = {item["name"] for item in offer["status"]["explanation"] if item["type"] == "Constraint"}
    assert named == {"TimeLimitTooLong", "GpuCountNotAllowed", "ModelFamilyNotAccepted"}
    assert "and 2 more in status.explanation" in condition(offer, "Admitted")["message"]


def test_an_offer_without_room_waits_and_says_what_is_missing(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    bench.admitted("first", 2)
    bench.offer("second", 4)
    offer = bench.decided("second", "WaitingForCapacity")
    assert condition(offer, "Admitted")["status"] == "False"
    assert condition(offer, "Admitted")["message"] == (
        f"needs 4 x nvidia.com/gpu on one node; {node} has the most free, 2 of 4"
    )
    assert condition(offer, "Finished") == {}
    counterfactual = [i for i in offer["status"]["explanation"] if i["type"] == "Counterfactual"]
    assert counterfactual[0]["message"] == f"admitted once 2 more are free on {node}"


def test_without_a_node_an_offer_waits_and_is_not_rejected(bench: Bench) -> None:
    bench.policy()
    bench.offer("early")
    bench.decided("early", "InventoryNotReady")
    bench.node()
    bench.decided("early", "Admitted")


def test_what_does_not_fit_the_gpus_memory_is_refused_and_what_nearly_fits_is_clamped(bench: Bench) -> None:
    bench.node()
    bench.policy(estimation={"gpuMemory": "44G", "memoryFraction": "1"})
    llama = "meta-llama/Llama-3.1-8B"
    bench.offer("small", parameters=8_030_000_000, model=llama)
    bench.offer("large", parameters=70_554_000_000, model="meta-llama/Llama-3.1-70B")
    refused = bench.decided("large", "InsufficientMemory")
    assert condition(refused, "Admitted")["message"].startswith("meta-llama/Llama-3.1-70B needs 104.0 of 41.0")
    assert "GiB on each GPU with 1 row(s) at a time (4 GPUs, FSDP)" in condition(refused, "Admitted")["message"]
    admitted = bench.decided("small", "Admitted")
    estimates = {i["name"]: i for i in admitted["status"]["explanation"] if i["type"] == "Estimate"}
    assert estimates["PeakMemory"]["value"].endswith("GiB")
    assert estimates["BatchClamped"]["value"].startswith("4 -> ")
    run = bench.training_job("small")["spec"]["run"]
    (clamp,) = run["clamps"]
    assert (clamp["field"], clamp["reason"]) == ("train.perDeviceTrainBatchSize", "BatchClamped")
    rows = [
        settings["train"]["perDeviceTrainBatchSize"] * settings["train"]["gradientAccumulationSteps"]
        for settings in (run["requested"], run["effective"])
    ]
    assert rows[0] == rows[1]
    assert run["effective"]["train"]["perDeviceTrainBatchSize"] == int(clamp["effective"])
    bench.policy_condition("Linted", "LintFindings")


def test_an_offer_is_refused_once_its_task_would_end_after_its_deadline(bench: Bench) -> None:
    bench.policy(estimation={"gpuMemory": "80G", "duration": {"startSeconds": 3000, "reserveSeconds": 0}})
    bench.offer("short", hours=0.5)
    refused = bench.decided("short", "CannotFinishInTime")
    assert "predicted to take 50 min of 30 min" in condition(refused, "Admitted")["message"]
    # It takes some 3,000 s and has 3,010: it waits for a node, and then it is too late.
    bench.offer("late", spec={"deadline": rfc3339(datetime.now(UTC) + timedelta(seconds=3010))}, hours=2)
    bench.decided("late", "InventoryNotReady")
    refused = bench.decided("late", "CannotFinishInTime")
    assert "are left until spec.deadline" in condition(refused, "Admitted")["message"]
    assert condition(refused, "Finished")["reason"] == "Rejected"


def test_a_policy_that_rejects_when_full_turns_waiting_into_a_refusal(bench: Bench) -> None:
    bench.node(gpus=1)
    bench.policy(filters={"onFull": "Reject"})
    bench.admitted("first")
    bench.offer("second")
    offer = bench.decided("second", "CapacityFull")
    assert condition(offer, "Finished")["reason"] == "Rejected"


def test_the_policys_number_of_jobs_is_kept(bench: Bench) -> None:
    bench.node()
    bench.policy(filters={"maxConcurrentJobs": 1})
    bench.admitted("first")
    bench.offer("second")
    offer = bench.decided("second", "WaitingForJobSlot")
    assert "1 of 1 concurrent jobs run" in condition(offer, "Admitted")["message"]


def test_conditions_carry_the_generation_that_was_decided_on(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("edited", active=False)
    assert bench.decided("edited", "Suspended")["status"]["observedGeneration"] == 1
    bench.patch("edited", {"active": True})
    offer = bench.decided("edited", "Admitted")
    assert offer["metadata"]["generation"] == 2
    assert offer["status"]["observedGeneration"] == 2
    assert condition(offer, "Admitted")["observedGeneration"] == 2


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(lambda bench: bench.offer("one"), "Admitted", id="admit"),
        pytest.param(lambda bench: bench.offer("one", hours=40), "TimeLimitTooLong", id="reject"),
        pytest.param(lambda bench: bench.offer("one", active=False), "Suspended", id="suspend"),
    ],
)
def test_a_decision_is_one_status_write_and_one_event(
    bench: Bench, prepare: Callable[[Bench], Any], reason: str
) -> None:
    bench.node()
    bench.policy()
    prepare(bench)
    offer = bench.decided("one", reason)
    event = bench.event("one", reason)
    assert event["message"] == condition(offer, "Admitted")["message"]
    assert event["type"] == ("Warning" if reason == "TimeLimitTooLong" else "Normal")
    assert event["involvedObject"]["uid"] == offer["metadata"]["uid"]
    # Everything else in the bench is news to the operator, too; none of it is a reason to write again.
    bench.admitted("another")
    bench.event("another", "Admitted")
    assert len(bench.status_writes("one")) == len(bench.events("one")) == 1


def test_a_waiting_offer_is_written_again_only_when_its_answer_changes(bench: Bench) -> None:
    bench.node(gpus=4)
    bench.policy()
    bench.admitted("first", 2)
    bench.offer("big", 4)
    bench.decided("big", "WaitingForCapacity")
    for name in ("second", "third"):
        # Less is free each time, but the answer stays the same.
        bench.admitted(name, 1)
    assert len(bench.status_writes("big")) == 1


def test_a_suspended_offer_is_not_admitted_until_it_is_active(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("paused", active=False)
    offer = bench.decided("paused", "Suspended")
    assert "set it to true" in condition(offer, "Admitted")["message"]
    assert offer["status"]["score"] == "0.7350"
    bench.patch("paused", {"active": True})
    bench.decided("paused", "Admitted")


def test_an_offer_that_is_too_late_is_refused_as_expired(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("late", expires_at=stamp(-60))
    offer = bench.decided("late", "Expired")
    assert "spec.expiresAt" in condition(offer, "Admitted")["message"]
    assert condition(offer, "Finished")["status"] == "True"


def test_a_waiting_offer_expires_by_itself(bench: Bench) -> None:
    bench.node(gpus=1)
    bench.policy()
    bench.admitted("first")
    bench.offer("second", expires_at=stamp(8))
    bench.decided("second", "WaitingForCapacity")
    offer = bench.decided("second", "Expired")
    assert len(bench.status_writes("second")) == 2
    assert datetime.now(UTC) >= moment(offer["spec"]["expiresAt"])


def test_of_two_offers_with_one_task_id_the_older_counts(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("original", task_id="task-1")
    bench.offer("copy", task_id="task-1")
    offer = bench.decided("copy", "DuplicateTask")
    message = condition(offer, "Admitted")["message"]
    assert "TaskOffer original has the same taskID task-1" in message
    assert "its answer (Admitted) counts" in message
    assert bench.get("original")["status"]["admission"]["jobName"].startswith("original-")


def test_decisions_are_counted_by_verdict_and_reason(bench: Bench, operator: OperatorProcess) -> None:
    bench.node()
    bench.policy()
    labels = {"verdict": "Reject", "reason": "TimeLimitTooLong"}
    before = operator.metric("taskoffer_offers_decided_total", **labels) or 0
    bench.offer("long", hours=40)
    bench.decided("long", "TimeLimitTooLong")
    bench.event("long", "TimeLimitTooLong")
    assert operator.metric("taskoffer_offers_decided_total", **labels) == before + 1


def stamp(seconds: float) -> str:
    """Return the time so many seconds from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
