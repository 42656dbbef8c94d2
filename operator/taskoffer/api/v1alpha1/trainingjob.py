"""TrainingJob: the work that follows from an admitted offer. Only the operator creates it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from taskoffer.api.base import Time, WireModel
from taskoffer.api.contract import Clamp, LoraSettings, Metric, Provisional, TrainSettings
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.learning import ClassName, Measured, Predicted
from taskoffer.api.v1alpha1.meta import (
    ATOMIC_LIST,
    UID,
    ApiVersion,
    Assignments,
    Conditions,
    GpuCount,
    Name,
    ObjectMeta,
    PolicyRef,
    QuantityString,
    list_map,
    rule,
    rules,
)
from taskoffer.api.v1alpha1.model_and_data import Dataset, Model
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.taskoffer import ClockMode, Output
from taskoffer.api.v1alpha1.trainers import OwnTrainer

MOST_ATTEMPTS = 30
"""Tries that may fail, and those that may be preempted."""

MOST_REPEATS = 9999
"""Times that a step may be begun again; the number is part of its Job's name."""


class OfferRef(WireModel):
    """The offer that the job was made from."""

    name: Name = Field(description="Name of the TaskOffer in the job's namespace.")
    uid: UID = Field(description="UID of the TaskOffer.")


class Settings(WireModel):
    """Settings of the training method."""

    lora: LoraSettings = Field(description="LoRA adapter settings.")
    train: TrainSettings = Field(description="Training settings.")


class Toleration(WireModel):
    """A taint that the training pod accepts."""

    key: Annotated[str, StringConstraints(max_length=316)] | None = Field(None, description="Taint key.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Exists or Equal.")
    value: Annotated[str, StringConstraints(max_length=63)] | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Taint effect.")


class PodSettings(WireModel):
    """What the training pod gets beside its GPUs; CPU, memory and shared memory are per GPU."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = Field(description="Trainer image.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When the image is pulled."
    )
    image_pull_secrets: Annotated[tuple[Name, ...], Field(max_length=8)] = Field(
        (), description="Names of pull secrets in the offer's namespace.", json_schema_extra=ATOMIC_LIST
    )
    cpu_per_gpu: QuantityString | None = Field(None, description="CPU request per GPU.")
    memory_per_gpu: QuantityString | None = Field(None, description="Memory request and limit per GPU.")
    shared_memory_per_gpu: QuantityString | None = Field(None, description="Size of /dev/shm per GPU.")
    service_account_name: Name | None = Field(None, description="ServiceAccount of the pod; its token is not mounted.")
    runtime_class_name: Name | None = Field(None, description="RuntimeClass of the pod.")
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = Field(
        (), description="Taints that the pod accepts.", json_schema_extra=ATOMIC_LIST
    )
    termination_grace_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        120, description="Seconds between SIGTERM and SIGKILL; long enough for a step and a checkpoint."
    )


class AttemptLimits(WireModel):
    """How often and how patiently a job is tried."""

    max_attempts: Annotated[int, Field(ge=1, le=20)] = Field(3, description="Attempts before the job fails.")
    backoff_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(10, description="Pause before another attempt.")
    start_timeout_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        900, description="Seconds within which the container must have started."
    )
    node_lost_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        120, description="Seconds after which an attempt on a node that is gone or not Ready is given up."
    )


class Run(WireModel):
    """All that is needed to render the attempts of a job, pinned when the offer was admitted."""

    task_id: Annotated[str, StringConstraints(max_length=128)] = Field(description="Identity of the task.")
    task_type: TaskType = Field(description="Kind of training.")
    gpus: GpuCount = Field(description="GPUs of the training pod.")
    model: Model = Field(description="The base model.")
    dataset: Dataset = Field(description="The data.")
    output: Output | None = Field(None, description="Where the result goes.")
    clock_mode: ClockMode = Field(ClockMode.ABSOLUTE, description="When the time limit starts to run.")
    time_limit_seconds: Annotated[int, Field(ge=1, json_schema_extra={"format": "int64"})] = Field(
        description="Seconds that the task may take."
    )
    priority_class_name: Name | None = Field(None, description="PriorityClass of the pod.")
    policy_ref: PolicyRef = Field(description="Policy version that the settings come from.")
    family: ClassName | None = Field(None, description="The policy's family of the model; absent where it has none.")
    size_class: ClassName | None = Field(None, description="The policy's size class of the model.")
    predicted: Predicted | None = Field(None, description="What was predicted; absent where the policy does not.")
    requested: Settings = Field(description="What the policy and the offer ask for.")
    effective: Settings = Field(description="What is used after clamping.")
    clamps: Annotated[tuple[Clamp, ...], Field(max_length=32)] = Field(
        (), description="Settings that could not be taken literally.", json_schema_extra=ATOMIC_LIST
    )
    pod: PodSettings = Field(description="What the pod gets beside its GPUs.")
    steps: Steps | None = Field(None, description="How the steps around the training work; absent has none.")
    trainer: OwnTrainer | None = Field(None, description="The offer's own trainer; absent runs the policy's.")
    limits: AttemptLimits = Field(description="How often and how patiently the job is tried.")
    ttl_seconds_after_finished: (
        Annotated[int, Field(ge=0, le=31_536_000, json_schema_extra={"format": "int64"})] | None
    ) = Field(None, description="Seconds after which a finished Job is removed; absent keeps it.")


class TrainingJobSpec(WireModel):
    """Work to do. Immutable."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self == oldSelf",
                "spec is immutable: a TrainingJob is never edited; change the TaskOffer or delete it",
            )
        )
    )

    offer_ref: OfferRef = Field(description="The offer that the job was made from.")
    run: Run = Field(description="What to run.")


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    STOPPED = "Stopped"
    NODE_LOST = "NodeLost"
    START_TIMEOUT = "StartTimeout"
    PREEMPTED = "Preempted"


class Preemptor(WireModel):
    """An offer for which a running job was stopped."""

    namespace: Name = Field(description="Its namespace.")
    name: Name = Field(description="Name of the TaskOffer.")
    uid: UID = Field(description="UID of the TaskOffer.")
    asked_at: Time = Field(description="When the job was to stop.")


OOM_KILLED = "OOMKilled"
"""The kubelet's reason for the end of a container that the kernel killed for lack of memory."""


class Attempt(WireModel):
    """One try: a batch/v1 Job of its own name on decided GPUs, written here before the Job is created."""

    job_name: Name = Field(description="Name of the batch/v1 Job.")
    assignments: Assignments = Field(
        description="GPUs of the attempt.", json_schema_extra=list_map("nodeName", "resourceName")
    )
    created_at: Time = Field(description="When the attempt was decided.")
    deadline: Time | None = Field(None, description="When the result must be there.")
    started_at: Time | None = Field(None, description="When the container started.")
    finished_at: Time | None = Field(None, description="When the attempt was over.")
    preempted_for: Preemptor | None = Field(None, description="The offer that its GPUs were taken back for.")
    outcome: AttemptOutcome | None = Field(None, description="How it ended; absent while it runs.")
    exit_code: int | None = Field(None, description="Exit code of the container.")
    reason: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Why it failed, in CamelCase: the trainer's reason, else the kubelet's, as OOMKilled."
    )
    message: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="What the trainer or the log said at the end."
    )


class StepName(StrEnum):
    """The steps of a job, in their order."""

    PREPARE = "Prepare"
    TRAIN = "Train"
    SUBMIT = "Submit"


class StepStatus(WireModel):
    """One of the three steps of a job."""

    name: StepName = Field(description="Prepare, Train or Submit.")
    state: Literal["Pending", "Running", "Succeeded", "Failed"] = Field(description="Where the step is.")
    started_at: Time | None = Field(None, description="When it was begun; absent for Train, see attempts.")
    finished_at: Time | None = Field(None, description="When it was over.")
    message: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="What it said at its end."
    )
    lease_until: Time | None = Field(None, description="Until when the job keeps what was fetched; only for Prepare.")
    repeats: Annotated[int, Field(ge=0, le=MOST_REPEATS)] | None = Field(
        None,
        description="How often it was begun again: because it asked for it, or because what was fetched was not kept "
        "for long enough.",
    )
    failures: Annotated[int, Field(ge=0, le=MOST_REPEATS)] | None = Field(
        None, description="How often it has ended asking to be started again; message says why the last time."
    )
    next_try_at: Time | None = Field(None, description="When it is begun again; absent while it runs.")


class TrainerStatus(WireModel):
    """Progress in the field names of Kubeflow Trainer's TrainJob status."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Share done, in percent.")
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = Field(None, description="Seconds still to go.")
    metrics: Annotated[tuple[Metric, ...], Field(max_length=256)] = Field(
        (), description="Loss, step and other figures.", json_schema_extra=list_map("name")
    )
    last_updated_time: Time = Field(description="When the trainer wrote these figures.")


class Result(WireModel):
    """What came out, as verified by the trainer."""

    adapter_path: Annotated[str, StringConstraints(max_length=2048)] | None = Field(
        None, description="Folder of the adapter on the output claim."
    )
    sha256: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="SHA-256 of the adapter file."
    )
    eval_loss_before: Annotated[str, StringConstraints(max_length=32)] | None = Field(
        None, description="Held-out loss of the base model."
    )
    eval_loss_after: Annotated[str, StringConstraints(max_length=32)] | None = Field(
        None, description="Held-out loss with the adapter."
    )
    metrics_before: Annotated[tuple[Metric, ...], Field(max_length=64)] = Field(
        (),
        description="What the method measures on held-out data, of the base model.",
        json_schema_extra=list_map("name"),
    )
    metrics_after: Annotated[tuple[Metric, ...], Field(max_length=64)] = Field(
        (), description="The same with the adapter.", json_schema_extra=list_map("name")
    )
    submitted_to: Annotated[str, StringConstraints(max_length=1400)] | None = Field(
        None, description="Repository or address where the result was handed over, as the submit step has seen it."
    )
    submitted_revision: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Commit of it on the hub."
    )


class EarlyEnd(WireModel):
    """Why a training has ended without a verified result, while its best adapter so far is handed over instead."""

    reason: Literal["DeadlineExceeded", "AttemptsExhausted"] = Field(description="What has run out.")
    message: Annotated[str, StringConstraints(max_length=1024)] = Field(description="The same in a sentence.")


class TrainingJobStatus(WireModel):
    """Where the work is. The operator is its only writer."""

    observed_generation: Annotated[int, Field(ge=0)] | None = Field(None, description="The metadata.generation seen.")
    conditions: Conditions = Field((), description="Running, Complete and Failed.")
    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MOST_ATTEMPTS)] = Field(
        (), description="The tries, oldest first.", json_schema_extra=list_map("jobName")
    )
    steps: Annotated[tuple[StepStatus, ...], Field(max_length=3)] = Field(
        (), description="Prepare, Train and Submit.", json_schema_extra=list_map("name")
    )
    trainer_status: TrainerStatus | None = Field(None, description="Progress as the trainer reports it.")
    clamps: Annotated[tuple[Clamp, ...], Field(max_length=64)] = Field(
        (), description="Settings that could not be taken literally.", json_schema_extra=ATOMIC_LIST
    )
    provisional: Provisional | None = Field(
        None, description="The best adapter so far, as the training has left it; absent once it has verified one."
    )
    early_end: EarlyEnd | None = Field(
        None, description="Why the training has ended early; set where its best adapter so far is handed over instead."
    )
    result: Result | None = Field(None, description="What came out.")
    measured: Measured | None = Field(None, description="What a finished job took.")

    @model_validator(mode="after")
    def _check_attempts(self) -> TrainingJobStatus:
        if len({attempt.job_name for attempt in self.attempts}) < len(self.attempts):
            raise ValueError("attempts: a jobName occurs twice, so that the status could be read but not written")
        return self


class TrainingJob(WireModel):
    """The work that follows from an admitted offer."""

    api_version: ApiVersion = "taskoffer.dev/v1alpha1"
    kind: Literal["TrainingJob"] = "TrainingJob"
    metadata: ObjectMeta
    spec: TrainingJobSpec
    status: TrainingJobStatus = TrainingJobStatus()
