"""The pod of a trainer that the offer has brought: the historic task market's contract in the sandbox of ours.

Paths, arguments and environment are the market's (see ``decision.trainer_arguments``). Its images write where they
like, so that their file system is not read-only; all else is as in our own pods, with less to read: of the claims the
pod has the one model, the one data set and its own result folder, and of the cache nothing but those.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from taskoffer.api.contract import FetchItem, item_path
from taskoffer.api.v1alpha1.meta import ClaimPath
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.trainers import DEFAULT_ENTRYPOINT, OwnTrainer
from taskoffer.api.v1alpha1.trainingjob import Attempt, Run, TrainingJob
from taskoffer.decision.items import data_item, model_item
from taskoffer.decision.own_trainer import trainer_item
from taskoffer.decision.step_needs import data_claim, model_claim, output_claim
from taskoffer.decision.trainer_arguments import (
    CHECKPOINTS_DIR,
    arguments,
    dataset_file,
    model_folder,
    result_folder,
    task_folder,
)
from taskoffer.render.names import CONTAINER, FOLDER_CONTAINER, OUTPUT_DIR, TRAINER_DIR
from taskoffer.render.pod import restricted, shared_memory, training_pod, training_resources
from taskoffer.render.trainingjob import output_path

Manifest = dict[str, Any]

_HF_CACHE = "/cache/hf_cache"
_WANDB_FOLDERS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")
_LONGEST_GRACE = 30
"""Seconds between SIGTERM and SIGKILL, as Kubernetes has it. It is stopped when its time is over, and what it could
still save is taken off the time for handing over."""


def own_pod_spec(job: TrainingJob, attempt: Attempt, seconds: int) -> Manifest:
    """Return the pod spec for the offer's own trainer.

    Args:
        job: The TrainingJob.
        attempt: The attempt.
        seconds: What the training has left.
    """
    run, name = job.spec.run, job.metadata.name
    trainer, steps = _own(run)
    volumes, mounts = _scratch(run)
    for label, path, volume, mount in _inputs(job, trainer, steps):
        volumes.append({"name": label, **volume})
        mounts.append({"name": label, "mountPath": path, "readOnly": True, **mount})
    claim = output_claim(run.output, steps)
    assert claim is not None  # noqa: S101 - without a place for its result no offer is admitted.
    volumes.append({"name": "output", **_on(claim.claim_name)})
    result = str(PurePosixPath(output_path(job, name)).relative_to(OUTPUT_DIR) / "adapter")
    mounts.append({"name": "output", "mountPath": result_folder(run, name), "subPath": result})
    container = _container(job, attempt, trainer, seconds)
    container["volumeMounts"] = mounts
    grace = min(run.pod.termination_grace_seconds, _LONGEST_GRACE)
    spec = training_pod(job, attempt, container, volumes, grace)
    spec["initContainers"] = [_folders(job, container["resources"], f"{OUTPUT_DIR}/{result}")]
    return spec


def _own(run: Run) -> tuple[OwnTrainer, Steps]:
    assert run.trainer is not None  # noqa: S101 - asked for by the caller.
    assert run.steps is not None  # noqa: S101 - a policy that allows trainers has steps.
    return run.trainer, run.steps


def _container(job: TrainingJob, attempt: Attempt, trainer: OwnTrainer, seconds: int) -> Manifest:
    run = job.spec.run
    container: Manifest = {
        "name": CONTAINER,
        "image": trainer.image,
        "args": [_literal(one) for one in arguments(run, job.metadata.name, seconds)],
        "env": [{"name": name, "value": value} for name, value in _environment(run).items()],
        "resources": _resources(run, attempt, trainer),
        "securityContext": {**restricted(), "readOnlyRootFilesystem": False},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if trainer.repository is not None:
        entrypoint = trainer.repository.entrypoint or DEFAULT_ENTRYPOINT
        container |= {"command": ["python", f"{TRAINER_DIR}/{entrypoint}"], "workingDir": TRAINER_DIR}
    if run.pod.image_pull_policy:
        container["imagePullPolicy"] = run.pod.image_pull_policy
    return container


def _literal(argument: str) -> str:
    """Write an argument so that the kubelet hands it on as it is: it would replace ``$(NAME)`` by a variable."""
    return argument.replace("$", "$$")


def _environment(run: Run) -> dict[str, str]:
    wandb = f"{CHECKPOINTS_DIR}/wandb_logs/{task_folder(run.task_id)}"
    return {
        "HOME": "/tmp",  # noqa: S108
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_CACHE": _HF_CACHE,
        "WANDB_MODE": "offline",
        **dict.fromkeys(_WANDB_FOLDERS, wandb),
    }


def _resources(run: Run, attempt: Attempt, trainer: OwnTrainer) -> Manifest:
    made = training_resources(run, attempt)
    if trainer.ephemeral_storage is None:
        return made
    disk = {"ephemeral-storage": trainer.ephemeral_storage}
    return {**made, "requests": {**made["requests"], **disk}, "limits": {**made["limits"], **disk}}


def _scratch(run: Run) -> tuple[list[Manifest], list[Manifest]]:
    """Return the folders that begin empty and go with the pod."""
    empty = {"tmp": "/tmp", "checkpoints": CHECKPOINTS_DIR, "hf-cache": _HF_CACHE}  # noqa: S108
    volumes, mounts = shared_memory(run)
    return (
        [*({"name": name, "emptyDir": {}} for name in empty), *volumes],
        [*({"name": name, "mountPath": path} for name, path in empty.items()), *mounts],
    )


def _inputs(job: TrainingJob, trainer: OwnTrainer, steps: Steps) -> list[tuple[str, str, Manifest, Manifest]]:
    """Return name, path, volume and part of the volume of what the trainer reads."""
    run, name = job.spec.run, job.metadata.name

    def at(claim: ClaimPath | None, item: FetchItem | None) -> tuple[Manifest, Manifest]:
        if claim is not None:
            return _on(claim.claim_name), {"subPath": claim.path} if claim.path else {}
        assert item is not None  # noqa: S101 - what lies on no claim is fetched.
        return _on(steps.cache.claim_name), {"subPath": str(item_path(name, item))}

    model_on, data_on = model_claim(run.model), data_claim(run.dataset)
    model = at(model_on, model_item(run.model, steps) if model_on is None else None)
    data = at(data_on, data_item(run.dataset, steps) if data_on is None else None)
    found = [
        ("model", model_folder(run.model.name), *model),
        ("dataset", dataset_file(run.task_type, run.task_id), *data),
    ]
    if trainer.repository is not None:
        found.append(("trainer", TRAINER_DIR, *at(None, trainer_item(trainer.repository, steps))))
    return found


def _on(claim_name: str) -> Manifest:
    return {"persistentVolumeClaim": {"claimName": claim_name}}


def _folders(job: TrainingJob, resources: Manifest, result: str) -> Manifest:
    """Return the container that makes the folders which the trainer writes to, with its user as their owner.

    A folder that the kubelet or the runtime makes for a mount belongs to root.
    """
    run = job.spec.run
    made = [result, result_folder(run, job.metadata.name), _environment(run)["WANDB_DIR"]]
    container: Manifest = {
        "name": FOLDER_CONTAINER,
        "image": run.pod.image,
        "command": ["mkdir", "-p", *(_literal(folder) for folder in made)],
        # As much CPU and memory as the trainer, which begins when this has ended, so that the pod asks for no more.
        "resources": {
            kind: {name: asked for name, asked in resources[kind].items() if name in ("cpu", "memory")}
            for kind in ("requests", "limits")
        },
        "securityContext": restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "output", "mountPath": OUTPUT_DIR},
            {"name": "checkpoints", "mountPath": CHECKPOINTS_DIR},
        ],
    }
    if run.pod.image_pull_policy:
        container["imagePullPolicy"] = run.pod.image_pull_policy
    return container
