"""Trainers that offers bring along, on a real API server: their Jobs are taken, and their time is really over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from operator_bench import SECONDS, Bench, condition
from taskoffer_lab.process_table import wait_until

pytestmark = pytest.mark.usefixtures("operator")

COMMIT = "ab" * 20
IMAGE: dict[str, Any] = {"trainer": {"image": "registry.example.com/mine:1"}}
REPOSITORY: dict[str, Any] = {
    "trainer": {"repository": {"url": "https://git.example.com/team/mine", "commit": COMMIT, "entrypoint": "a/b.py"}}
}


def allow(bench: Bench, **steps: Any) -> None:
    bench.policy(
        steps={"cache": {"claimName": "models"}, **steps},
        trainers={
            "images": ["registry.example.com/*"],
            "repositories": ["https://git.example.com/team/"],
            "ephemeralStorage": "10Gi",
        },
    )


def step_pod(bench: Bench, step: str) -> str:
    """Wait until the pod of a step is bound to a node; return its name."""
    found: list[str] = []

    def bound() -> bool:
        path = bench.path("pods", api="/api/v1") + f"?labelSelector=taskoffer.dev/step={step}"
        pods = bench.api.request("GET", path)["items"]
        found[:] = [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName")]
        return bool(found)

    wait_until(bound, f"the pod of {step} bound", SECONDS)
    return found[0]


def test_a_policy_that_says_nothing_of_trainers_takes_none(bench: Bench) -> None:
    bench.node()
    bench.policy()
    bench.offer("brought", spec=IMAGE)
    offer = bench.decided("brought", "TrainerNotAllowed")
    assert "lets no offer bring its own trainer" in condition(offer, "Admitted")["message"]


def test_the_server_takes_the_job_of_an_image_and_the_scheduler_its_pod(bench: Bench) -> None:
    bench.node()
    allow(bench)
    offer = bench.admitted("brought", 2, spec={**IMAGE, "taskID": "market:7"})
    bench.bound_pod("brought")
    (pod,) = bench.pods(offer)
    (container,), (folders,) = pod["spec"]["containers"], pod["spec"]["initContainers"]
    assert (container["image"], folders["command"][0]) == ("registry.example.com/mine:1", "mkdir")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert container["resources"]["limits"]["ephemeral-storage"] == "10Gi"
    name = offer["status"]["admission"]["jobName"]
    assert f"/app/checkpoints/market-7/{name}" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert not bench.api.exists(bench.path("configmaps", f"{name}-1", api="/api/v1"))
    assert bench.training_job("brought")["spec"]["run"]["trainer"]["image"] == "registry.example.com/mine:1"


def test_a_repository_is_fetched_before_its_job_is_made(bench: Bench) -> None:
    bench.node()
    allow(bench)
    offer = bench.admitted("brought", spec=REPOSITORY)
    fetching = step_pod(bench, "prepare")
    name = offer["status"]["admission"]["jobName"]
    config = bench.api.request("GET", bench.path("configmaps", f"{name}-prepare", api="/api/v1"))["data"]
    (item,) = json.loads(config["prepare.json"])["items"]
    assert item["source"] == {"git": REPOSITORY["trainer"]["repository"]}
    assert bench.pods(offer) == []
    bench.kubelet.start(bench.namespace, fetching)
    bench.end(fetching, 0, json.dumps({"exitCode": 0, "reason": "Completed", "message": "1 item"}))
    bench.bound_pod("brought")
    (pod,) = bench.pods(offer)
    assert pod["spec"]["containers"][0]["command"] == ["python", "/app/trainer/a/b.py"]


def test_one_that_does_not_end_is_stopped_in_time_to_look_at_what_it_has_left(bench: Bench) -> None:
    node = bench.node()
    allow(bench, submitSeconds=300)
    offer = bench.admitted("endless", spec={**IMAGE, "timeLimitSeconds": 308})
    pod = bench.run("endless")
    bench.asked_to_stop(pod)
    bench.booked(node, 1)
    bench.end(pod, 137)
    looking = step_pod(bench, "submit")
    bench.booked(node, 0)
    said = {"adapterDir": "/data/output/x/adapter", "adapterSha256": "ab" * 32}
    published = {"published": {"to": "/data/output/x/adapter", "files": 1, "bytes": 1}}
    bench.kubelet.start(bench.namespace, looking)
    bench.end(looking, 0, json.dumps({"exitCode": 0, "reason": "Completed", "message": "ok", **said, **published}))
    done = bench.finished("endless", "Succeeded")
    assert condition(done, "Finished")["message"] == "trained and verified"
    (job,) = bench.batch_jobs(offer)
    assert job["spec"]["suspend"] is True
    (attempt,) = bench.training_job("endless")["status"]["attempts"]
    assert attempt["outcome"] == "Succeeded"
