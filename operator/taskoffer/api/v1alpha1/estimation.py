"""What a policy says about the GPUs, so that memory and time can be predicted."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, DecimalString, QuantityString


class MfuStep(WireModel):
    """What share of its peak a GPU reaches with models up to a size."""

    max_parameters: Annotated[int, Field(ge=1, le=10**15, json_schema_extra={"format": "int64"})] | None = Field(
        None, description="First size that is too large for this step; absent means no bound."
    )
    mfu: DecimalString = Field(description="Share of the peak, above 0 and at most 1.")


class DurationEstimation(WireModel):
    """How time is predicted."""

    peak_teraflops: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        989, description="Peak of one GPU in bfloat16 without sparsity, in 10^12 FLOP/s; 989 is an H100 SXM."
    )
    mfu: Annotated[tuple[MfuStep, ...], Field(min_length=1, max_length=16)] = Field(
        (
            MfuStep(max_parameters=2 * 10**9, mfu="0.25"),
            MfuStep(max_parameters=20 * 10**9, mfu="0.35"),
            MfuStep(max_parameters=50 * 10**9, mfu="0.32"),
            MfuStep(mfu="0.30"),
        ),
        description="Share of the peak that is reached, by model size from small to large: an assumption.",
        json_schema_extra=ATOMIC_LIST,
    )
    tokens_per_row: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        400,
        description="Tokens of a row of text, prompt and answer together, where the offer does not declare "
        "dataset.tokens.",
    )
    generated_tokens_per_row: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        256, description="Tokens that are generated for a row of a GRPO task."
    )
    start_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(
        300, description="From the admission to the first step: pod, image, loading the model."
    )
    prepare_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(
        0, description="From the admission to model and data lying there, before the GPUs are used."
    )
    submit_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(
        0, description="From the end of the training to the result being verified and uploaded."
    )
    evaluation_share: DecimalString = Field(
        "0.10", description="Time of evaluating and saving, as a share of training."
    )
    reserve_seconds: Annotated[int, Field(ge=0, le=86400)] = Field(
        180, description="What is to be left of the time limit at the end."
    )

    def mfu_of(self, parameters: int) -> Decimal:
        """Return the share of the peak for a model's size."""
        for step in self.mfu:
            if step.max_parameters is None or parameters < step.max_parameters:
                return Decimal(step.mfu)
        return Decimal(self.mfu[-1].mfu)

    @model_validator(mode="after")
    def _check(self) -> DurationEstimation:
        if not all(0 < Decimal(step.mfu) <= 1 for step in self.mfu):
            raise ValueError("mfu[].mfu must be above 0 and at most 1")
        if Decimal(self.evaluation_share) > 1:
            raise ValueError(f"evaluationShare {self.evaluation_share} must be at most 1: 0.10 is 10 %")
        bounds = [step.max_parameters for step in self.mfu]
        known = [bound for bound in bounds if bound is not None]
        if None in bounds[:-1] or known != sorted(set(known)):
            raise ValueError("mfu[].maxParameters must rise, and only the last may be absent")
        return self


class Estimation(WireModel):
    """How memory and time are predicted. Every number is one GPU's."""

    gpu_memory: QuantityString = Field(description="Memory of one GPU, as 80G.")
    memory_fraction: DecimalString = Field(
        "0.85", description="Share of it that a training may plan with; the rest is for what no formula knows."
    )
    unknown_shape_margin: DecimalString = Field(
        "0.12",
        description="Added where layers and widths are estimated from the size, as a share of what follows from them.",
    )
    checkpoint_volume: QuantityString | None = Field(
        None,
        description="Space for the checkpoints of one job on its output claim, as 500G: where it is too small for all "
        "that saveTotalLimit keeps, fewer are kept. Absent does not look at it.",
    )
    duration: DurationEstimation | None = Field(
        None, description="How time is predicted; absent takes every offer to end in time."
    )

    @model_validator(mode="after")
    def _check(self) -> Estimation:
        if whole(self.gpu_memory) < 10**9:
            raise ValueError(
                f"gpuMemory {self.gpu_memory} is not the memory of a GPU: write a whole number with a unit, as 80G"
            )
        if self.checkpoint_volume is not None and whole(self.checkpoint_volume) < 1:
            raise ValueError(
                f"checkpointVolume {self.checkpoint_volume} is not a space: write a whole number with a unit, as 500G"
            )
        if not 0 < Decimal(self.memory_fraction) <= 1:
            raise ValueError(f"memoryFraction {self.memory_fraction} must be above 0 and at most 1")
        if Decimal(self.unknown_shape_margin) > 1:
            raise ValueError(f"unknownShapeMargin {self.unknown_shape_margin} must be at most 1: 0.12 is 12 %")
        return self
