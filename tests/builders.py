"""Builders of objects in wire form, for every rung: sane defaults, and a keyword for what a test is about.

    make_offer(task_type="DPO", hours=12, gpus=4)
    make_policy(name="lab", filters={"maxConcurrentJobs": 2})
    stored(make_offer(), uid="u-1", created="2026-01-31T12:00:00Z")

An argument that is ``None`` leaves its field out. ``spec`` (and every keyword of ``make_policy``) is merged
into the object, dictionary by dictionary; lists and plain values replace what was there."""

from __future__ import annotations

import copy
import functools
from typing import Any

API_VERSION = "taskoffer.dev/v1alpha1"
Object = dict[str, Any]

DATASETS: dict[str, Object] = {
    "InstructText": {
        "type": "Instruct",
        "instruct": {"fieldInstruction": "instruction", "fieldOutput": "output"},
    },
    "Chat": {"type": "Chat", "chat": {"chatColumn": "conversations"}},
    "DPO": {"type": "DPO", "dpo": {"fieldPrompt": "prompt"}},
    "GRPO": {
        "type": "GRPO",
        "grpo": {
            "fieldPrompt": "prompt",
            "rewardFunctions": [
                {
                    "name": "length",
                    "source": "def length(completions, **kw):\n    return [len(c) for c in completions]\n",
                }
            ],
        },
    },
    "Image": {"type": "Image", "image": {"resolution": 1024}},
}
"""A dataset that fits each task type."""


def claim(name: str, path: str = "") -> Object:
    """Return a source or an output that lies on a claim."""
    return {"persistentVolumeClaim": _present({"claimName": name, "path": path or None})}


def make_offer(
    *,
    name: str = "offer",
    namespace: str | None = "default",
    task_id: str | None = None,
    task_type: str = "InstructText",
    model: str = "meta-llama/Llama-3.1-8B",
    parameters: int | None = None,
    architecture: str | None = None,
    hours: float = 1.0,
    seconds: int | None = None,
    gpus: int | None = None,
    policy: str | None = None,
    dataset: Object | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    output: Object | None = None,
    active: bool | None = None,
    expires_at: str | None = None,
    priority_class: str | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    spec: Object | None = None,
    status: Object | None = None,
) -> Object:
    """Return a TaskOffer. ``seconds`` wins over ``hours``; ``task_id`` is the name unless given."""
    if architecture is None and task_type == "Image":
        architecture = "sdxl"
    fields = {
        "taskID": name if task_id is None else task_id,
        "taskType": task_type,
        "model": _present(
            {"name": model, "parameters": parameters, "architecture": architecture, "source": claim("models")}
        ),
        "dataset": _present(
            {**DATASETS[task_type], "source": claim("data"), "rows": rows, "tokens": tokens}
            if dataset is None
            else dataset
        ),
        "timeLimitSeconds": round(hours * 3600) if seconds is None else seconds,
        "gpuCount": gpus,
        "policyName": policy,
        "output": claim("outputs") if output is None else output,
        "active": active,
        "expiresAt": expires_at,
        "priorityClassName": priority_class,
    }
    made: Object = {
        "apiVersion": API_VERSION,
        "kind": "TaskOffer",
        "metadata": _present({"name": name, "namespace": namespace, "labels": labels, "annotations": annotations}),
        "spec": merged(_present(fields), spec or {}),
    }
    if status is not None:
        made["status"] = status
    return copy.deepcopy(made)


def make_policy(
    *,
    name: str = "lab",
    preset: str = "lab",
    default: bool = True,
    spec: Object | None = None,
    status: Object | None = None,
    **fields: Any,
) -> Object:
    """Return a CapacityPolicy made from a preset; further keywords are merged into spec fields of their name.

    Field names may be given in snake_case: ``size_classes=[...]`` replaces ``spec.sizeClasses``.
    """
    loaded = _preset(preset)
    base = loaded.get("spec", loaded)
    extra = {_camel(key): value for key, value in fields.items()}
    made: Object = {
        "apiVersion": API_VERSION,
        "kind": "CapacityPolicy",
        "metadata": {"name": name},
        "spec": merged(merged(base, extra), spec or {}),
    }
    if default:
        made["metadata"]["annotations"] = {"taskoffer.dev/is-default-policy": "true"}
    if status is not None:
        made["status"] = status
    return copy.deepcopy(made)


@functools.cache
def _preset(name: str) -> Object:
    from taskoffer import presets  # Imported late: schema tests need the other builders only.

    return presets.load(name)


def make_training_job(
    *,
    name: str = "offer-0123abcd",
    namespace: str = "default",
    offer: str = "offer",
    offer_uid: str = "0123abcd-0000-4000-8000-000000000000",
    gpus: int = 1,
    spec: Object | None = None,
    status: Object | None = None,
) -> Object:
    """Return a TrainingJob of an instruction task, as the operator would render it for ``make_offer()``."""
    settings: Object = {
        "lora": {"r": 16, "loraAlpha": 32},
        "train": {"maxSteps": 20, "evalSteps": 5, "saveSteps": 5},
    }
    run = {
        "taskID": offer,
        "taskType": "InstructText",
        "gpus": gpus,
        "model": {"name": "meta-llama/Llama-3.1-8B"},
        "dataset": DATASETS["InstructText"],
        "clockMode": "Absolute",
        "timeLimitSeconds": 3600,
        "policyRef": {"name": "lab", "uid": "policy-uid", "generation": 1},
        "requested": settings,
        "effective": settings,
        "pod": {"image": "trainer:test", "terminationGraceSeconds": 30},
        "limits": {"maxAttempts": 3, "backoffSeconds": 1, "startTimeoutSeconds": 60},
    }
    made: Object = {
        "apiVersion": API_VERSION,
        "kind": "TrainingJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": merged({"offerRef": {"name": offer, "uid": offer_uid}, "run": run}, spec or {}),
    }
    if status is not None:
        made["status"] = status
    return copy.deepcopy(made)


def make_admission(
    *,
    job: str = "offer-0123abcd",
    node: str = "node-a",
    gpus: int = 1,
    resource: str = "nvidia.com/gpu",
    policy: str = "lab",
    policy_uid: str = "policy-uid",
    generation: int = 1,
    decided_at: str = "2026-01-31T12:00:00Z",
    deadline: str | None = None,
    lane: str | None = None,
) -> Object:
    """Return ``status.admission`` of an offer whose GPUs lie on one node."""
    return _present(
        {
            "policyRef": {"name": policy, "uid": policy_uid, "generation": generation},
            "jobName": job,
            "decidedAt": decided_at,
            "deadline": deadline,
            "assignments": [_present({"nodeName": node, "resourceName": resource, "count": gpus, "lane": lane})],
        }
    )


def make_condition(kind: str, status: bool, reason: str, message: str = "", at: str = "2026-01-31T12:00:00Z") -> Object:
    """Return one condition."""
    return {
        "type": kind,
        "status": str(status),
        "reason": reason,
        "message": message,
        "lastTransitionTime": at,
    }


def make_node(
    name: str = "node-a",
    *,
    gpus: int = 8,
    ready: bool = True,
    unschedulable: bool = False,
    resource: str = "nvidia.com/gpu",
    labels: dict[str, str] | None = None,
) -> Object:
    """Return a Node whose GPUs are all allocatable."""
    made: Object = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {"unschedulable": True} if unschedulable else {},
        "status": {
            "capacity": {resource: str(gpus), "cpu": "64", "memory": "1024Gi", "pods": "110"},
            "allocatable": {resource: str(gpus), "cpu": "64", "memory": "1024Gi", "pods": "110"},
            "conditions": [
                {
                    "type": "Ready",
                    "status": str(ready),
                    "reason": "Test",
                    "message": "",
                    "lastHeartbeatTime": "2026-01-31T12:00:00Z",
                    "lastTransitionTime": "2026-01-31T12:00:00Z",
                }
            ],
        },
    }
    return made


def make_pod_template(
    *, gpus: int = 1, node: str | None = "node-a", resource: str = "nvidia.com/gpu", labels: Object | None = None
) -> Object:
    """Return a pod template that asks for GPUs and is pinned to a node by its name."""
    container: Object = {"name": "train", "image": "trainer:test"}
    if gpus:
        container["resources"] = {"limits": {resource: str(gpus)}, "requests": {resource: str(gpus)}}
    spec: Object = {"containers": [container], "restartPolicy": "Never"}
    if node is not None:
        term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
        required = {"nodeSelectorTerms": [term]}
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    return {"metadata": {"labels": labels or {}}, "spec": spec}


def make_job(
    *,
    training_job: str = "offer-0123abcd",
    offer_uid: str | None = "0123abcd-0000-4000-8000-000000000000",
    namespace: str = "default",
    gpus: int = 1,
    node: str | None = "node-a",
    attempt: int = 1,
    status: Object | None = None,
) -> Object:
    """Return a batch/v1 Job with the labels and the pin that the operator gives it."""
    labels = {} if offer_uid is None else {"taskoffer.dev/offer-uid": offer_uid, "taskoffer.dev/job": training_job}
    made: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{training_job}-{attempt}", "namespace": namespace, "labels": labels},
        "spec": {
            "completions": 1,
            "backoffLimit": 0,
            "template": make_pod_template(gpus=gpus, node=node, labels=labels),
        },
    }
    if status is not None:
        made["status"] = status
    return made


def make_pod(
    name: str = "foreign",
    *,
    namespace: str = "default",
    gpus: int = 1,
    node: str | None = "node-a",
    phase: str = "Running",
    labels: dict[str, str] | None = None,
    job_uid: str | None = None,
) -> Object:
    """Return a Pod that is bound to a node; without labels it is foreign. ``job_uid`` makes a Job its owner."""
    template = make_pod_template(gpus=gpus, node=None)
    bound = {} if node is None else {"nodeName": node}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "job", "uid": job_uid, "controller": True}
    owners = {} if job_uid is None else {"ownerReferences": [owner]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}, **owners},
        "spec": {**template["spec"], **bound},
        "status": {"phase": phase},
    }


def stored(
    made: Object,
    *,
    uid: str = "0123abcd-0000-4000-8000-000000000000",
    resource_version: str = "1",
    generation: int = 1,
    created: str = "2026-01-31T12:00:00Z",
    deleted: str | None = None,
) -> Object:
    """Return the object as the API server hands it out: with UID, resource version and creation time."""
    meta = {
        **made["metadata"],
        "uid": uid,
        "resourceVersion": resource_version,
        "generation": generation,
        "creationTimestamp": created,
        "deletionTimestamp": deleted,
    }
    return {**copy.deepcopy(made), "metadata": _present(meta)}


def merged(base: Object, over: Object) -> Object:
    """Return ``base`` with ``over`` laid on it; dictionaries are merged, ``None`` removes a field."""
    made = copy.deepcopy(base)
    for key, value in over.items():
        if value is None:
            made.pop(key, None)
        elif isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = merged(made[key], value)
        else:
            made[key] = copy.deepcopy(value)
    return made


def _present(fields: Object) -> Object:
    return {key: value for key, value in fields.items() if value is not None}


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)
