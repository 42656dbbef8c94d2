"""How a policy values offers: a weighted sum of terms, or the value that is expected of them."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from taskoffer.api.base import WireModel
from taskoffer.api.v1alpha1.meta import ATOMIC_LIST, DecimalString, list_map, rule, rules


class TermName(StrEnum):
    """The terms of a score. Each is a value from 0 to 1 that its weight scales."""

    TASK_WEIGHT = "TaskWeight"
    """The task type's weight."""
    MODEL_PERFORMANCE = "ModelPerformance"
    """The success rate of the model's family."""
    TASK_SUCCESS_RATE = "TaskSuccessRate"
    """The success rate of the task type."""
    TIME_EFFICIENCY = "TimeEfficiency"
    """1 minus the time limit as a share of the longest one that the policy takes. Tables go over its hours."""
    SIZE_EFFICIENCY = "SizeEfficiency"
    """The size class's value. Tables go over billions of parameters."""
    BONUS = "Bonus"
    """1: the hardware's advantage, the same for every offer. Tables go over the GPUs that the task gets."""
    ACCURACY_BONUS = "AccuracyBonus"
    """1: the advantage of few jobs with many GPUs. Tables go over the GPUs that the task gets."""


FIXED_TERMS = frozenset({TermName.BONUS, TermName.ACCURACY_BONUS})
"""Terms whose value a policy may fix."""
TABLE_TERMS = FIXED_TERMS | {TermName.TIME_EFFICIENCY, TermName.SIZE_EFFICIENCY}
"""Terms whose value a policy may give as a table."""


class TermStep(WireModel):
    """The value of a term up to a bound."""

    below: DecimalString | None = Field(None, description="First input that is too large; absent means no bound.")
    value: DecimalString = Field(description="The term's value there, 0 to 1.")


class TermWeight(WireModel):
    """The weight of a term and, where a policy defines it otherwise, its value."""

    name: TermName = Field(description="The term.")
    weight: DecimalString = Field(description="Its weight.")
    value: DecimalString | None = Field(None, description="Fixed value; only for Bonus and AccuracyBonus, default 1.")
    table: Annotated[tuple[TermStep, ...], Field(max_length=16)] = Field(
        (),
        description="Values by steps instead of the usual definition: TimeEfficiency over hours of the time limit, "
        "SizeEfficiency over billions of parameters, Bonus and AccuracyBonus over GPUs.",
        json_schema_extra=ATOMIC_LIST,
    )

    def at(self, entry: Decimal) -> Decimal:
        """Return the table's value at an input; 0 beyond its last step."""
        for step in self.table:
            if step.below is None or entry < Decimal(step.below):
                return Decimal(step.value)
        return Decimal(0)

    @model_validator(mode="after")
    def _check_table(self) -> TermWeight:
        if self.table and self.name not in TABLE_TERMS:
            raise ValueError(f"scoring.terms[{self.name.value}].table: this term has no table; remove it")
        if self.value is not None and self.name not in FIXED_TERMS:
            raise ValueError(
                f"scoring.terms[{self.name.value}].value: only Bonus and AccuracyBonus have one; remove it"
            )
        if self.table and self.value is not None:
            raise ValueError(f"scoring.terms[{self.name.value}]: set either value or table")
        bounds = [step.below for step in self.table]
        known = [Decimal(bound) for bound in bounds if bound is not None]
        if None in bounds[:-1] or known != sorted(set(known)):
            raise ValueError(
                f"scoring.terms[{self.name.value}].table[].below must rise, and only the last may be absent"
            )
        above = [step.value for step in self.table if Decimal(step.value) > 1]
        if above:
            raise ValueError(f"scoring.terms[{self.name.value}].table: value {above[0]} must be from 0 to 1")
        return self


class ExpectedValue(WireModel):
    """The value that is expected of an offer for each GPU-hour that it takes.

    An offer is worth its ``spec.value``, else ``factor`` times the root of hours times billions of parameters, times
    the task type's weight. That is won with the probability that the task succeeds and ends in time; else the penalty
    is lost.
    """

    penalty: DecimalString = Field("1", description="What a task costs that fails or ends late, in units of value.")
    factor: DecimalString = Field("2", description="Factor on the root of hours times billions of parameters.")
    min_billions: DecimalString = Field("1", description="Smaller models count as this large.")
    max_billions: DecimalString = Field("40", description="Larger models count as this large.")
    duration_spread: DecimalString = Field(
        "0.15",
        description="Standard deviation of the logarithm of measured over predicted time: how sure a prediction is.",
    )
    urgency_seconds: Annotated[int, Field(ge=1, le=604_800)] | None = Field(
        None,
        description="How soon the end of an offer's wait counts: of two offers the one goes first whose value for each "
        "GPU-hour is higher, discounted by e for each such time that is left to it. Absent goes by value alone.",
    )

    spare_share: DecimalString | None = Field(
        None,
        description="With gpuChoice MostValue a task may get more GPUs than the count of the highest value, up to this "
        "share of what is free and nobody waits for; absent gives no more.",
    )

    @model_validator(mode="after")
    def _check(self) -> ExpectedValue:
        if self.spare_share is not None and Decimal(self.spare_share) > 1:
            raise ValueError(
                f"scoring.expectedValue.spareShare {self.spare_share} must be at most 1: 0.75 is three quarters"
            )
        if Decimal(self.min_billions) > Decimal(self.max_billions):
            raise ValueError(
                f"scoring.expectedValue: minBillions {self.min_billions} is above maxBillions {self.max_billions}: "
                "lower the one or raise the other"
            )
        if not 0 < Decimal(self.duration_spread) <= 2:
            raise ValueError(
                f"scoring.expectedValue.durationSpread {self.duration_spread} must be above 0 and at most 2: "
                "0.15 is about 15 %"
            )
        return self


class Scoring(WireModel):
    """The score: the weighted sum of the terms, capped; or the expected value for each GPU-hour."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.terms) && self.terms.size() > 0) != has(self.expectedValue)",
                "scoring needs exactly one of terms and expectedValue: set one and remove the other",
            )
        )
    )

    terms: Annotated[tuple[TermWeight, ...], Field(max_length=7)] = Field(
        (), description="The terms and their weights.", json_schema_extra=list_map("name")
    )
    expected_value: ExpectedValue | None = Field(None, description="Score by expected value instead of terms.")
    cap: DecimalString | None = Field(None, description="Highest score; what is above it shows as a negative Cap term.")

    @model_validator(mode="after")
    def _check(self) -> Scoring:
        if bool(self.terms) == (self.expected_value is not None):
            raise ValueError("scoring.terms and scoring.expectedValue: set exactly one of them")
        return self
