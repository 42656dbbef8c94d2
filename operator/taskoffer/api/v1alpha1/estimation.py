"""What a policy says about the GPUs, so that memory can be predicted."""

from __future__ import annotations

from pydantic import Field

from taskoffer.api.base import WireModel
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
