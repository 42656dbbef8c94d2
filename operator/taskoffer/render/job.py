"""ConfigMap, ResourceClaim and batch/v1 Job of an attempt."""

from __future__ import annotations

import json
from typing import Any

from taskoffer.api.contract import CONFIG_PATH, POD_UID_VARIABLE, PROGRESS_PORT, TUNING_PATH, job_folder
from taskoffer.api.v1alpha1.meta import API_VERSION, ClaimPath
from taskoffer.api.v1alpha1.trainingjob import Attempt, Run, TrainingJob
from taskoffer.decision.own_trainer import starts_its_clock
from taskoffer.decision.step_needs import data_claim, is_fetched, model_claim, output_claim
from taskoffer.render.claims import claim_spec
from taskoffer.render.names import (
    ATTEMPT_LABEL,
    CACHE_DIR,
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
    STEP_LABEL,
    TUNING_ANNOTATION,
    label_value,
)
from taskoffer.render.own_trainer import own_pod_spec
from taskoffer.render.pod import restricted, shared_memory, training_pod, training_resources
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
            "ownerReferences": [owner_of(job)],
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
            "ownerReferences": [owner_of(job)],
        },
        "spec": spec,
    }


def attempt_job(job: TrainingJob, attempt: Attempt, number: int, seconds: int | None = None) -> Manifest:
    """Return the batch/v1 Job of an attempt: one pod, never retried by Kubernetes itself, on the decided node.

    Retrying is the operator's: each attempt is a Job of its own, so that its GPUs are booked before it exists.

    Args:
        job: The TrainingJob.
        attempt: The attempt.
        number: Its number, from 1.
        seconds: What the attempt has left when its Job is made; None where only the operator counts, from the start of
            the container.
    """
    spec: Manifest = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": {
            "metadata": {"labels": {**_labels(job, attempt, number), STEP_LABEL: "train"}},
            "spec": _pod_spec(job, attempt, seconds),
        },
    }
    if job.spec.run.ttl_seconds_after_finished is not None:
        spec["ttlSecondsAfterFinished"] = job.spec.run.ttl_seconds_after_finished
    if (left := _seconds_left(job.spec.run, attempt, seconds)) is not None:
        spec["activeDeadlineSeconds"] = min(left + _DEADLINE_RESERVE_SECONDS, _LONGEST_SECONDS)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": attempt.job_name,
            "namespace": job.metadata.namespace,
            "labels": _labels(job, attempt, number),
            "ownerReferences": [owner_of(job)],
        },
        "spec": spec,
    }


def _seconds_left(run: Run, attempt: Attempt, seconds: int | None) -> int | None:
    """Return how long an attempt may take; None where only the operator counts, from the start of the container."""
    if seconds is None or run.trainer is None:
        return seconds
    # Nothing inside of that pod ends it when the operator is away.
    return seconds + (run.limits.start_timeout_seconds if starts_its_clock(run, attempt) else 0)


def owner_of(job: TrainingJob) -> Manifest:
    """Return the owner reference that makes an object go with its TrainingJob."""
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


def _pod_spec(job: TrainingJob, attempt: Attempt, seconds: int | None) -> Manifest:
    run = job.spec.run
    if run.trainer is not None:
        return own_pod_spec(job, attempt, seconds if seconds is not None else run.time_limit_seconds)
    volumes, mounts = _volumes(job, attempt)
    container = _container(run, attempt, mounts)
    return training_pod(job, attempt, container, volumes, run.pod.termination_grace_seconds)


def _container(run: Run, attempt: Attempt, mounts: list[Manifest]) -> Manifest:
    container: Manifest = {
        "name": CONTAINER,
        "image": run.pod.image,
        "args": ["--config", CONFIG_PATH],
        "env": [{"name": POD_UID_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}],
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "resources": training_resources(run, attempt),
        "securityContext": restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    if run.pod.image_pull_policy:
        container["imagePullPolicy"] = run.pod.image_pull_policy
    return container


def _tuning_item() -> Manifest:
    return {
        "path": TUNING_PATH.rpartition("/")[2],
        "fieldRef": {"fieldPath": f"metadata.annotations['{TUNING_ANNOTATION}']"},
    }


def _volumes(job: TrainingJob, attempt: Attempt) -> tuple[list[Manifest], list[Manifest]]:
    run, shm = job.spec.run, shared_memory(job.spec.run)
    volumes: list[Manifest] = [
        {"name": "run", "configMap": {"name": attempt.job_name}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "tuning", "downwardAPI": {"items": [_tuning_item()]}},
    ]
    mounts: list[Manifest] = [
        {"name": "run", "mountPath": RUN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        # A folder and never a subPath: the kubelet renews only whole folders while the pod runs.
        {"name": "tuning", "mountPath": TUNING_PATH.rpartition("/")[0], "readOnly": True},
    ]
    volumes, mounts = [*volumes, *shm[0]], [*mounts, *shm[1]]
    claims: list[tuple[str, str, ClaimPath | None, bool]] = [
        ("model", MODEL_DIR, model_claim(run.model), True),
        ("dataset", DATASET_DIR, data_claim(run.dataset), True),
        ("output", OUTPUT_DIR, output_claim(run.output, run.steps), False),
    ]
    for name, path, claim, read_only in claims:
        if claim is None:
            continue
        # Whether a volume is read-only is a matter of the mount: two volumes of one pod may use the same claim.
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim.claim_name}})
        mounts.append({"name": name, "mountPath": path, "readOnly": read_only})
    if run.steps is not None and is_fetched(run):
        # What was fetched for this job and nothing else of the cache; the links in its folder are the files themselves.
        folder = str(job_folder(job.metadata.name))
        volumes.append({"name": "cache", "persistentVolumeClaim": {"claimName": run.steps.cache.claim_name}})
        mounts.append({"name": "cache", "mountPath": f"{CACHE_DIR}/{folder}", "subPath": folder, "readOnly": True})
    return volumes, mounts
