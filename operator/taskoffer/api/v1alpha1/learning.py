"""What finished jobs are measured by, and how a policy learns from that."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.meta import DecimalString

MOST_SECONDS = 10**9
MOST_BYTES = 10**15
MOST_TOKENS = 10**12
"""Bounds of the schema. A trainer runs foreign code, so that what it reports beyond them counts as not reported."""

Seconds = Annotated[int, Field(ge=0, le=MOST_SECONDS)]
Bytes = Annotated[int, Field(ge=1, le=MOST_BYTES)]
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=63)]


class Learning(WireModel):
    """How the policy's success rates and predictions follow what finished jobs have shown."""

    prior_strength: DecimalString = Field(
        "10",
        description="Outcomes that the policy's own numbers weigh as much as; above 0. With as many outcomes as this "
        "of a kind of task, the policy and the outcomes count half each.",
    )
    newest: Annotated[int, Field(ge=1, le=10_000)] = Field(
        50, description="Outcomes of a kind of task that count, the newest ones: what is older is forgotten."
    )
    refresh_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        300,
        description="Seconds for which outcomes are gathered before waiting offers are evaluated again with them.",
    )

    @model_validator(mode="after")
    def _check(self) -> Learning:
        if Decimal(self.prior_strength) <= 0:
            raise ValueError(
                f"priorStrength {self.prior_strength} must be above 0, or a single failure would make the rate 0"
            )
        return self


class Predicted(WireModel):
    """What the policy's formulas said of the task when its job was made, and what was made of that by learning."""

    training_seconds: Seconds | None = Field(
        None, description="Training and evaluation, from the first step on, by the formula alone."
    )
    peak_memory_bytes: Bytes | None = Field(None, description="Peak memory of each GPU by the formula alone.")
    checkpoint_bytes: Bytes | None = Field(
        None, description="Space for the checkpoints that are kept and the one that is being written."
    )
    duration_factor: DecimalString | None = Field(
        None, description="What trainingSeconds was multiplied with, from earlier outcomes."
    )
    memory_factor: DecimalString | None = Field(
        None, description="What peakMemoryBytes was multiplied with, from earlier outcomes."
    )


class Measured(WireModel):
    """What a finished job took. A figure that nobody measured is absent."""

    container_seconds: Seconds | None = Field(
        None, description="Time in which training containers ran, all attempts together."
    )
    start_seconds: Seconds | None = Field(None, description="From the admission to the first container's start.")
    training_seconds: Seconds | None = Field(
        None,
        description="From the first step to the end, by the trainer; without its word the container's time, where one "
        "attempt did it all.",
    )
    trained_share: DecimalString | None = Field(
        None, description="Share of the planned steps that trainingSeconds were spent on."
    )
    tokens_per_second: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = Field(
        None, description="Tokens trained per second, all processes together, by the trainer."
    )
    peak_memory_bytes: Bytes | None = Field(
        None, description="Most memory in use on a GPU, by the trainer; absent without CUDA."
    )
    peak_host_bytes: Bytes | None = Field(
        None, description="Largest resident set of a training process, by the trainer."
    )
    predicted_seconds: Seconds | None = Field(
        None, description="What admission expected of trainingSeconds for all steps: the formula with its factor."
    )
    predicted_peak_bytes: Bytes | None = Field(
        None, description="What admission expected of peakMemoryBytes: the formula with its factor."
    )
