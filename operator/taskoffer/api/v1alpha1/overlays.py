"""What a task type trains with in place of its size class's settings: the same fields, none of which has to be there.

A size class says how large an adapter is for a model of a size. Some task types need another kind of training
altogether, whatever the model's size: a few dozen pictures are trained for a number of steps, not for a pass.
"""

from __future__ import annotations

from inspect import isclass
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args

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
        return type(settings).model_validate(_laid(self, settings))


def _laid(overlay: _Overlay, below: WireModel | None) -> dict[str, Any]:
    """Return the fields of settings, none of which have to be there, with an overlay's over them, at every depth."""
    made: dict[str, Any] = {} if below is None else {name: getattr(below, name) for name in type(below).model_fields}
    for name in type(overlay).model_fields:
        value = getattr(overlay, name)
        if isinstance(value, _Overlay):
            made[name] = _laid(value, made.get(name))
        elif value is not None:
            made[name] = value
    return made


def _optional(settings: type[WireModel]) -> dict[str, Any]:
    """Return the fields of a type with their bounds, none of them required and none with a default."""
    made: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        inner = _overlaid(field.annotation)
        kind: Any = Annotated[(inner, *field.metadata)] if field.metadata else inner
        extra = field.json_schema_extra
        made[name] = (kind | None, Field(None, description=field.description, json_schema_extra=extra))
    return made


def _overlaid(kind: Any) -> Any:
    """Return a field's type, or the overlay of the settings that it holds.

    Settings within settings must not be filled with their defaults: these would count as set, and once the policy's
    status was written and read nobody could tell them apart.
    """
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    nested = next((one for one in options if isclass(one) and issubclass(one, WireModel)), None)
    if nested is None:
        return kind
    return create_model(f"{nested.__name__}Overlay", __base__=_Overlay, __doc__=nested.__doc__, **_optional(nested))


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
