"""What a policy says of kinds of task: which types and model families it takes, and how models of a size train."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from taskoffer.api.base import WireModel, spelled
from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.faults import what_is_wrong
from taskoffer.api.tasks import Architecture, TaskType
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, DecimalString, GpuCount, list_map, rule, rules
from taskoffer.api.v1alpha1.overlays import ArchitectureRule, LoraOverlay, TrainOverlay

Label = Annotated[str, StringConstraints(min_length=1, max_length=63)]
Parameters = Annotated[int, Field(ge=0, le=10**15, json_schema_extra={"format": "int64"})]


_ONLY_PICTURES = "architectures is only for the task type Image: remove it, and use lora and train"


class TaskTypeRule(WireModel):
    """How one task type is treated."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.architectures) || size(self.architectures) == 0 || self.name == 'Image'", _ONLY_PICTURES)
        )
    )

    name: TaskType = Field(description="The task type.")
    accepted: bool = Field(description="Whether offers of this type are taken at all.")
    weight: DecimalString = Field(description="Value of the TaskWeight term, 0 to 1.")
    success_rate: DecimalString = Field(description="Value of the TaskSuccessRate term, 0 to 1.")
    parameter_factor: DecimalString | None = Field(
        None,
        description="Factor on the model size when GPUs are chosen (DPO holds more copies than instruct).",
    )
    lora: LoraOverlay | None = Field(
        None, description="LoRA settings in place of the size class's; one that is absent stays the size class's."
    )
    train: TrainOverlay | None = Field(
        None, description="Training settings in place of the size class's; one that is absent stays the size class's."
    )
    architectures: Annotated[tuple[ArchitectureRule, ...], Field(max_length=2)] = Field(
        (),
        description="Settings in place of these for image models of an architecture; only for the task type Image.",
        json_schema_extra=list_map("name"),
    )
    lora_rank_factor: DecimalString | None = Field(
        None, description="Factor on the LoRA rank and its alpha, whoever set them; default 1."
    )
    learning_rate_factor: DecimalString | None = Field(
        None, description="Factor on the learning rate, whoever set it; default 1."
    )
    daily_floor: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None,
        description="Offers of this type that are to be admitted within 24 hours: while there are fewer, "
        "filters.floorMinScore counts instead of minScore.",
    )

    @model_validator(mode="after")
    def _check_architectures(self) -> TaskTypeRule:
        if self.architectures and self.name is not TaskType.IMAGE:
            raise ValueError(_ONLY_PICTURES)
        return self


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


def laid_lora(size: SizeClass, task: TaskTypeRule, architecture: Architecture | None = None) -> LoraSettings:
    """Return a size class's LoRA settings with the task type's over them, and the architecture's over those.

    Raises:
        ValidationError: when they are no valid settings together, which no policy of the operator's is.
    """
    lora = size.lora
    for overlay in (task.lora, *(one.lora for one in task.architectures if one.name is architecture)):
        lora = overlay.over(lora) if overlay is not None else lora
    return lora


def laid_train(size: SizeClass, task: TaskTypeRule, architecture: Architecture | None = None) -> TrainSettings:
    """Return a size class's training settings with the task type's over them, and the architecture's over those.

    Raises:
        ValidationError: when they are no valid settings together, which no policy of the operator's is.
    """
    train = size.train
    for overlay in (task.train, *(one.train for one in task.architectures if one.name is architecture)):
        train = overlay.over(train) if overlay is not None else train
    return train


def scaled_lora(lora: LoraSettings, task: TaskTypeRule) -> dict[str, int]:
    """Return LoRA rank and alpha times the task type's factor, rounded half up, at least 1."""
    factor = Decimal(task.lora_rank_factor or "1")
    parts = {"r": lora.r, "lora_alpha": lora.lora_alpha}
    return {name: max(1, int((part * factor).to_integral_value(ROUND_HALF_UP))) for name, part in parts.items()}


def scaled_train(train: TrainSettings, task: TaskTypeRule) -> dict[str, float]:
    """Return the learning rate times the task type's factor."""
    factor = Decimal(task.learning_rate_factor or "1")
    return {"learning_rate": float(Decimal(str(train.learning_rate)) * factor)}


def lora_of(size: SizeClass, task: TaskTypeRule, architecture: Architecture | None = None) -> LoraSettings:
    """Return what adapters are trained with: the size class's settings, overlays, and then the factor on the rank."""
    lora = laid_lora(size, task, architecture)
    return lora.model_copy(update=scaled_lora(lora, task))


def train_of(size: SizeClass, task: TaskTypeRule, architecture: Architecture | None = None) -> TrainSettings:
    """Return how is trained: the size class's settings, overlays, and then the factor on the learning rate."""
    train = laid_train(size, task, architecture)
    return train.model_copy(update=scaled_train(train, task))


def check_recipe(size: SizeClass, task: TaskTypeRule, architecture: Architecture | None) -> None:
    """Check that the settings of a task type on a size class are such as a TrainingJob can have.

    Raises:
        ValueError: when they are not.
    """
    try:
        lora, train = laid_lora(size, task, architecture), laid_train(size, task, architecture)
    except ValidationError as error:
        place = f" for {architecture.value}" if architecture is not None else ""
        raise ValueError(
            f"taskTypes[{task.name.value}]{place} does not go with sizeClasses[{size.name}]: "
            f"{what_is_wrong(error.errors()[0])[0]}"
        ) from None
    scaled = ((LoraSettings, scaled_lora(lora, task)), (TrainSettings, scaled_train(train, task)))
    for model, parts in scaled:
        try:
            model.model_validate(parts)
        except ValidationError as error:
            fault = error.errors()[0]
            field = model.model_fields[str(fault["loc"][0])].alias
            raise ValueError(
                f"taskTypes[{task.name.value}] scales {field} of sizeClasses[{size.name}] to "
                f"{fault['input']}, which {what_is_wrong(fault)[0]}: change the factor"
            ) from None
