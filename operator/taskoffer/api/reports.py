"""What a trainer says: while it runs, at its end, and of what it could not take literally."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from taskoffer.api.base import Time, WireModel
from taskoffer.api.steps import FetchedItem, Published
from taskoffer.api.tuning import AppliedTuning

PROVISIONAL_FOLDER = "provisional"
"""Folder below a job's output folder that holds the best adapter so far, in a folder step-N-… of its own."""


class Clamp(WireModel):
    """A setting that could not be taken literally: what was asked, what is done, and why."""

    field: Annotated[str, StringConstraints(max_length=128)] = Field(description="Name of the setting.")
    requested: Annotated[str, StringConstraints(max_length=256)] = Field(description="The value that was asked for.")
    effective: Annotated[str, StringConstraints(max_length=256)] = Field(description="The value that is used.")
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Reason in CamelCase.")
    message: Annotated[str, StringConstraints(max_length=512)] = Field("", description="The reason in a sentence.")


class RunState(StrEnum):
    """Where a run is."""

    STARTING = "Starting"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    SAVING = "Saving"
    VERIFYING = "Verifying"
    DONE = "Done"
    STOPPED = "Stopped"
    FAILED = "Failed"


class Metric(WireModel):
    """A named value as a decimal string, in the shape of Kubeflow Trainer's trainerStatus."""

    name: Annotated[str, StringConstraints(max_length=64)] = Field(description="Name of the metric.")
    value: Annotated[str, StringConstraints(max_length=64)] = Field(description="Its value as a string.")


class InForce(WireModel):
    """A technique of a training and how it is done in this pod, as attnImplementation and sdpa."""

    name: Annotated[str, StringConstraints(max_length=64)] = Field(description="Name of the setting.")
    value: Annotated[str, StringConstraints(max_length=128)] = Field(description="What is done.")


class Provisional(WireModel):
    """The best adapter so far: whole, with finite values, and verified by nobody."""

    step: Annotated[int, Field(ge=0)] = Field(description="Training steps behind it.")
    path: Annotated[str, StringConstraints(max_length=2048)] = Field(description="Folder that it lies in.")


class ProgressReport(WireModel):
    """What the trainer says of itself at ``GET /progress``.

    ``progress_percentage``, ``estimated_remaining_seconds``, ``metrics`` and ``last_updated_time`` carry
    Kubeflow Trainer's field names and go into ``TrainingJob.status.trainerStatus`` as they are.
    """

    job_name: str
    attempt: int = 1
    state: RunState
    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    metrics: tuple[Metric, ...] = ()
    last_updated_time: Time
    step: int = 0
    total_steps: int | None = None
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint this run continued from.")
    pod_uid: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="UID of the pod, so that what is said cannot be taken for another pod's."
    )
    tuning: AppliedTuning | None = Field(None, description="The tuning in force; absent before the training.")
    clamps: tuple[Clamp, ...] = ()
    in_force: tuple[InForce, ...] = Field((), description="Techniques and how each is done in this pod.")
    provisional: Provisional | None = Field(None, description="The best adapter so far; absent while there is none.")


class Termination(WireModel):
    """What the trainer leaves in the termination log: at most MAX_TERMINATION_BYTES as JSON."""

    exit_code: int
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Reason in CamelCase.")
    message: Annotated[str, StringConstraints(max_length=1024)] = ""
    step: int = 0
    total_steps: int | None = None
    samples: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Rows that these steps have learned from; each epoch counts anew, a prompt is one under GRPO.",
    )
    checkpoint: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="The newest checkpoint, from which another attempt goes on; absent after a verified result."
    )
    best_eval_loss: float | None = Field(None, description="Smallest held-out loss of the checkpoints that are kept.")
    train_loss: float | None = None
    eval_loss_before: float | None = Field(None, description="Held-out loss of the base model.")
    eval_loss_after: float | None = Field(None, description="Held-out loss with the adapter.")
    figures_before: tuple[Metric, ...] = Field((), description="What the method measures, of the base model.")
    figures_after: tuple[Metric, ...] = Field((), description="The same with the adapter, after loading it again.")
    adapter_dir: str | None = None
    adapter_sha256: str | None = None
    resumed_from_step: int | None = None
    training_seconds: float | None = Field(None, description="This attempt, from its first step to its end.")
    tokens_per_second: float | None = Field(None, description="Mean over this attempt's steps, all processes together.")
    peak_gpu_bytes: int | None = Field(None, description="Most memory in use on a GPU of this attempt.")
    peak_host_bytes: int | None = Field(None, description="Largest resident set of a training process.")
    clamps: tuple[Clamp, ...] = ()
    provisional: Provisional | None = Field(
        None, description="The best adapter so far, where there is no verified one; absent where there is none."
    )
    fetched: Annotated[tuple[FetchedItem, ...], Field(max_length=8)] = Field((), description="What prepare has ready.")
    published: Published | None = Field(None, description="What submit has handed over.")
