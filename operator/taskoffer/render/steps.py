"""ConfigMap and batch/v1 Job of the steps around a training: with the network and the tokens, without a GPU."""

from __future__ import annotations

import json
from typing import Any

from taskoffer.api.contract import (
    PREPARE_CONFIG_PATH,
    PROVISIONAL_FOLDER,
    SUBMIT_CONFIG_PATH,
    CacheSettings,
    Credentials,
    ExitCode,
    PrepareConfig,
    SubmitConfig,
)
from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.steps import SecretKey, Steps
from taskoffer.api.v1alpha1.trainingjob import Run, StepName, TrainingJob
from taskoffer.decision.items import data_item, model_item, target_of, told_format
from taskoffer.decision.job_facts import EnsureStep
from taskoffer.decision.naming import step_name
from taskoffer.decision.own_trainer import trainer_item
from taskoffer.decision.step_needs import data_claim, has_target, model_claim, output_claim
from taskoffer.render.job import owner_of
from taskoffer.render.names import (
    CACHE_DIR,
    JOB_LABEL,
    MANAGED_BY,
    MODEL_DIR,
    OUTPUT_DIR,
    POLICY_LABEL,
    RUN_DIR,
    SECRETS_DIR,
    STEP_CONTAINER,
    STEP_LABEL,
    label_value,
)
from taskoffer.render.pod import pod_security, restricted
from taskoffer.render.trainingjob import cached, inside, output_path

Manifest = dict[str, Any]

_FILES = {StepName.PREPARE: PREPARE_CONFIG_PATH, StepName.SUBMIT: SUBMIT_CONFIG_PATH}
_PERMANENT = sorted(int(code) for code in ExitCode if not code.retryable and code is not ExitCode.DONE)


def step_config_map(job: TrainingJob, action: EnsureStep) -> Manifest:
    """Return the immutable ConfigMap that carries a step's configuration."""
    config = _prepare(job, action) if action.name is StepName.PREPARE else _submit(job, action)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**_metadata(job, action), "name": _config_name(job, action)},
        "immutable": True,
        "data": {
            _FILES[action.name].rpartition("/")[2]: json.dumps(config.to_wire(), indent=2, sort_keys=True),
        },
    }


def step_job(job: TrainingJob, action: EnsureStep) -> Manifest:
    """Return the Job of a step. Kubernetes tries it again itself, but not after an end that would come again."""
    run, steps = job.spec.run, _steps(job.spec.run)
    metadata = _metadata(job, action)
    spec: Manifest = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": steps.backoff_limit,
        "activeDeadlineSeconds": action.seconds,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": STEP_CONTAINER, "operator": "In", "values": _PERMANENT},
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            ]
        },
        "template": {"metadata": {"labels": dict(metadata["labels"])}, "spec": _pod_spec(job, action)},
    }
    if run.ttl_seconds_after_finished is not None:
        spec["ttlSecondsAfterFinished"] = run.ttl_seconds_after_finished
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _steps(run: Run) -> Steps:
    assert run.steps is not None  # noqa: S101 - no step is wanted without.
    return run.steps


def _name(job: TrainingJob, action: EnsureStep) -> str:
    return step_name(job.metadata.name, action.name, action.repeats)


def _config_name(job: TrainingJob, action: EnsureStep) -> str:
    """Return the name of the ConfigMap, which the tries share that ask to be started again: one for each would stay."""
    return step_name(job.metadata.name, action.name, action.repeats - action.failures)


def _metadata(job: TrainingJob, action: EnsureStep) -> Manifest:
    labels = {
        **MANAGED_BY,
        JOB_LABEL: job.metadata.name,
        STEP_LABEL: action.name.value.lower(),
        POLICY_LABEL: label_value(job.spec.run.policy_ref.name),
    }
    return {
        "name": _name(job, action),
        "namespace": job.metadata.namespace,
        "labels": labels,
        "ownerReferences": [owner_of(job)],
    }


def _cache(steps: Steps) -> CacheSettings:
    limit = steps.cache.size_limit
    return CacheSettings(
        path=CACHE_DIR,
        size_limit=whole(limit) if limit is not None else None,
        min_age_seconds=steps.cache.min_age_seconds,
    )


def _credentials(steps: Steps) -> Credentials:
    return Credentials(
        hub_token_file=f"{SECRETS_DIR}/hub/{steps.hub_token.key}" if steps.hub_token else None,
        s3_credentials_file=f"{SECRETS_DIR}/s3/{steps.s3_credentials.key}" if steps.s3_credentials else None,
    )


def _prepare(job: TrainingJob, action: EnsureStep) -> PrepareConfig:
    run, steps = job.spec.run, _steps(job.spec.run)
    items = [model_item(run.model, steps)] if model_claim(run.model) is None else []
    # What a trainer of somebody else is told has to be what comes; ours looks at what has come.
    told = told_format(run.dataset) if run.trainer is not None else None
    items += [data_item(run.dataset, steps, told)] if data_claim(run.dataset) is None else []
    repository = run.trainer.repository if run.trainer is not None else None
    items += [trainer_item(repository, steps)] if repository is not None else []
    return PrepareConfig(
        job_name=job.metadata.name,
        items=tuple(items),
        cache=_cache(steps),
        lease_expires_at=action.lease_until,
        deadline=action.deadline,
        credentials=_credentials(steps),
        network=steps.network,
        target=target_of(run.output, steps) if run.output is not None else None,
    )


def _submit(job: TrainingJob, action: EnsureStep) -> SubmitConfig:
    run, steps, name = job.spec.run, _steps(job.spec.run), job.metadata.name
    claim = model_claim(run.model)
    return SubmitConfig(
        job_name=name,
        task_id=run.task_id,
        # Which of the folders in there is the best one, the trainer may have decided anew since it said so.
        adapter_dir=f"{output_path(job, name)}/{PROVISIONAL_FOLDER if action.provisional else 'adapter'}",
        base_model=run.model.name,
        base_model_path=inside(MODEL_DIR, claim) if claim is not None else cached(name, model_item(run.model, steps)),
        target=target_of(run.output, steps) if run.output is not None else None,
        unverified=run.trainer is not None or action.provisional,
        provisional=action.provisional,
        cache=_cache(steps),
        deadline=action.deadline,
        credentials=_credentials(steps),
        network=steps.network,
    )


def _pod_spec(job: TrainingJob, action: EnsureStep) -> Manifest:
    run, steps = job.spec.run, _steps(job.spec.run)
    pod, module = run.pod, action.name.value.lower()
    volumes, mounts = _volumes(job, action)
    container: Manifest = {
        "name": STEP_CONTAINER,
        "image": steps.image or pod.image,
        "command": ["python", "-m", f"taskoffer_trainer.{module}"],
        "args": ["--config", _FILES[action.name]],
        "resources": _resources(steps),
        "securityContext": restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    # The image says that the hub is not to be asked; these steps are there to ask it.
    container["env"] = [{"name": "HF_HUB_OFFLINE", "value": "0"}]
    if steps.hub_endpoint:
        container["env"].append({"name": "HF_ENDPOINT", "value": steps.hub_endpoint})
    if pod.image_pull_policy:
        container["imagePullPolicy"] = pod.image_pull_policy
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pod.termination_grace_seconds,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if pod.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in pod.image_pull_secrets]
    if pod.tolerations:
        spec["tolerations"] = [t.to_wire() for t in pod.tolerations]
    return spec


def _resources(steps: Steps) -> Manifest:
    requests = {key: value for key, value in (("cpu", steps.cpu), ("memory", steps.memory)) if value}
    limits = {"memory": steps.memory} if steps.memory else {}
    return {name: found for name, found in (("requests", requests), ("limits", limits)) if found}


def _volumes(job: TrainingJob, action: EnsureStep) -> tuple[list[Manifest], list[Manifest]]:
    run, steps = job.spec.run, _steps(job.spec.run)
    volumes: list[Manifest] = [
        {"name": "run", "configMap": {"name": _config_name(job, action)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": steps.cache.claim_name}},
    ]
    mounts: list[Manifest] = [
        {"name": "run", "mountPath": RUN_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    for label, secret in (("hub", steps.hub_token), ("s3", steps.s3_credentials)):
        if secret is not None:
            volumes.append({"name": f"secret-{label}", "secret": _secret(secret)})
            mounts.append({"name": f"secret-{label}", "mountPath": f"{SECRETS_DIR}/{label}", "readOnly": True})
    if action.name is StepName.SUBMIT:
        claims = (
            ("output", OUTPUT_DIR, output_claim(run.output, steps)),
            ("model", MODEL_DIR, model_claim(run.model)),
        )
        for label, path, claim in claims:
            if claim is not None:
                volumes.append({"name": label, "persistentVolumeClaim": {"claimName": claim.claim_name}})
                mounts.append({"name": label, "mountPath": path, "readOnly": True})
        if run.trainer is not None and not has_target(run):
            # Card and manifest go beside a result that stays where it is. A link in that folder, which its trainer has
            # written, leads nowhere that could be written to.
            folder = f"{output_path(job, job.metadata.name)}/adapter"
            inside_claim = folder.removeprefix(f"{OUTPUT_DIR}/")
            mounts.append({"name": "output", "mountPath": folder, "subPath": inside_claim})
    return volumes, mounts


def _secret(secret: SecretKey) -> Manifest:
    return {"secretName": secret.name, "defaultMode": 0o440, "items": [{"key": secret.key, "path": secret.key}]}
