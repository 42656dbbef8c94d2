"""From an admission to a Job and to its end: what is created, how it is retried, stopped and finished."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from operator_bench import SECONDS, Bench, condition, moment
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.process_table import wait_until

pytestmark = pytest.mark.usefixtures("operator")

GPU = "nvidia.com/gpu"


def owner_of(obj: dict[str, Any]) -> tuple[str, str, str, bool]:
    """Return kind, name and UID of the one owner, and whether it controls."""
    (owner,) = obj["metadata"]["ownerReferences"]
    return owner["kind"], owner["name"], owner["uid"], owner["controller"]


def outcomes(job: dict[str, Any]) -> list[str | None]:
    """Return how the attempts of a TrainingJob ended."""
    return [attempt.get("outcome") for attempt in job["status"].get("attempts", [])]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_an_admission_becomes_a_job_on_the_decided_node(bench: Bench, gpus: int) -> None:
    node = bench.node("a")
    bench.node("b", gpus=2)
    bench.policy()
    offer = bench.admitted("train", gpus)
    decided = offer["status"]["admission"]["assignments"][0]["nodeName"]
    bench.bound_pod("train")
    (job,), (pod,) = bench.batch_jobs(offer), bench.pods(offer)
    assert pod["spec"]["nodeName"] == decided
    assert (decided == node) is (gpus == 4)
    for spec in (job["spec"]["template"]["spec"], pod["spec"]):
        (container,) = spec["containers"]
        assert container["resources"]["limits"][GPU] == container["resources"]["requests"][GPU] == str(gpus)
    assert (job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (1, 0)


def test_offer_training_job_and_job_own_one_another_and_carry_the_offers_uid(bench: Bench) -> None:
    bench.node()
    bench.policy()
    offer = bench.admitted("owned")
    bench.bound_pod("owned")
    training = bench.training_job("owned")
    (job,), (pod,) = bench.batch_jobs(offer), bench.pods(offer)
    name, uid = training["metadata"]["name"], offer["metadata"]["uid"]
    assert owner_of(training) == ("TaskOffer", "owned", uid, True)
    assert training["spec"]["offerRef"] == {"name": "owned", "uid": uid}
    settings = bench.api.request("GET", bench.path("configmaps", f"{name}-1", api="/api/v1"))
    for made in (job, settings):
        assert made["metadata"]["name"] == f"{name}-1"
        assert owner_of(made) == ("TrainingJob", name, training["metadata"]["uid"], True)
    for made in (job, settings, pod):
        labels = made["metadata"]["labels"]
        assert labels["taskoffer.dev/offer-uid"] == uid
        assert labels["taskoffer.dev/job"] == name
        assert labels["taskoffer.dev/attempt"] == "1"
        assert labels["taskoffer.dev/policy"] == bench.policy_name


def test_the_config_map_holds_the_run_that_the_trainer_reads(bench: Bench) -> None:
    bench.node()
    bench.policy()
    offer = bench.admitted("read", 2, hours=3)
    bench.bound_pod("read")
    name = offer["status"]["admission"]["jobName"]
    settings = bench.api.request("GET", bench.path("configmaps", f"{name}-1", api="/api/v1"))
    assert settings["immutable"] is True
    ((_, text),) = settings["data"].items()
    run = json.loads(text)
    assert (run["jobName"], run["attempt"], run["taskID"], run["gpus"]) == (name, 1, "read", 2)
    assert run["model"]["name"] == "meta-llama/Llama-3.1-8B"
    assert moment(run["deadline"]) == moment(offer["status"]["admission"]["deadline"])
    assert run["outputDir"].endswith(f"/{name}")


def test_a_pod_that_succeeds_finishes_the_offer_and_frees_its_gpus(bench: Bench) -> None:
    node = bench.node()
    bench.policy()
    bench.admitted("good", 2)
    pod = bench.run("good")
    bench.booked(node, 2)
    said = {"exitCode": 0, "reason": "Trained", "message": "done", "adapterDir": "/data/output/x"}
    losses = {"evalLossBefore": 4.5, "evalLossAfter": 3.25, "adapterSha256": "ab" * 32}
    bench.end(pod, 0, json.dumps({**said, **losses}))
    offer = bench.finished("good", "Succeeded")
    job = bench.job_condition("good", "Complete", "Succeeded")
    assert "4.5000 -> 3.2500" in condition(offer, "Finished")["message"]
    assert job["status"]["result"]["adapterPath"] == "/data/output/x"
    assert outcomes(job) == ["Succeeded"]
    assert condition(job, "Running")["status"] == "False"
    assert "admission" in offer["status"], "the admission stays as a record"
    bench.booked(node, 0)


def test_a_finished_training_job_says_what_it_took_beside_what_was_predicted(bench: Bench) -> None:
    bench.node()
    slow = {"peakTeraflops": 1, "mfu": [{"mfu": "0.01"}], "startSeconds": 0, "reserveSeconds": 0}
    bench.policy(estimation={"gpuMemory": "80G", "duration": slow}, learning={"priorStrength": "5"})
    bench.admitted("measured")
    pod = bench.run("measured")
    said = {"exitCode": 0, "reason": "Completed", "step": 40, "totalSteps": 40, "trainingSeconds": 0.6}
    figures = {"tokensPerSecond": 1200.4, "peakGpuBytes": 2 * 10**9, "peakHostBytes": 10**9}
    bench.end(pod, 0, json.dumps({**said, **figures}))
    bench.finished("measured", "Succeeded")
    job = bench.training_job("measured")
    run, measured = job["spec"]["run"], job["status"]["measured"]
    assert (run["family"], run["sizeClass"], run["gpus"]) == ("Llama", "Small", 1)
    assert run["predicted"]["trainingSeconds"] == measured["predictedSeconds"] > 0
    assert run["predicted"]["peakMemoryBytes"] == measured["predictedPeakBytes"] > 10**9
    (attempt,) = job["status"]["attempts"]
    ran = moment(attempt["finishedAt"]) - moment(attempt["startedAt"])
    waited = moment(attempt["startedAt"]) - moment(attempt["createdAt"])
    assert measured["containerSeconds"] == round(ran.total_seconds())
    assert measured["startSeconds"] == round(waited.total_seconds())
    told = ("trainingSeconds", "trainedShare", "tokensPerSecond", "peakMemoryBytes", "peakHostBytes")
    assert [measured[name] for name in told] == [1, "1.000", 1200, 2 * 10**9, 10**9]


def test_the_training_job_says_what_a_pending_pod_waits_for(bench: Bench) -> None:
    bench.node()
    bench.policy()
    offer = bench.make_offer("unbound")
    offer["spec"]["model"]["source"]["persistentVolumeClaim"]["claimName"] = "missing"
    bench.create(offer)
    bench.decided("unbound", "Admitted")
    bench.training_job(
        "unbound",
        lambda j: 'persistentvolumeclaim "missing" not found' in condition(j, "Running").get("message", ""),
        "says that its claim is missing",
    )


def test_a_failed_pod_is_tried_again_until_the_attempts_are_used_up(bench: Bench) -> None:
    node = bench.node()
    bench.policy(attempts={"maxAttempts": 3})
    offer = bench.admitted("flaky", 4)
    for attempt in (1, 2, 3):
        pod = bench.run("flaky", attempt)
        bench.booked(node, 4)
        bench.end(pod, 1, f"boom number {attempt}")
    ended = bench.finished("flaky", "Failed")
    message = condition(ended, "Finished")["message"]
    assert "attempt 3 of 3" in message
    assert "exit code 1" in message
    assert "boom number 3" in message
    job = bench.job_condition("flaky", "Failed", "AttemptsExhausted")
    assert outcomes(job) == ["Failed", "Failed", "Failed"]
    assert [a["exitCode"] for a in job["status"]["attempts"]] == [1, 1, 1]
    assert [j["metadata"]["name"] for j in bench.batch_jobs(offer)] == [
        f"{job['metadata']['name']}-{number}" for number in (1, 2, 3)
    ]
    bench.booked(node, 0)


def test_the_next_attempt_waits_for_the_backoff(bench: Bench) -> None:
    bench.node()
    bench.policy(attempts={"backoffSeconds": 2})
    bench.admitted("patient")
    bench.end(bench.run("patient"), 1)
    bench.bound_pod("patient", attempt=2)
    first, second = bench.training_job("patient")["status"]["attempts"]
    assert moment(second["createdAt"]) - moment(first["finishedAt"]) >= timedelta(seconds=2)


@pytest.mark.parametrize("code", [64, 65, 66, 74])
def test_an_exit_code_that_means_for_good_is_not_tried_again(bench: Bench, code: int) -> None:
    node = bench.node()
    bench.policy()
    offer = bench.admitted("hopeless")
    bench.end(bench.run("hopeless"), code, json.dumps({"exitCode": code, "reason": "BadData", "message": "no rows"}))
    ended = bench.finished("hopeless", "Failed")
    assert "BadData: no rows" in condition(ended, "Finished")["message"]
    assert outcomes(bench.training_job("hopeless")) == ["Failed"]
    assert len(bench.batch_jobs(offer)) == 1
    bench.booked(node, 0)


def test_a_stopped_pod_is_resumed_by_another_attempt(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("evicted")
    bench.end(bench.run("evicted"), 143, "checkpoint written")
    bench.run("evicted", attempt=2)
    assert outcomes(bench.training_job("evicted")) == ["Stopped", None]


def test_a_pod_that_somebody_deleted_without_grace_holds_its_gpus_until_it_has_ended(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    bench.admitted("robbed", 4)
    pod = bench.run("robbed")
    bench.kubelet.release(bench.namespace, pod)
    bench.asked_to_stop(pod)
    bench.booked(node, 4)
    bench.end(pod, 137)
    bench.run("robbed", attempt=2)
    assert outcomes(bench.training_job("robbed")) == ["Failed", None]


def test_a_container_that_never_starts_is_given_up(bench: Bench) -> None:
    bench.node()
    bench.policy(attempts={"startTimeoutSeconds": 8, "maxAttempts": 1})
    offer = bench.admitted("stuck")
    pod = bench.bound_pod("stuck")
    ended = bench.finished("stuck", "Failed")
    assert "did not start within 8 s" in condition(ended, "Finished")["message"]
    assert outcomes(bench.training_job("stuck")) == ["StartTimeout"]
    bench.asked_to_stop(pod)
    bench.kubelet.release(bench.namespace, pod)
    assert len(bench.pods(offer)) <= 1


def test_an_offer_made_inactive_stops_its_pod_and_is_cancelled_when_that_has_ended(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    offer = bench.admitted("first", 4)
    pod = bench.run("first")
    bench.offer("second", 4)
    bench.decided("second", "WaitingForCapacity")
    bench.patch("first", {"active": False})
    bench.asked_to_stop(pod)
    bench.job_condition("first", "Running", "Stopping")
    (job,) = bench.batch_jobs(offer)
    assert job["spec"]["suspend"] is True
    # The pod still runs, so nothing is free, whatever else happens meanwhile.
    bench.booked(node, 4)
    bench.offer("third", 4, model="microsoft/phi-4")
    bench.decided("third", "WaitingForCapacity")
    assert condition(bench.get("first"), "Finished") == {}
    assert condition(bench.get("second"), "Admitted")["reason"] == "WaitingForCapacity"
    bench.end(pod, 143, "checkpoint written")
    cancelled = bench.finished("first", "Cancelled")
    assert condition(cancelled, "Finished")["status"] == "True"
    assert outcomes(bench.job_condition("first", "Failed", "Cancelled")) == ["Stopped"]
    bench.decided("second", "Admitted")


def test_an_admitted_offer_can_be_cancelled_before_its_container_runs(bench: Bench) -> None:
    node = bench.node()
    bench.policy()
    bench.admitted("early", 2)
    pod = bench.bound_pod("early")
    bench.patch("early", {"active": False})
    bench.asked_to_stop(pod)
    bench.booked(node, 2)
    bench.end(pod, 143)
    bench.finished("early", "Cancelled")
    bench.booked(node, 0)


def test_deleting_an_offer_removes_all_of_it_and_keeps_its_gpus_until_the_pod_has_ended(bench: Bench) -> None:
    node = bench.node(gpus=4)
    bench.policy()
    offer = bench.admitted("first", 4)
    pod = bench.run("first")
    training = bench.path("trainingjobs", offer["status"]["admission"]["jobName"])
    (job,) = bench.batch_jobs(offer)
    bench.offer("second", 4)
    bench.decided("second", "WaitingForCapacity")
    bench.delete("first")
    bench.gone(
        bench.path("taskoffers", "first"),
        training,
        bench.path("jobs", job["metadata"]["name"], api="/apis/batch/v1"),
        bench.path("configmaps", job["metadata"]["name"], api="/api/v1"),
    )
    bench.asked_to_stop(pod)
    bench.booked(node, 4)
    bench.offer("third", 4, model="microsoft/phi-4")
    bench.decided("third", "WaitingForCapacity")
    assert condition(bench.get("second"), "Admitted")["reason"] == "WaitingForCapacity"
    bench.end(pod, 143)
    bench.gone(bench.path("pods", pod, api="/api/v1"))
    bench.decided("second", "Admitted")


def test_a_job_that_is_left_behind_by_a_deletion_is_stopped_and_gives_its_gpus_back(bench: Bench) -> None:
    bench.garbage_is_collected()
    node = bench.node(gpus=4)
    bench.policy()
    offer = bench.admitted("orphaned", 4)
    pod = bench.run("orphaned")
    training = bench.path("trainingjobs", offer["status"]["admission"]["jobName"])
    orphan = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Orphan"}
    bench.api.request("DELETE", bench.path("taskoffers", "orphaned"), orphan)
    bench.asked_to_stop(pod)
    bench.gone(bench.path("taskoffers", "orphaned"))
    bench.booked(node, 4)
    bench.end(pod, 143)
    bench.booked(node, 0)
    wait_until(
        lambda: bool(condition(bench.api.request("GET", training), "Failed")), "the end of what was kept", SECONDS
    )
    kept = condition(bench.api.request("GET", training), "Failed")
    assert (kept["reason"], kept["message"]) == ("Cancelled", "its offer is gone")
    bench.admitted("next", 4)


def test_an_offer_that_was_deleted_and_made_again_is_another_offer(bench: Bench) -> None:
    bench.node()
    bench.policy()
    first = bench.admitted("again")
    pod = bench.run("again")
    bench.delete("again")
    bench.gone(bench.path("taskoffers", "again"))
    second = bench.admitted("again")
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert second["status"]["admission"]["jobName"] != first["status"]["admission"]["jobName"]
    bench.end(pod, 143)
    bench.run("again")


def test_a_job_is_stopped_at_its_deadline(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("slow", seconds=12)
    pod = bench.run("slow")
    bench.asked_to_stop(pod)
    assert "the deadline" in condition(bench.job_condition("slow", "Running", "Stopping"), "Running")["message"]
    assert condition(bench.get("slow"), "Finished") == {}
    bench.end(pod, 143)
    ended = bench.finished("slow", "Failed")
    assert "the deadline" in condition(ended, "Finished")["message"]
    bench.job_condition("slow", "Failed", "DeadlineExceeded")


def test_with_a_training_clock_the_deadline_starts_with_the_container(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("timed", seconds=600, spec={"clockMode": "Training"})
    assert "deadline" not in bench.decided("timed", "Admitted")["status"]["admission"]
    pod = bench.run("timed")
    (attempt,) = bench.training_job("timed")["status"]["attempts"]
    assert moment(attempt["deadline"]) - moment(attempt["startedAt"]) == timedelta(seconds=600)
    bench.end(pod)
    bench.finished("timed", "Succeeded")


def test_a_training_job_of_the_wanted_name_is_not_adopted(bench: Bench) -> None:
    bench.policy()
    offer = bench.offer("taken")
    bench.decided("taken", "InventoryNotReady")
    name = f"taken-{offer['metadata']['uid'][:8]}"
    foreign = bench.foreign_training_job(name)
    bench.node()
    bench.decided("taken", "Admitted")
    told = bench.event("taken", "NameConflict")
    assert f"TrainingJob {bench.namespace}/{name} exists and belongs to another owner" in told["message"]
    kept = bench.api.request("GET", bench.path("trainingjobs", name))
    assert kept["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert kept["metadata"]["resourceVersion"] == foreign["metadata"]["resourceVersion"]
    assert bench.batch_jobs(offer) == []
    bench.api.request("DELETE", bench.path("trainingjobs", name))
    bench.bound_pod("taken")
    bench.keep_out_of_the_audit(foreign)


def test_a_job_of_the_wanted_name_is_not_adopted(bench: Bench) -> None:
    bench.policy()
    offer = bench.offer("taken")
    bench.decided("taken", "InventoryNotReady")
    name = f"taken-{offer['metadata']['uid'][:8]}-1"
    container = {"name": "other", "image": "other.invalid/x"}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    job = {"metadata": {"name": name}, "spec": {"suspend": True, "template": template}}
    made = bench.api.request("POST", bench.path("jobs", api="/apis/batch/v1"), job)
    bench.node()
    bench.decided("taken", "Admitted")
    told = bench.event(bench.training_job("taken")["metadata"]["name"], "NameConflict")
    assert told["type"] == "Warning"
    assert f"Job {bench.namespace}/{name} exists and belongs to another owner" in told["message"]
    kept = bench.api.request("GET", bench.path("jobs", name, api="/apis/batch/v1"))
    assert kept["metadata"]["uid"] == made["metadata"]["uid"]
    assert kept["spec"]["template"]["spec"]["containers"][0]["image"] == "other.invalid/x"


def test_a_job_that_a_quota_refuses_says_so_and_starts_when_there_is_room(bench: Bench) -> None:
    bench.node()
    bench.policy()
    quotas = bench.path("resourcequotas", api="/api/v1")
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    bench.api.request("POST", quotas, quota)
    wait_until(
        lambda: bool(bench.api.request("GET", f"{quotas}/none").get("status", {}).get("used")),
        "the quota counts",
        SECONDS,
    )
    with bench.audit.excused():
        offer = bench.admitted("refused")
        name = offer["status"]["admission"]["jobName"]
        told = bench.event(name, "JobRefused")
        assert f"the API server refuses Job {bench.namespace}/{name}-1" in told["message"]
        assert "exceeded quota: none" in told["message"]
        wait_until(
            lambda: condition(bench.training_job("refused"), "Running").get("reason") == "JobRefused",
            "it is said",
            SECONDS,
        )
        assert bench.batch_jobs(offer) == []
        bench.api.request("DELETE", f"{quotas}/none")
        bench.run("refused")


def test_a_job_that_somebody_deletes_is_made_up_for_by_another_attempt(bench: Bench) -> None:
    bench.node()
    bench.policy()
    offer = bench.admitted("robbed", 2)
    pod = bench.run("robbed")
    (job,) = bench.batch_jobs(offer)
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
    bench.api.request("DELETE", bench.path("jobs", job["metadata"]["name"], api="/apis/batch/v1"), options)
    bench.asked_to_stop(pod)
    bench.end(pod, 143)
    bench.run("robbed", attempt=2)


def test_an_admitted_offers_spec_is_frozen_but_for_its_activity(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.admitted("frozen")
    with pytest.raises(ApiError) as refused:
        bench.patch("frozen", {"expiresAt": "2099-01-01T00:00:00Z"})
    assert refused.value.status == 422
