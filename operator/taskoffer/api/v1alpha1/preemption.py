"""Whose GPUs a policy takes back for offers that wait, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, DecimalString, Name


class PreemptionRule(WireModel):
    """Which priorities may take GPUs back from which."""

    by: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)] = Field(
        description="Priorities whose waiting offers have running jobs stopped.", json_schema_extra=ATOMIC_LIST
    )
    of: Annotated[tuple[Name, ...], Field(min_length=1, max_length=16)] = Field(
        description="Priorities whose running jobs are stopped.", json_schema_extra=ATOMIC_LIST
    )

    @model_validator(mode="after")
    def _check(self) -> PreemptionRule:
        both = sorted(set(self.by) & set(self.of))
        if both:
            raise ValueError(
                f"preemption.rules: {both[0]} is in both by and of: jobs of one priority would stop each other in turn"
            )
        return self


class Preemption(WireModel):
    """When running jobs save, stop, and go on later so that an offer that waits can start.

    A job is stopped only where it is predicted to end in time all the same. The time away counts against its limit.
    """

    rules: Annotated[tuple[PreemptionRule, ...], Field(max_length=8)] = Field(
        (),
        description="By priority; empty lets every offer take from every job, by gainFactor alone.",
        json_schema_extra=ATOMIC_LIST,
    )
    gain_factor: DecimalString | None = Field(
        None,
        description="Only an offer that would miss its start otherwise, and is expected to earn at least this many "
        "times what the stopped jobs are expected to lose; absent does not weigh and goes by the rules alone.",
    )
    gpu_hour_price: DecimalString = Field(
        "0", description="With gainFactor: what a GPU-hour is expected to earn otherwise, so that the offer earns less."
    )
    min_run_seconds: Annotated[int, Field(ge=0, le=31_536_000)] = Field(
        600, description="Seconds that an attempt has run before it is stopped."
    )
    max_preemptions: Annotated[int, Field(ge=1, le=10)] = Field(3, description="How often one job is stopped at most.")
    resume_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        600, description="Seconds that stopping and going on costs a job: save, start, load, and steps done twice."
    )

    @model_validator(mode="after")
    def _check(self) -> Preemption:
        if not self.rules and self.gain_factor is None:
            raise ValueError("preemption needs rules, gainFactor or both: set one, or remove preemption")
        return self
