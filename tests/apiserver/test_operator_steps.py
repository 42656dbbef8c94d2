"""The steps around a training on a real API server: a step that asks to be started again gets another Job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from operator_bench import SECONDS, Bench
from taskoffer_lab.process_table import wait_until

pytestmark = pytest.mark.usefixtures("operator")

FETCHED: dict[str, Any] = {"dataset": {"source": {"persistentVolumeClaim": None, "hub": {"name": "acme/rows"}}}}
ASKS = json.dumps({"exitCode": 138, "reason": "CacheFull", "message": "Try again when jobs have ended"})
DONE = json.dumps({"exitCode": 0, "reason": "Completed", "message": "1 item"})


def pod_of(bench: Bench, job: str) -> str:
    """Wait until the pod of a Job is bound to a node; return its name."""
    found: list[str] = []

    def bound() -> bool:
        path = bench.path("pods", api="/api/v1") + f"?labelSelector=batch.kubernetes.io/job-name={job}"
        pods = bench.api.request("GET", path)["items"]
        found[:] = [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName")]
        return bool(found)

    wait_until(bound, f"the pod of {job} bound", SECONDS)
    return found[0]


def prepare_of(bench: Bench, offer: str) -> dict[str, Any]:
    steps = bench.training_job(offer).get("status", {}).get("steps", [])
    return next((step for step in steps if step["name"] == "Prepare"), {})


def test_a_step_that_asks_to_be_started_again_is_begun_anew_after_a_pause_and_the_training_follows(
    bench: Bench,
) -> None:
    bench.node()
    bench.policy(
        steps={"cache": {"claimName": "models"}, "backoffLimit": 0, "backoffSeconds": 1, "backoffMaxSeconds": 2}
    )
    offer = bench.admitted("waiting", spec=FETCHED)
    name = offer["status"]["admission"]["jobName"]
    for failures, job in enumerate((f"{name}-prepare", f"{name}-pre-1", f"{name}-pre-2"), 1):
        pod = pod_of(bench, job)
        bench.kubelet.start(bench.namespace, pod)
        if failures == 3:
            bench.end(pod, 0, DONE)
            break
        bench.end(pod, 138, ASKS)
        wait_until(lambda n=failures: prepare_of(bench, "waiting").get("failures") == n, "the pause told", SECONDS)
        assert "CacheFull: Try again when jobs have ended" in prepare_of(bench, "waiting")["message"]
    bench.bound_pod("waiting")
    prepared = prepare_of(bench, "waiting")
    assert (prepared["state"], prepared["failures"], prepared.get("nextTryAt")) == ("Succeeded", 2, None)
    events = bench.api.request("GET", bench.path("events", api="/api/v1"))["items"]
    told = [event["message"] for event in events if event["reason"] == "StepPaused"]
    assert {text.partition(":")[0] for text in told} == {"try 1", "try 2"}
    # The Jobs of the tries before are not kept.
    bench.gone(bench.path("jobs", f"{name}-prepare", api="/apis/batch/v1"))
    kept = bench.api.request("GET", bench.path("configmaps", api="/api/v1"))["items"]
    of_steps = [one["metadata"]["name"] for one in kept if "taskoffer.dev/step" in one["metadata"].get("labels", {})]
    assert of_steps == [f"{name}-prepare"], "no try leaves one of its own"


def test_an_end_that_would_come_again_fails_the_task_at_once(bench: Bench) -> None:
    bench.node()
    bench.policy(steps={"cache": {"claimName": "models"}, "backoffLimit": 0})
    offer = bench.admitted("denied", spec=FETCHED)
    pod = pod_of(bench, f"{offer['status']['admission']['jobName']}-prepare")
    bench.kubelet.start(bench.namespace, pod)
    bench.end(pod, 77, json.dumps({"exitCode": 77, "reason": "AccessDenied", "message": "no token"}))
    bench.finished("denied", "Failed")
    step = prepare_of(bench, "denied")
    assert (step["state"], step.get("failures")) == ("Failed", None)
    assert "AccessDenied: no token" in step["message"]
