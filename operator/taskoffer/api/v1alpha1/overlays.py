"""What a task type trains with in place of its size class's settings: the same fields, none of which has to be there.

A size class says how large an adapter is for a model of a size. Some task types need another kind of training
altogether, whatever the model's size: a few dozen pictures are trained for a number of steps, not for a pass.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, create_model

from taskoffer.api.base import WireModel
from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.tasks import Architecture

_Settings = TypeVar("_Settings", bound=WireModel)


class _Overlay(WireModel):
    """Settings of which only those count that are there."""

    def over(self, settings: _Settings) -> _Settings:
        """Return settings with these laid over them: what is there counts, what is absent stays.

        Raises:
            ValidationError: when both together are no valid settings.
        """
        given = {name: getattr(self, name) for name in type(self).model_fields}
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            return settings
        return type(settings).model_validate({**{name: getattr(settings, name) for name in given}, **changes})


def _optional(settings: type[WireModel]) -> dict[str, Any]:
    """Return the fields of a type with their bounds, none of them required and none with a default."""
    made: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        extra = field.json_schema_extra
        made[name] = (kind | None, Field(None, description=field.description, json_schema_extra=extra))
    return made


_LoraFields = create_model("_LoraFields", __base__=_Overlay, **_optional(LoraSettings))
_TrainFields = create_model("_TrainFields", __base__=_Overlay, **_optional(TrainSettings))


class LoraOverlay(_LoraFields):
    """LoRA settings in place of others: every field of ``LoraSettings``, none of them required."""


class TrainOverlay(_TrainFields):
    """Training settings in place of others: every field of ``TrainSettings``, none of them required."""


class ArchitectureRule(WireModel):
    """Settings of image models of one architecture, in place of the task type's."""

    name: Architecture = Field(description="The architecture: sdxl or flux.")
    lora: LoraOverlay | None = Field(None, description="LoRA settings in place of the task type's.")
    train: TrainOverlay | None = Field(None, description="Training settings in place of the task type's.")
