"""ConfigMap, ResourceClaim and batch/v1 Job of an attempt."""

from __future__ import annotations

import json
from typing import Any

from taskoffer.api.contract import CONFIG_PATH, PROGRESS_PORT
from taskoffer.api.v1alpha1.meta import API_VERSION, ClaimPath
from taskoffer.api.v1alpha1.trainingjob import Attempt, PodSettings, Run, TrainingJob
from taskoffer.render.claims import claim_spec, container_claims, is_pinned, pod_claims
from taskoffer.render.names import (
    ATTEMPT_LABEL,
    CONTAINER,
    DATASET_DIR,
    DEVICES_ANNOTATION,
    JOB_LABEL,
    LANE_LABEL,
    MANAGED_BY,
    MODEL_DIR,
    NODE_ANNOTATION,
    OFFER_UID_LABEL,
    OUTPUT_DIR,
    POLICY_LABEL,
    RUN_DIR,
    TRAINER_UID,
    label_value,
)
from taskoffer.render.quantity import times
from taskoffer.render.trainingjob import run_config

Manifest = dict[str, Any]

_LONGEST_SECONDS = 2**31 - 1
"""Kubernetes counts the time of a Job in nanoseconds, which overflow after 292 years."""
_DEADLINE_RESERVE_SECONDS = 60
"""The kubelet ends the pod this long after the deadline, in case that neither trainer nor operator did."""


def config_map(job: TrainingJob, attempt: Attempt, number: int) -> Manifest:
    """Return the immutable ConfigMap that carries the attempt's RunConfig."""
    config = run_config(job, attempt, number).to_wire()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": attempt.job_name,
            "namespace": job.metadata.namespace,
            "labels": _labels(job, attempt, number),
            "ownerReferences": [_owner(job)],
        },
        "immutable": True,
        "data": {CONFIG_PATH.rsplit("/", 1)[-1]: json.dumps(config, indent=2, sort_keys=True)},
    }


def resource_claim(job: TrainingJob, attempt: Attempt, number: int) -> Manifest | None:
    """Return the ResourceClaim for the chosen GPUs of an attempt, or None where the device plugin chooses them."""
    spec = claim_spec(attempt.assignments)
    if spec is None:
        return None
    keys = (key for assignment in attempt.assignments for key in assignment.device_keys)
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {
            "name": attempt.job_name,
            "namespace": job.metadata.namespace,
            "labels": _labels(job, attempt, number),
            "annotations": {
                NODE_ANNOTATION: attempt.assignments[0].node_name,
                DEVICES_ANNOTATION: ",".join(keys),
            },
            "ownerReferences": [_owner(job)],
        },
        "spec": spec,
    }


def attempt_job(job: TrainingJob, attempt: Attempt, number: int) -> Manifest:
    """Return the batch/v1 Job of an attempt: one pod, never retried by Kubernetes itself, on the decided node.

    Retrying is the operator's: each attempt is a Job of its own, so that its GPUs are booked before it exists.
    """
    spec: Manifest = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": {
            "metadata": {"labels": _labels(job, attempt, number)},
            "spec": _pod_spec(job.spec.run, attempt),
        },
    }
    if job.spec.run.ttl_seconds_after_finished is not None:
        spec["ttlSecondsAfterFinished"] = job.spec.run.ttl_seconds_after_finished
    if attempt.deadline is not None:
        left = (attempt.deadline - attempt.created_at).total_seconds()
        spec["activeDeadlineSeconds"] = min(max(1, int(left)) + _DEADLINE_RESERVE_SECONDS, _LONGEST_SECONDS)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": attempt.job_name,
            "namespace": job.metadata.namespace,
            "labels": _labels(job, attempt, number),
            "ownerReferences": [_owner(job)],
        },
        "spec": spec,
    }


def _owner(job: TrainingJob) -> Manifest:
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainingJob",
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _labels(job: TrainingJob, attempt: Attempt, number: int) -> dict[str, str]:
    labels = {
        **MANAGED_BY,
        OFFER_UID_LABEL: job.spec.offer_ref.uid,
        JOB_LABEL: job.metadata.name,
        ATTEMPT_LABEL: str(number),
        POLICY_LABEL: label_value(job.spec.run.policy_ref.name),
    }
    lane = attempt.assignments[0].lane
    return {**labels, LANE_LABEL: label_value(lane)} if lane else labels


def _pod_spec(run: Run, attempt: Attempt) -> Manifest:
    pod = run.pod
    volumes, mounts = _volumes(run, attempt, pod)
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pod.termination_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": TRAINER_UID,
            "runAsGroup": TRAINER_UID,
            "fsGroup": TRAINER_UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": _pin([a.node_name for a in attempt.assignments]),
        "containers": [_container(run, attempt, mounts)],
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


def _container(run: Run, attempt: Attempt, mounts: list[Manifest]) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": run.pod.image,
        "args": ["--config", CONFIG_PATH],
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "resources": _resources(run, attempt),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    if run.pod.image_pull_policy:
        container["imagePullPolicy"] = run.pod.image_pull_policy
    return container


def _resources(run: Run, attempt: Attempt) -> Manifest:
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


def _volumes(run: Run, attempt: Attempt, pod: PodSettings) -> tuple[list[Manifest], list[Manifest]]:
    volumes: list[Manifest] = [
        {"name": "run", "configMap": {"name": attempt.job_name}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [
        {"name": "run", "mountPath": RUN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
    ]
    if pod.shared_memory_per_gpu:
        size = times(pod.shared_memory_per_gpu, run.gpus)
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108
    claims: list[tuple[str, str, ClaimPath | None, bool]] = [
        ("model", MODEL_DIR, run.model.source.persistent_volume_claim if run.model.source else None, True),
        (
            "dataset",
            DATASET_DIR,
            run.dataset.source.persistent_volume_claim if run.dataset.source else None,
            True,
        ),
        ("output", OUTPUT_DIR, run.output.persistent_volume_claim if run.output else None, False),
    ]
    for name, path, claim, read_only in claims:
        if claim is None:
            continue
        # Whether a volume is read-only is a matter of the mount: two volumes of one pod may use the same claim.
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim.claim_name}})
        mounts.append({"name": name, "mountPath": path, "readOnly": read_only})
    return volumes, mounts
