"""The part of kubelet and Job controller for a job of one attempt and its submit step, in tests with a fake server."""

from __future__ import annotations

import json

from fake_replica import Rig, start_pod
from taskoffer.adapters.kube import BATCH_JOBS, JOBS_OF_TRAINING, PODS, Object

JOB = "a-a-uid"
"""TrainingJob of the offer a."""


async def created(rig: Rig, name: str) -> Object:
    await rig.until(lambda: any(j["metadata"]["name"] == name for j in rig.kube.all(BATCH_JOBS)), seconds=4000)
    return rig.kube.get_now(BATCH_JOBS, name)


async def prepares(rig: Rig, name: str = JOB) -> None:
    """Play the step before the training: what is to be trained lies on claims, and the target may be written to."""
    ends(rig, await created(rig, f"{name}-prepare"), 0, {"reason": "Completed", "message": "0 items are ready"})


async def trains(rig: Rig, name: str = JOB) -> Object:
    """Play the kubelet: the container of the first attempt runs."""
    job = await created(rig, f"{name}-1")
    start_pod(rig.kube, job, podIP="10.0.0.9")

    def runs() -> bool:
        (training,) = [j for j in rig.kube.all(JOBS_OF_TRAINING) if j["metadata"]["name"] == name]
        return any(attempt.get("startedAt") for attempt in training.get("status", {}).get("attempts", ()))

    await rig.until(runs)
    return job


def ends(rig: Rig, job: Object, code: int, said: Object) -> None:
    """Play Job controller and kubelet: a step has ended."""
    name, terminated = job["metadata"]["name"], {"exitCode": code, "message": json.dumps({"exitCode": code, **said})}
    status = {"name": "step", "state": {"terminated": {**terminated, "startedAt": "2026-01-31T12:55:00Z"}}}
    pod = {
        "metadata": {
            "name": f"{name}-pod",
            "namespace": "default",
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "ownerReferences": [{"kind": "Job", "name": name, "uid": job["metadata"]["uid"]}],
        },
        "spec": {},
        "status": {"phase": "Failed" if code else "Succeeded", "containerStatuses": [status]},
    }
    rig.kube.put(PODS, pod)
    ending = {"type": "Failed" if code else "Complete", "status": "True"}
    rig.kube.change(BATCH_JOBS, name, {"status": {"conditions": [ending]}})
