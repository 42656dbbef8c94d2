"""CapacityPolicy: every number that decides about offers.

A policy says which nodes it hands out, what it accepts, how it scores, how many GPUs a task gets, and with
which settings it trains. The presets in ``taskoffer.presets`` write the strategy documents down in this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.capacity import Capacity
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.lanes import Lane
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.api.v1alpha1.meta import (
    ATOMIC_LIST,
    ApiVersion,
    Conditions,
    DecimalString,
    GpuCount,
    Name,
    ObjectMeta,
    list_map,
    rule,
    rules,
)
from taskoffer.api.v1alpha1.preemption import Preemption
from taskoffer.api.v1alpha1.profiles import FamilyRule, SizeClass, TaskTypeRule, check_recipe
from taskoffer.api.v1alpha1.queueing import NamespaceLimit, NodeSelector, Placement, Queue
from taskoffer.api.v1alpha1.scoring import FIXED_TERMS, Scoring
from taskoffer.api.v1alpha1.steps import Steps
from taskoffer.api.v1alpha1.trainers import Trainers
from taskoffer.api.v1alpha1.trainingjob import AttemptLimits, PodSettings

DEFAULT_POLICY_ANNOTATION = "taskoffer.dev/is-default-policy"
"""A CapacityPolicy with this annotation set to "true" decides offers that name no policy."""


class ResourcePool(WireModel):
    """An extended resource that the policy hands out in whole units."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.deviceClassName) || !has(self.unitsPerGpu)",
                "deviceClassName pins whole GPUs and unitsPerGpu shares them out: remove one of the two",
            )
        )
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Extended resource, for example nvidia.com/gpu."
    )
    counts: Annotated[tuple[GpuCount, ...], Field(min_length=1, max_length=4)] = Field(
        description="Counts that a task may get.", json_schema_extra={"x-kubernetes-list-type": "set"}
    )
    units_per_gpu: Annotated[int, Field(ge=2, le=64)] | None = Field(
        None,
        description="Units that one GPU is shared out as (time-slicing replicas, MIG instances); a task then gets one "
        "unit, and its share of memory and speed. Absent means whole GPUs.",
    )
    device_class_name: Name | None = Field(
        None,
        description="DeviceClass (resource.k8s.io/v1) whose devices are the GPUs, for example gpu.nvidia.com: the "
        "operator then chooses the very GPUs of each task and claims them. Absent leaves that to the device plugin.",
    )

    @model_validator(mode="after")
    def _check_shared(self) -> ResourcePool:
        if self.units_per_gpu is not None and self.device_class_name is not None:
            raise ValueError(
                f"resources[{self.name}].deviceClassName pins whole GPUs and unitsPerGpu shares them out: remove one "
                "of the two"
            )
        if self.units_per_gpu is not None and self.counts != (1,):
            raise ValueError(
                f"resources[{self.name}].counts must be [1] with unitsPerGpu {self.units_per_gpu}: several units can "
                "be parts of one GPU"
            )
        return self


class FullMode(StrEnum):
    """What happens to an offer that fits the policy but not the free capacity."""

    WAIT = "Wait"
    REJECT = "Reject"


class Filters(WireModel):
    """Bounds that an offer must keep. A bound that is absent does not bind."""

    min_score: DecimalString | None = Field(None, description="The score must be greater than this.")
    floor_min_score: DecimalString | None = Field(
        None, description="minScore of task types below their dailyFloor; absent asks for no score then."
    )
    max_time_limit_seconds: Annotated[int, Field(ge=1, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="The time limit must be shorter than this."
    )
    max_concurrent_jobs: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="Admitted and unfinished offers at a time."
    )
    offer_ttl_seconds: Annotated[int, Field(ge=1, le=31_536_000, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="Seconds after its creation in which an offer is admitted or refused; absent has no end."
    )
    unknown_family: DecimalString | None = Field(
        None, description="Success rate of models of no listed family; absent means that they are refused."
    )
    unknown_parameters: Annotated[int, Field(ge=1, le=10**15, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="Size to assume when it is unknown; absent means that such offers are refused."
    )
    on_full: FullMode | None = Field(None, description="Wait (default) or Reject when the capacity is booked.")


class GpuChoice(StrEnum):
    """Where the number of GPUs comes from when neither the offer nor a lane says it."""

    SIZE_CLASS = "SizeClass"
    FEWEST_GPU_HOURS = "FewestGpuHours"
    EARLIEST_END = "EarliestEnd"
    MOST_VALUE = "MostValue"


class Retention(WireModel):
    """How long decided objects are kept."""

    finished_seconds: Annotated[int, Field(ge=0, le=31_536_000, json_schema_extra={"format": "int64"})] | None = Field(
        None,
        description="Seconds after which the Jobs of a finished TrainingJob are removed; absent keeps them.",
    )


_TRAINERS_WITHOUT_STEPS = (
    "trainers needs steps, for what a trainer that is not the policy's leaves has to be verified: set steps or remove "
    "trainers"
)


class CapacityPolicySpec(WireModel):
    """What is handed out, to whom, and how it is trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.scoring.terms) || self.scoring.terms.all(t, !has(t.value) || t.name in "
                f"{sorted(term.value for term in FIXED_TERMS)})",
                "scoring.terms[].value is only for the terms Bonus and AccuracyBonus: remove it from the others",
                field_path=".scoring.terms",
            ),
            rule(
                "self.sizeClasses.all(c, !has(c.maxParameters) || c.maxParameters > c.minParameters)",
                "sizeClasses[].maxParameters must be greater than minParameters: raise it or remove it",
                field_path=".sizeClasses",
            ),
            rule("!has(self.trainers) || has(self.steps)", _TRAINERS_WITHOUT_STEPS, field_path=".trainers"),
        )
    )

    node_selector: NodeSelector = Field(description="Nodes that the policy hands out.")
    resources: Annotated[tuple[ResourcePool, ...], Field(min_length=1, max_length=1)] = Field(
        description="The resource that is handed out; all policies of a cluster name the same one.",
        json_schema_extra=list_map("name"),
    )
    filters: Filters = Field(description="Bounds that an offer must keep.")
    scoring: Scoring = Field(description="How offers are scored.")
    task_types: Annotated[tuple[TaskTypeRule, ...], Field(min_length=1, max_length=5)] = Field(
        description="Task types; one that is not listed is not accepted.", json_schema_extra=list_map("name")
    )
    families: Annotated[tuple[FamilyRule, ...], Field(max_length=64)] = Field(
        (), description="Model families.", json_schema_extra=list_map("name")
    )
    size_classes: Annotated[tuple[SizeClass, ...], Field(min_length=1, max_length=16)] = Field(
        description="Model sizes, from small to large.", json_schema_extra=list_map("name")
    )
    lanes: Annotated[tuple[Lane, ...], Field(max_length=16)] = Field(
        (),
        description="Shares of the GPUs; empty means that all tasks share all GPUs.",
        json_schema_extra=list_map("name"),
    )
    gpu_choice: GpuChoice | None = Field(
        None,
        description="SizeClass (default); or of the counts with which the task is predicted to fit and to end in time "
        "FewestGpuHours, the one that takes the fewest GPU-hours, EarliestEnd, the one that ends first, now or after "
        "running jobs have ended, or MostValue, the one of the highest expected value for each GPU-hour. Where "
        "nothing is predicted it is the size class's count.",
    )
    queue: Queue | None = Field(None, description="In which order offers are admitted; absent goes by score and age.")
    namespaces: Annotated[tuple[NamespaceLimit, ...], Field(max_length=256)] = Field(
        (), description="Limits of namespaces; one that is not listed has none.", json_schema_extra=list_map("name")
    )
    placement: Placement | None = Field(None, description="Which of the nodes that fit is taken.")
    preemption: Preemption | None = Field(
        None, description="When running jobs stop for offers that wait, and go on later; absent stops none."
    )
    estimation: Estimation | None = Field(
        None, description="How memory is predicted; absent takes every offer to fit, with the settings as they stand."
    )
    learning: Learning | None = Field(
        None, description="How outcomes correct success rates and predictions; absent takes the policy at its word."
    )
    pod_template: PodSettings = Field(description="What training pods get beside their GPUs.")
    steps: Steps | None = Field(
        None,
        description="How models and data are fetched and results handed over; absent takes only offers whose model, "
        "data and output lie on claims.",
    )
    trainers: Trainers | None = Field(
        None, description="Which trainers of their own offers may bring; absent allows none. It needs steps."
    )
    attempts: AttemptLimits = Field(default_factory=AttemptLimits, description="How often a job is tried.")
    retention: Retention | None = Field(None, description="How long decided objects are kept.")

    @model_validator(mode="after")
    def _check_size_classes(self) -> CapacityPolicySpec:
        previous: SizeClass | None = None
        for size in self.size_classes:
            if size.max_parameters is not None and size.max_parameters <= size.min_parameters:
                raise ValueError(
                    f"sizeClasses[{size.name}].maxParameters must be greater than minParameters: raise it or remove it"
                )
            if previous is not None and (
                previous.max_parameters is None or size.min_parameters < previous.max_parameters
            ):
                raise ValueError(
                    f"sizeClasses[{size.name}] starts at {size.min_parameters}, inside {previous.name}: "
                    "order the classes from small to large without overlap"
                )
            previous = size
        return self

    @model_validator(mode="after")
    def _check_lanes(self) -> CapacityPolicySpec:
        known = {size.name for size in self.size_classes}
        for lane in self.lanes:
            for item in lane.rules:
                unknown = [name for name in item.size_classes if name not in known]
                if unknown:
                    raise ValueError(
                        f"lanes[{lane.name}].rules[].sizeClasses: {unknown[0]} is not one of sizeClasses: name one of "
                        f"{sorted(known)}"
                    )
                if item.gpus_per_task > lane.gpus:
                    raise ValueError(
                        f"lanes[{lane.name}] gives {item.gpus_per_task} GPUs per task but has only "
                        f"{lane.gpus}: raise gpus or lower gpusPerTask"
                    )
        return self

    @model_validator(mode="after")
    def _check_references(self) -> CapacityPolicySpec:
        lanes = {lane.name for lane in self.lanes}
        for lane in self.lanes:
            for other in lane.borrow_from:
                if other not in lanes or other == lane.name:
                    raise ValueError(f"lanes[{lane.name}].borrowFrom names {other}: name another lane of the policy")
        known = self.queue.priorities if self.queue is not None else ()
        for limit in self.namespaces:
            if limit.highest_priority is not None and limit.highest_priority not in known:
                raise ValueError(
                    f"namespaces[{limit.name}].highestPriority {limit.highest_priority} is not one of "
                    f"queue.priorities {list(known)}: name one of them or remove it"
                )
        if self.preemption is not None:
            self._check_preemption(self.preemption, known)
        if self.gpu_choice is GpuChoice.MOST_VALUE and self.scoring.expected_value is None:
            raise ValueError("gpuChoice MostValue needs scoring.expectedValue: set it or choose FewestGpuHours")
        if self.scoring.expected_value is not None and (self.estimation is None or self.estimation.duration is None):
            raise ValueError("scoring.expectedValue needs predicted times: set estimation.duration")
        return self

    def _check_preemption(self, preemption: Preemption, known: Sequence[str]) -> None:
        for number, item in enumerate(preemption.rules):
            for name in (*item.by, *item.of):
                if name not in known:
                    raise ValueError(
                        f"preemption.rules[{number}] names {name}, which is not one of queue.priorities {list(known)}: "
                        "name one of them, or add it there"
                    )
        if preemption.gain_factor is not None and self.scoring.expected_value is None:
            raise ValueError("preemption.gainFactor needs scoring.expectedValue: set it, or use rules alone")

    @model_validator(mode="after")
    def _check_trainers(self) -> CapacityPolicySpec:
        if self.trainers is not None and self.steps is None:
            raise ValueError(_TRAINERS_WITHOUT_STEPS)
        return self

    @model_validator(mode="after")
    def _check_factors(self) -> CapacityPolicySpec:
        # Otherwise an offer would be admitted, and hold its GPUs, under settings that no TrainingJob can have.
        for task in self.task_types:
            for architecture in (None, *(one.name for one in task.architectures)):
                for size in self.size_classes:
                    check_recipe(size, task, architecture)
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> CapacityPolicySpec:
        allowed = set(self.resources[0].counts)
        for size in self.size_classes:
            if size.gpus not in allowed:
                raise ValueError(
                    f"sizeClasses[{size.name}].gpus is {size.gpus}, and resources[0].counts allows {sorted(allowed)}: "
                    "choose one of them or add it there"
                )
        return self


class LintFinding(WireModel):
    """A defect of the policy that does not stop it from working."""

    field: Annotated[str, StringConstraints(max_length=253)] = Field(description="Field that the finding is about.")
    severity: Literal["Info", "Warning", "Error"] = Field(description="Info, Warning or Error.")
    message: Annotated[str, StringConstraints(max_length=512)] = Field(description="What is wrong, and the remedy.")


class CapacityPolicyStatus(WireModel):
    """How the policy stands. The operator is its only writer."""

    observed_generation: Annotated[int, Field(ge=0)] | None = Field(None, description="The metadata.generation seen.")
    conditions: Conditions = Field((), description="Ready and Linted.")
    active_spec: CapacityPolicySpec | None = Field(None, description="The last valid spec: the one in force.")
    active_generation: Annotated[int, Field(ge=0)] | None = Field(None, description="Generation of activeSpec.")
    lint: Annotated[tuple[LintFinding, ...], Field(max_length=32)] = Field(
        (), description="Lint findings.", json_schema_extra=ATOMIC_LIST
    )
    capacity: Capacity | None = Field(None, description="GPUs and offers.")


class CapacityPolicy(WireModel):
    """The rules by which offers are scored and GPUs are handed out."""

    api_version: ApiVersion = "taskoffer.dev/v1alpha1"
    kind: Literal["CapacityPolicy"] = "CapacityPolicy"
    metadata: ObjectMeta
    spec: CapacityPolicySpec
    status: CapacityPolicyStatus = CapacityPolicyStatus()
