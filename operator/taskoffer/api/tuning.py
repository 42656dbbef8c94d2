"""Settings of a running trainer that change without a restart, and how it acknowledges them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from taskoffer.api.base import WireModel

TUNING_PATH = "/etc/taskoffer-tuning/request"
"""Where the pod finds its tuning request: a file of the downward API, empty or absent while there is none."""


class Tuning(WireModel):
    """What a running trainer is asked to change. Nothing of it changes what is learned, or in which order."""

    generation: Annotated[int, Field(ge=1)] = Field(description="Number of the request; only a higher one counts.")
    micro_batch: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None, description="Rows that go through the model at once on each GPU; absent leaves it as it is."
    )
    duty_cycle: Annotated[float, Field(ge=0.05, le=1)] = Field(
        1.0, description="Share of the time that is work; the rest is a pause after each step."
    )


class AppliedTuning(WireModel):
    """The tuning that a trainer works with."""

    generation: Annotated[int, Field(ge=0)] = Field(description="Request that was applied last; 0 is the beginning.")
    micro_batch: Annotated[int, Field(ge=1)] = Field(description="Rows that go through the model at once.")
    micro_batch_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Largest size that memory allowed; absent while nothing was too large."
    )
    duty_cycle: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of the time that is work.")
    step: Annotated[int, Field(ge=0)] = Field(0, description="First step that it held for.")
