"""TaskOffer: a training task that somebody offers, and the answer to it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from taskoffer.api.base import Time, WireModel, spelled
from taskoffer.api.tasks import DATASET_OF_TASK, TaskType
from taskoffer.api.v1alpha1.meta import (
    ATOMIC_LIST,
    ApiVersion,
    Assignments,
    ClaimPath,
    Conditions,
    DecimalString,
    GpuCount,
    Name,
    ObjectMeta,
    PolicyRef,
    list_map,
    rule,
    rules,
)
from taskoffer.api.v1alpha1.model_and_data import DATASET_MEMBERS, Dataset, HubSource, Model
from taskoffer.api.v1alpha1.trainers import TrainerOverride

MAX_OFFER_NAME = 45
"""Longest name of a TaskOffer. Its TrainingJob is ``<offer>-<8 of the UID>``, a Job ``<that>-<attempt>``
and a pod ``<that>-<5>``; names become label values, which end at 63 characters: 45 + 9 + 3 + 6."""

LONGEST_TIME_LIMIT = 31_536_000
"""Seconds of a year: more than any task takes."""


class ClockMode(StrEnum):
    """When the time limit starts to run."""

    ABSOLUTE = "Absolute"
    """At acceptance: queueing, download and upload count."""
    TRAINING = "Training"
    """When the training container starts."""


class Output(WireModel):
    """Where the result goes: onto a claim, and from there to a hub or a bucket where one is named."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.repository) || !has(self.url)",
                "output takes repository or url, not both: remove one of them",
                on_create=True,
            )
        )
    )

    repository: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Exact name of the repository that the result is submitted to."
    )
    subfolder: (
        Annotated[
            str,
            StringConstraints(min_length=1, max_length=253),
            spelled(r"^[^/.][^.]*$", "subfolder is a relative path without dots: remove '.' and a leading '/'"),
        ]
        | None
    ) = Field(None, description="Folder inside the repository.")
    url: (
        Annotated[
            str,
            StringConstraints(min_length=8, max_length=1200),
            spelled(r"^s3://[^/]+/.+/$", "url must be a prefix in a bucket: write s3://bucket/folder/"),
        ]
        | None
    ) = Field(None, description="Prefix in a bucket that the result is submitted to: s3://bucket/folder/.")
    persistent_volume_claim: ClaimPath | None = Field(
        None, description="Folder on a claim of the namespace; the adapter is written to <path>/<job name>."
    )


class Tracking(WireModel):
    """Experiment tracking that the offerer asks for."""

    mode: Literal["Disabled", "Offline", "Online"] = Field(description="Disabled, Offline or Online.")


class Origin(WireModel):
    """Where the offer comes from."""

    market: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(description="Name of the market.")
    hotkey: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        None, description="Identity of the offerer in that market."
    )


_IMMUTABLE = [
    "taskID",
    "taskType",
    "model",
    "dataset",
    "timeLimitSeconds",
    "deadline",
    "clockMode",
    "policyName",
    "value",
    "trainer",
    "output",
    "gpuCount",
    "klCoefficient",
    "extraDatasets",
    "tracking",
    "origin",
]
_REQUIRED = {"taskID", "taskType", "model", "dataset", "timeLimitSeconds"}


def _immutable(field: str) -> str:
    return f"{field} is immutable: create a new TaskOffer; only active, expiresAt and priorityClassName may change"


def _unchanged(field: str) -> str:
    old, new = f"oldSelf.spec.{field}", f"self.spec.{field}"
    return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"


_SPEC_RULES = (
    *(
        rule(
            f"self.taskType != '{task.value}' || self.dataset.type == '{kind.value}'",
            f"dataset.type must be {kind.value} for taskType {task.value}: set it together with "
            f"dataset.{DATASET_MEMBERS[kind]}, or change taskType",
            on_create=True,
        )
        for task, kind in DATASET_OF_TASK.items()
    ),
    rule(
        "has(self.model.architecture) == (self.taskType == 'Image')",
        "model.architecture (sdxl or flux) must be set exactly when taskType is Image: set it or remove it",
        on_create=True,
    ),
    *(
        rule(f"has(self.{field}) == has(oldSelf.{field})", _immutable(field))
        for field in _IMMUTABLE
        if field not in _REQUIRED
    ),
)


def _freeze(schema: dict[str, Any]) -> None:
    """Add the rules of the spec to its schema: those of the whole, and one on each field that never changes.

    A rule on the field itself costs the API server a fraction of one on the whole spec: there each mention of a
    field makes it build a table of all of them, and every status write evaluates these rules as well.
    """
    schema |= rules(*_SPEC_RULES)
    for field in _IMMUTABLE:
        prop = schema["properties"][field]
        own = prop.get("x-kubernetes-validations", [])
        prop |= rules(*own, rule("self == oldSelf", _immutable(field)))


class TaskOfferSpec(WireModel):
    """What is offered: a model, data, a kind of training and the time it may take."""

    model_config = ConfigDict(json_schema_extra=_freeze)

    task_id: Annotated[
        str,
        StringConstraints(min_length=1, max_length=128),
        spelled(
            r"^[A-Za-z0-9][A-Za-z0-9._:-]*$",
            "taskID must begin with a letter or digit and hold only letters, digits, '.', '_', ':' and '-': "
            "remove the rest",
        ),
    ] = Field(description="Identity of the task in its market; unique in the namespace, the oldest offer wins.")
    task_type: TaskType = Field(description="InstructText, Chat, DPO, GRPO or Image.")
    model: Model = Field(description="The base model: its name, its size, and where it lies.")
    dataset: Dataset = Field(description="The data: its type, its columns, and where it lies.")
    time_limit_seconds: Annotated[
        int,
        Field(
            le=LONGEST_TIME_LIMIT,
            json_schema_extra={
                "format": "int64",
                **rules(rule("self > 0", "timeLimitSeconds must be greater than 0: give the time limit in seconds")),
            },
        ),
    ] = Field(description="Seconds that the task may take, counted as clockMode says.")
    deadline: Time | None = Field(None, description="Moment by which the result must be there in any case.")
    clock_mode: ClockMode | None = Field(
        None,
        description="Absolute (default: from acceptance) or Training (from the start of the container).",
    )
    expires_at: Time | None = Field(None, description="An offer that is not admitted by then is refused as Expired.")
    priority_class_name: Name | None = Field(
        None,
        description="One of the policy's queue.priorities; under a policy without these, PriorityClass of the pod.",
    )
    policy_name: Name | None = Field(None, description="CapacityPolicy that decides; absent means the default one.")
    value: DecimalString | None = Field(None, description="Worth of the task to the owner, as a decimal string.")
    gpu_count: GpuCount | None = Field(
        None, description="GPUs to train on: 1, 2, 4 or 8; absent lets the policy choose."
    )
    trainer: TrainerOverride | None = Field(
        None, description="A trainer other than the policy's, which has to allow it in trainers."
    )
    output: Output | None = Field(None, description="Where the result goes.")
    kl_coefficient: DecimalString | None = Field(
        None, description="Weight of a KL term that keeps the model near its base."
    )
    extra_datasets: Annotated[tuple[HubSource, ...], Field(max_length=4)] | None = Field(
        None, description="Further public data sets to train on.", json_schema_extra=ATOMIC_LIST
    )
    tracking: Tracking | None = Field(None, description="Experiment tracking.")
    origin: Origin | None = Field(None, description="Where the offer comes from.")
    active: bool | None = Field(
        None, description="false pauses a waiting offer and cancels an admitted one; absent means true."
    )

    @model_validator(mode="after")
    def _check_time_limit(self) -> TaskOfferSpec:
        # The API server checks it with a rule of its own, but an object can have been stored before that rule.
        if self.time_limit_seconds < 1:
            raise ValueError(
                f"timeLimitSeconds must be at least 1, got {self.time_limit_seconds}: give the time limit in seconds"
            )
        return self

    @model_validator(mode="after")
    def _check_dataset_fits(self) -> TaskOfferSpec:
        wanted = DATASET_OF_TASK[self.task_type]
        if self.dataset.type is not wanted:
            raise ValueError(
                f"dataset.type {self.dataset.type.value} does not fit taskType {self.task_type.value}: "
                f"set {wanted.value} together with its columns, or change taskType"
            )
        return self

    @property
    def is_active(self) -> bool:
        """Tell whether the offer may be decided and run."""
        return self.active is not False

    @property
    def source_ends(self) -> datetime | None:
        """Return when the address of the data stops to work, where it has one that does."""
        source = self.dataset.source
        return source.url.ends if source is not None and source.url is not None else None


class ExplanationItem(WireModel):
    """One piece of the explanation of a decision."""

    type: Literal["Term", "Estimate", "Constraint", "Counterfactual"] = Field(
        description="A score term, an estimate, a constraint that binds, or what would change the verdict."
    )
    name: Annotated[str, StringConstraints(min_length=1, max_length=63)] = Field(description="Name of the piece.")
    value: Annotated[str, StringConstraints(max_length=64)] = Field("", description="Its value.")
    message: Annotated[str, StringConstraints(max_length=400)] = Field("", description="How the value comes about.")


class Admission(WireModel):
    """The commitment to train the offer. It is the only place where GPUs are booked."""

    policy_ref: PolicyRef = Field(description="Policy version that the decision was made under.")
    job_name: Name = Field(description="Name of the TrainingJob.")
    decided_at: Time = Field(description="When the offer was admitted.")
    deadline: Time | None = Field(
        None, description="When the result must be there; absent until a Training clock starts."
    )
    assignments: Assignments = Field(
        description="The GPUs that are booked.", json_schema_extra=list_map("nodeName", "resourceName")
    )


class TaskOfferStatus(WireModel):
    """The answer to an offer. The operator is its only writer."""

    observed_generation: Annotated[int, Field(ge=0)] | None = Field(
        None, description="The metadata.generation that was decided."
    )
    conditions: Conditions = Field((), description="Admitted, Evicted and Finished.")
    score: DecimalString | None = Field(None, description="Score as a decimal string.")
    explanation: Annotated[tuple[ExplanationItem, ...], Field(max_length=16)] = Field(
        (),
        description="Score terms, estimates, the binding constraint and a counterfactual.",
        json_schema_extra=ATOMIC_LIST,
    )
    admission: Admission | None = Field(None, description="The booking; absent until the offer is admitted.")


class TaskOffer(WireModel):
    """A training task that somebody offers, and the operator's answer to it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"self.metadata.name.size() <= {MAX_OFFER_NAME}",
                f"metadata.name must be at most {MAX_OFFER_NAME} characters, because the names of Jobs and "
                "pods are made from it: choose a shorter name",
                on_create=True,
            ),
            rule(
                "!has(oldSelf.status) || !has(oldSelf.status.admission) || "
                f"(({_unchanged('expiresAt')}) && ({_unchanged('priorityClassName')}))",
                "the offer is admitted: only spec.active may change; set spec.active to false to cancel it",
            ),
        )
    )

    api_version: ApiVersion = "taskoffer.dev/v1alpha1"
    kind: Literal["TaskOffer"] = "TaskOffer"
    metadata: ObjectMeta
    spec: TaskOfferSpec
    status: TaskOfferStatus = TaskOfferStatus()
