"""What is expected of an offer: the value that it may earn, the penalty that it may cost, for each GPU-hour.

A task is worth its ``spec.value``; without one, 2 times the root of hours times billions of parameters times the task
type's weight, the work value of the historic task market, whose sizes were clipped to 1 to 40 billion there. It is
earned when the task succeeds and ends in time. That it ends in time follows from the prediction, whose error is taken
to be log-normal: the probability is that of a normal variable below ln(limit / predicted) / spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.profiles import TaskTypeRule
from taskoffer.api.v1alpha1.scoring import ExpectedValue
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.finish import Finish
from taskoffer.decision.outcomes import NOTHING, Learned
from taskoffer.decision.prediction import holding_counts
from taskoffer.decision.sizing import parameters_of

_PLACES = Decimal("0.0001")
_MOST = 1e8
"""More than a score can hold: odd factors of a policy are cut here, so that they cannot stop a cycle."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is expected of an offer on its GPUs."""

    value: float
    """What the task earns when it ends in time."""
    in_time: float
    """Probability that it ends in time, if it succeeds."""
    success: float
    """Probability that it succeeds at all."""
    penalty: float
    gpu_hours: float

    @property
    def probability(self) -> float:
        """Probability that the value is earned."""
        return self.in_time * self.success

    @property
    def gain(self) -> Decimal:
        """Expected earnings for each GPU-hour."""
        return _places(self.probability * self.value / self.gpu_hours)

    @property
    def loss(self) -> Decimal:
        """Expected penalty for each GPU-hour, at most 0."""
        return _places(-(1 - self.probability) * self.penalty / self.gpu_hours)


def expectation_of(
    spec: TaskOfferSpec, task: TaskTypeRule, parameters: int, finish: Finish, scoring: ExpectedValue, success: Decimal
) -> Expectation:
    """Return what is expected of an offer whose task takes so long, and succeeds with this probability."""
    margin = math.log(finish.limit / finish.counted) / float(scoring.duration_spread) if finish.counted > 0 else 9.0
    return Expectation(
        value=value_of(spec, task, parameters, scoring),
        in_time=0.5 * (1 + math.erf(margin / math.sqrt(2))),
        success=min(1.0, float(success)),
        penalty=float(scoring.penalty),
        gpu_hours=max(finish.gpus * finish.seconds / 3600, 1e-6),
    )


def at_stake(
    spec: TaskOfferSpec, task: TaskTypeRule, parameters: int, scoring: ExpectedValue, success: Decimal
) -> float:
    """Return what a task's expected earnings lose between being certainly in time and being certainly late."""
    return min(1.0, float(success)) * (value_of(spec, task, parameters, scoring) + float(scoring.penalty))


def value_of(spec: TaskOfferSpec, task: TaskTypeRule, parameters: int, scoring: ExpectedValue) -> float:
    """Return what the task is worth when it ends in time."""
    if spec.value is not None:
        return float(spec.value)
    billions = min(max(parameters / 1e9, float(scoring.min_billions)), float(scoring.max_billions))
    return float(scoring.factor) * math.sqrt(spec.time_limit_seconds / 3600 * billions) * float(task.weight)


def most_valuable(spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned = NOTHING) -> int | None:
    """Return the count with which the task holds and is expected to earn most for each GPU-hour, or None."""
    scoring, parameters = policy.scoring.expected_value, parameters_of(spec.model, policy.filters.unknown_parameters)
    task = next((t for t in policy.task_types if t.name is spec.task_type), None)
    if scoring is None or parameters is None or task is None:
        return None
    worth = {}
    for gpus, found in holding_counts(spec, policy, learned):
        if found.finish is not None:
            success = learned.success_rate(found.known, Decimal(task.success_rate))
            expected = expectation_of(spec, task, parameters, found.finish, scoring, success)
            worth[gpus] = expected.gain + expected.loss
    return max(worth, key=lambda gpus: (worth[gpus], -gpus), default=None)


def _places(number: float) -> Decimal:
    bounded = max(-_MOST, min(_MOST, number))
    return Decimal(f"{bounded:.6f}").quantize(_PLACES, ROUND_HALF_UP)
