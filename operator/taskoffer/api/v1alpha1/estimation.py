"""What a policy says about the GPUs, so that memory can be predicted."""

from __future__ import annotations

from decimal import Decimal

from pydantic import Field, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.meta import DecimalString, QuantityString


class Estimation(WireModel):
    """How memory is predicted. Every number is one GPU's."""

    gpu_memory: QuantityString = Field(description="Memory of one GPU, as 80G.")
    memory_fraction: DecimalString = Field(
        "0.85", description="Share of it that a training may plan with; the rest is for what no formula knows."
    )
    unknown_shape_margin: DecimalString = Field(
        "0.12", description="What is added to the need of a model whose layers and widths are estimated from its size."
    )

    @model_validator(mode="after")
    def _check(self) -> Estimation:
        if whole(self.gpu_memory) < 10**9:
            raise ValueError(f"gpuMemory {self.gpu_memory} is not the memory of a GPU: write for example 80G")
        if not 0 < Decimal(self.memory_fraction) <= 1:
            raise ValueError(f"memoryFraction {self.memory_fraction} must be above 0 and at most 1")
        return self
