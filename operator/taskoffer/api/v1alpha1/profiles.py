"""What a policy says of kinds of task: which types and model families it takes, and how models of a size train."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated

from pydantic import Field, StringConstraints

from taskoffer.api.base import WireModel, spelled
from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, DecimalString, GpuCount

Label = Annotated[str, StringConstraints(min_length=1, max_length=63)]
Parameters = Annotated[int, Field(ge=0, le=10**15, json_schema_extra={"format": "int64"})]


class TaskTypeRule(WireModel):
    """How one task type is treated."""

    name: TaskType = Field(description="The task type.")
    accepted: bool = Field(description="Whether offers of this type are taken at all.")
    weight: DecimalString = Field(description="Value of the TaskWeight term, 0 to 1.")
    success_rate: DecimalString = Field(description="Value of the TaskSuccessRate term, 0 to 1.")
    parameter_factor: DecimalString | None = Field(
        None,
        description="Factor on the model size when GPUs are chosen (DPO holds more copies than instruct).",
    )
    lora_rank_factor: DecimalString | None = Field(None, description="Factor on the LoRA rank; default 1.")
    learning_rate_factor: DecimalString | None = Field(None, description="Factor on the learning rate; default 1.")
    daily_floor: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Offers of this type that are to be admitted within 24 hours: while there are fewer, "
        "filters.floorMinScore counts instead of minScore.",
    )


class FamilyRule(WireModel):
    """A model family, recognised by the longest pattern that the model's name contains."""

    name: Label = Field(description="Name of the family.")
    patterns: Annotated[
        tuple[
            Annotated[
                str,
                StringConstraints(min_length=2, max_length=63),
                spelled(
                    r"^[a-z0-9][a-z0-9._-]*$",
                    "must be a lower-case part of a model's name: use letters, digits, '.', '_' and '-'",
                ),
            ],
            ...,
        ],
        Field(min_length=1, max_length=16),
    ] = Field(description="Lower-case parts of model names.", json_schema_extra=ATOMIC_LIST)
    success_rate: DecimalString = Field(description="Value of the ModelPerformance term, 0 to 1.")


class SizeClass(WireModel):
    """A range of model sizes with its GPU count and its training settings. The lower bound is inclusive."""

    name: Label = Field(description="Name of the class.")
    min_parameters: Parameters = Field(description="Smallest model, inclusive.")
    max_parameters: Parameters | None = Field(None, description="First size that is too large; absent means no bound.")
    gpus: GpuCount = Field(description="GPUs for a model of this size.")
    size_efficiency: DecimalString = Field(description="Value of the SizeEfficiency term, 0 to 1.")
    lora: LoraSettings = Field(description="LoRA settings.")
    train: TrainSettings = Field(description="Training settings.")


def scaled_lora(size: SizeClass, task: TaskTypeRule) -> dict[str, int]:
    """Return a size class's LoRA rank and alpha times the task type's factor, rounded half up, at least 1."""
    factor = Decimal(task.lora_rank_factor or "1")
    parts = {"r": size.lora.r, "lora_alpha": size.lora.lora_alpha}
    return {name: max(1, int((part * factor).to_integral_value(ROUND_HALF_UP))) for name, part in parts.items()}


def scaled_train(size: SizeClass, task: TaskTypeRule) -> dict[str, float]:
    """Return a size class's learning rate times the task type's factor."""
    factor = Decimal(task.learning_rate_factor or "1")
    return {"learning_rate": float(Decimal(str(size.train.learning_rate)) * factor)}
