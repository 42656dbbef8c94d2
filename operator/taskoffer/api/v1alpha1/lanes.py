"""Lanes of a policy: shares of the GPUs that are kept for some kinds of task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from taskoffer.api.base import WireModel
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, GpuCount
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.profiles import Label


class LaneRule(WireModel):
    """What a lane takes and how many GPUs each task gets there. Absent lists match everything."""

    task_types: Annotated[tuple[TaskType, ...], Field(max_length=5)] = Field(
        (), description="Task types that the lane takes.", json_schema_extra={"x-kubernetes-list-type": "set"}
    )
    size_classes: Annotated[tuple[Label, ...], Field(max_length=16)] = Field(
        (),
        description="Size classes that the lane takes.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    architectures: Annotated[tuple[Architecture, ...], Field(max_length=2)] = Field(
        (),
        description="Image architectures that the lane takes.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    gpus_per_task: GpuCount = Field(description="GPUs that a task gets in this lane.")


class Lane(WireModel):
    """A share of the GPUs for some kinds of task. Lanes are counts, not certain GPUs."""

    name: Label = Field(description="Name of the lane.")
    gpus: Annotated[int, Field(ge=1, le=4096)] = Field(description="GPUs of the lane, over all nodes.")
    rules: Annotated[tuple[LaneRule, ...], Field(min_length=1, max_length=16)] = Field(
        description="What the lane takes; the first rule that matches counts.", json_schema_extra=ATOMIC_LIST
    )
    borrow_from: Annotated[tuple[Label, ...], Field(max_length=15)] = Field(
        (),
        description="Lanes whose free GPUs its tasks may take when this one is booked and nobody waits there, in order "
        "of preference.",
        json_schema_extra=ATOMIC_LIST,
    )
