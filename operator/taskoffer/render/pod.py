"""What the pods of a job have in common, whoever's trainer runs in them."""

from __future__ import annotations

from typing import Any

from taskoffer.api.v1alpha1.trainingjob import Attempt, Run, TrainingJob
from taskoffer.render.claims import container_claims, is_pinned, pod_claims
from taskoffer.render.names import TRAINER_UID
from taskoffer.render.quantity import times

Manifest = dict[str, Any]


def training_pod(
    job: TrainingJob, attempt: Attempt, container: Manifest, volumes: list[Manifest], grace_seconds: int
) -> Manifest:
    """Return the spec of a training pod on the decided node: without a token, restricted, as the policy says."""
    run = job.spec.run
    pod = run.pod
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": pod_security(),
        "affinity": _pin([a.node_name for a in attempt.assignments]),
        "containers": [container],
        "volumes": volumes,
    }
    if claims := pod_claims(attempt):
        spec["resourceClaims"] = claims
    if pod.tolerations:
        spec["tolerations"] = [t.to_wire() for t in pod.tolerations]
    if pod.service_account_name:
        spec["serviceAccountName"] = pod.service_account_name
    if pod.runtime_class_name:
        spec["runtimeClassName"] = pod.runtime_class_name
    if pod.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in pod.image_pull_secrets]
    if run.priority_class_name:
        spec["priorityClassName"] = run.priority_class_name
    return spec


def pod_security() -> Manifest:
    """Return the security context of every pod of a job: the restricted pod security standard."""
    return {
        "runAsNonRoot": True,
        "runAsUser": TRAINER_UID,
        "runAsGroup": TRAINER_UID,
        "fsGroup": TRAINER_UID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def restricted() -> Manifest:
    """Return the security context of every container of a job."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _pin(nodes: list[str]) -> Manifest:
    """Tie the pod to the decided node; the scheduler would undo the packing otherwise."""
    return {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": nodes}]},
                ]
            }
        }
    }


def training_resources(run: Run, attempt: Attempt) -> Manifest:
    """Return what the training's container asks for: its GPUs, and CPU and memory for each of them."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if run.pod.cpu_per_gpu:
        requests["cpu"] = times(run.pod.cpu_per_gpu, run.gpus)
    if run.pod.memory_per_gpu:
        requests["memory"] = limits["memory"] = times(run.pod.memory_per_gpu, run.gpus)
    for assignment in attempt.assignments:
        if not is_pinned(assignment):
            requests[assignment.resource_name] = limits[assignment.resource_name] = str(assignment.count)
    claims = container_claims(attempt)
    return {"requests": requests, "limits": limits, **({"claims": claims} if claims else {})}


def shared_memory(run: Run) -> tuple[list[Manifest], list[Manifest]]:
    """Return volume and mount of ``/dev/shm``, where the policy gives it a size."""
    if not run.pod.shared_memory_per_gpu:
        return [], []
    size = times(run.pod.shared_memory_per_gpu, run.gpus)
    volume = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    return [volume], [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
