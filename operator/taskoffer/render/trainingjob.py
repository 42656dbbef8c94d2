"""The TrainingJob that follows from an admission, and the RunConfig that follows from a TrainingJob."""

from __future__ import annotations

from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any

from taskoffer.api.contract import EVAL_ROWS_MAX, MIN_ROWS, DataConfig, FetchItem, ModelConfig, RunConfig, item_path
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import API_VERSION, ClaimPath
from taskoffer.api.v1alpha1.taskoffer import Admission, ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import OOM_KILLED, Attempt, OfferRef, Run, TrainingJob, TrainingJobSpec
from taskoffer.decision.effective import Effective, effective_settings
from taskoffer.decision.items import data_item, format_of, model_item
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.measured import expected_seconds
from taskoffer.decision.outcomes import NOTHING, Learned, group_of
from taskoffer.decision.own_trainer import own_trainer
from taskoffer.decision.prediction import predict
from taskoffer.decision.recipe import requested_settings
from taskoffer.decision.step_needs import data_claim, is_submitted, model_claim, output_claim
from taskoffer.render.names import CACHE_DIR, DATASET_DIR, JOB_LABEL, MANAGED_BY, MODEL_DIR, OFFER_UID_LABEL, OUTPUT_DIR


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
    if predicted is not None and not predicted.fit.fits:
        raise ValueError(f"{spec.model.name} does not fit any more: {predicted.memory_numbers}")
    trainer = own_trainer(spec, policy)
    effective = Effective(settings, ())
    if trainer is None:
        found = predicted.fit if predicted is not None else None
        effective = effective_settings(settings, found, policy.pod_template, gpus, spec.dataset.rows)
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
        effective=effective.settings,
        clamps=effective.clamps,
        pod=policy.pod_template,
        steps=policy.steps,
        trainer=trainer,
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
    model_on, data_on = model_claim(run.model), data_claim(dataset)
    steps = run.steps
    submit_seconds = steps.submit_seconds if steps is not None and is_submitted(run) else 0
    model_path, data_path = inside(MODEL_DIR, model_on), inside(DATASET_DIR, data_on)
    if steps is not None and model_on is None:
        model_path = cached(name, model_item(run.model, steps))
    if steps is not None and data_on is None:
        data_path = cached(name, data_item(dataset, steps))
    limit, deadline = max(1, run.time_limit_seconds - submit_seconds), attempt.deadline
    if deadline is not None:
        deadline = max(attempt.created_at, deadline - timedelta(seconds=submit_seconds))
    return RunConfig(
        job_name=name,
        attempt=number,
        lacked_memory=_lacked_memory(job, number),
        task_id=run.task_id,
        task_type=run.task_type,
        gpus=run.gpus,
        model=ModelConfig(
            name=run.model.name,
            revision=run.model.revision,
            path=model_path,
            architecture=run.model.architecture,
            yarn_factor=run.model.yarn_factor,
        ),
        data=DataConfig(
            path=data_path,
            file_format=format_of(dataset),
            instruct=dataset.instruct,
            chat=dataset.chat,
            dpo=dataset.dpo,
            grpo=dataset.grpo,
            image=dataset.image,
            eval_rows_max=run.effective.train.eval_rows_max or EVAL_ROWS_MAX,
            min_rows=dataset.min_rows or MIN_ROWS,
        ),
        lora=run.effective.lora,
        train=run.effective.train,
        output_dir=output_path(job, name),
        checkpoint_dir=output_path(job, f".checkpoints/{name}"),
        deadline=deadline,
        # The file is written before the container starts, which is when this clock does.
        time_limit_seconds=limit if run.clock_mode is ClockMode.TRAINING else None,
        expected_seconds=expected_seconds(run.predicted),
        sample_prompts=dataset.sample_prompts,
    )


def _lacked_memory(job: TrainingJob, number: int) -> tuple[int, ...] | None:
    """Return the earlier attempts after which nothing was left that could tell the trainer what they lacked."""
    earlier = enumerate(job.status.attempts[: number - 1], 1)
    return tuple(one for one, attempt in earlier if attempt.reason == OOM_KILLED) or None


def output_path(job: TrainingJob, leaf: str) -> str:
    """Return the folder below the output claim's path that belongs to this job."""
    claim = output_claim(job.spec.run.output, job.spec.run.steps)
    return str(PurePosixPath(inside(OUTPUT_DIR, claim)) / leaf)


def cached(job_name: str, item: FetchItem) -> str:
    """Return where the pods find an item once it was fetched."""
    return str(PurePosixPath(CACHE_DIR) / item_path(job_name, item))


def inside(mount: str, claim: ClaimPath | None) -> str:
    """Return where a claim's path is in a pod that has the claim mounted."""
    return str(PurePosixPath(mount) / claim.path) if claim is not None and claim.path else mount
