"""The report that a trainer leaves beside its result: ``report.json`` in the output folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taskoffer.api.base import Time, WireModel
from taskoffer.api.tasks import TaskType

__all__ = ["AttemptEnd", "FigureChange", "HistoryPoint", "Report", "ReportedChange"]


class FigureChange(WireModel):
    """A figure that the method measures on held-out data."""

    name: str = Field(description="Name of the figure; eval_loss is the one that training makes smaller.")
    before: float | None = Field(None, description="Of the base model.")
    best: float | None = Field(None, description="Of the best checkpoint during the training, where it was measured.")
    after: float | None = Field(None, description="Of the adapter, loaded again onto a fresh base model.")


class HistoryPoint(WireModel):
    """What was logged at a step."""

    step: int = Field(description="Optimizer steps done.")
    figures: dict[str, float] = Field(description="Loss, learning rate and what the method logs; eval_* are held out.")


class AttemptEnd(WireModel):
    """How an attempt ended. One that was killed together with its launcher has left no such entry."""

    attempt: int = Field(description="Its number.")
    started: Time = Field(description="When its container was started.")
    ended: Time = Field(description="When its training processes were gone.")
    exit_code: int = Field(description="Its exit code.")
    reason: str = Field(description="Reason in CamelCase.")
    message: str = Field("", description="The reason in a sentence.")
    step: int = Field(0, description="Optimizer steps done by then, all attempts together.")
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint that it went on from.")
    training_seconds: float | None = Field(None, description="From its first step to its end.")
    tokens_per_second: float | None = Field(None, description="Mean over its steps, all processes together.")
    peak_gpu_bytes: int | None = Field(None, description="Most memory in use on a GPU.")
    peak_host_bytes: int | None = Field(None, description="Largest resident set of a training process.")


class ReportedChange(WireModel):
    """A setting that could not be taken literally."""

    field: str = Field(description="Name of the setting.")
    requested: str = Field(description="The value that was asked for.")
    effective: str = Field(description="The value that was used.")
    reason: str = Field(description="Reason in CamelCase.")
    message: str = Field("", description="The reason in a sentence.")


class Report(WireModel):
    """A run over all of its attempts so far. Written at the end of each, the latest replaces the one before."""

    version: Literal["v1alpha1"] = Field("v1alpha1", description="Version of this form.")
    job_name: str = Field(description="Name of the TrainingJob.")
    task_id: str = Field(description="Identity of the task in its market.")
    task_type: TaskType = Field(description="Kind of training.")
    base_model: str = Field(description="Public name of the base model.")
    revision: str | None = Field(None, description="Its revision.")
    result: Literal["Verified", "Provisional", "Nothing"] = Field(
        description="Verified: adapter holds a verified result. Provisional: only the best adapter so far is there, "
        "checked for wholeness alone. Nothing: there is no adapter."
    )
    adapter: str | None = Field(None, description="Folder of the adapter, seen from the folder of the report.")
    reason: str = Field(description="How the last attempt ended, in CamelCase.")
    message: str = Field("", description="The same in a sentence.")
    step: int = Field(0, description="Optimizer steps done.")
    total_steps: int | None = Field(None, description="Optimizer steps planned.")
    train_loss: float | None = Field(None, description="Training loss of the last step.")
    figures: tuple[FigureChange, ...] = Field((), description="What the method measures, before and after.")
    clamps: tuple[ReportedChange, ...] = Field((), description="Settings that could not be taken literally.")
    history: tuple[HistoryPoint, ...] = Field(
        (), description="Up to 2,000 points over all attempts, every evaluation among them as far as there is room."
    )
    attempts: Annotated[tuple[AttemptEnd, ...], Field(max_length=64)] = Field(
        (), description="The attempts that said how they ended, oldest first."
    )
