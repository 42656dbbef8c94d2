"""The TrainingJob that follows from an admission, and the RunConfig that follows from a TrainingJob."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from taskoffer.api.contract import DataConfig, FileFormat, ModelConfig, RunConfig
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import API_VERSION, ClaimPath
from taskoffer.api.v1alpha1.taskoffer import Admission, ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Attempt, OfferRef, Run, TrainingJob, TrainingJobSpec
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.outcomes import NOTHING, Learned, group_of
from taskoffer.decision.prediction import predict
from taskoffer.decision.recipe import requested_settings
from taskoffer.render.names import DATASET_DIR, JOB_LABEL, MANAGED_BY, MODEL_DIR, OFFER_UID_LABEL, OUTPUT_DIR


def training_job(
    key: OfferKey,
    uid: str,
    spec: TaskOfferSpec,
    admission: Admission,
    policy: CapacityPolicySpec,
    learned: Learned = NOTHING,
) -> dict[str, Any]:
    """Return the TrainingJob of an admitted offer. The offer owns it, so that both go together.

    Everything that rendering an attempt needs is pinned in its spec; a later change of the policy, or of what it has
    learned, does not reach it. What was predicted is pinned beside, so that the outcome can be held against it.

    Raises:
        ValueError: when the policy, which may have changed since, has no settings with which the offer fits.
    """
    settings, gpus = requested_settings(spec, policy), admission.assignments[0].count
    predicted, group = predict(spec, policy, gpus, learned), group_of(spec, policy)
    fits = predicted.fit if predicted is not None else None
    if predicted is not None and not predicted.fit.fits:
        raise ValueError(f"{spec.model.name} does not fit any more: {predicted.memory_numbers}")
    # Priorities of the policy's own need not be known to the cluster, which makes no pod of an unknown PriorityClass.
    named_by_policy = policy.queue is not None and bool(policy.queue.priorities)
    run = Run(
        task_id=spec.task_id,
        task_type=spec.task_type,
        gpus=gpus,
        model=spec.model,
        dataset=spec.dataset,
        output=spec.output,
        clock_mode=spec.clock_mode or ClockMode.ABSOLUTE,
        time_limit_seconds=spec.time_limit_seconds,
        priority_class_name=None if named_by_policy else spec.priority_class_name,
        policy_ref=admission.policy_ref,
        family=(group.family or None) if group is not None else None,
        size_class=group.size_class if group is not None else None,
        predicted=predicted.record() if predicted is not None else None,
        requested=settings,
        effective=fits.effective if fits else settings,
        clamps=fits.clamps if fits else (),
        pod=policy.pod_template,
        limits=policy.attempts,
        ttl_seconds_after_finished=policy.retention.finished_seconds if policy.retention else None,
    )
    return {
        "apiVersion": API_VERSION,
        "kind": "TrainingJob",
        "metadata": {
            "name": admission.job_name,
            "namespace": key.namespace,
            "labels": {**MANAGED_BY, OFFER_UID_LABEL: uid, JOB_LABEL: admission.job_name},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": "TaskOffer",
                    "name": key.name,
                    "uid": uid,
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": TrainingJobSpec(offer_ref=OfferRef(name=key.name, uid=uid), run=run).to_wire(),
    }


def run_config(job: TrainingJob, attempt: Attempt, number: int) -> RunConfig:
    """Return what the trainer of an attempt reads. Paths follow from the claims that :mod:`render.job` mounts."""
    run = job.spec.run
    dataset = run.dataset
    name = job.metadata.name
    return RunConfig(
        job_name=name,
        attempt=number,
        task_id=run.task_id,
        task_type=run.task_type,
        gpus=run.gpus,
        model=ModelConfig(
            name=run.model.name,
            revision=run.model.revision,
            path=_inside(MODEL_DIR, run.model.source.persistent_volume_claim if run.model.source else None),
        ),
        data=DataConfig(
            path=_inside(DATASET_DIR, dataset.source.persistent_volume_claim if dataset.source else None),
            file_format=dataset.file_format or FileFormat.JSONL,
            instruct=dataset.instruct,
            chat=dataset.chat,
            dpo=dataset.dpo,
            grpo=dataset.grpo,
            image=dataset.image,
        ),
        lora=run.effective.lora,
        train=run.effective.train,
        output_dir=output_path(job, name),
        checkpoint_dir=output_path(job, f".checkpoints/{name}"),
        deadline=attempt.deadline,
    )


def output_path(job: TrainingJob, leaf: str) -> str:
    """Return the folder below the output claim's path that belongs to this job."""
    output = job.spec.run.output
    claim = output.persistent_volume_claim if output else None
    return str(PurePosixPath(_inside(OUTPUT_DIR, claim)) / leaf)


def _inside(mount: str, claim: ClaimPath | None) -> str:
    return str(PurePosixPath(mount) / claim.path) if claim is not None and claim.path else mount
