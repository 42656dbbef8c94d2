"""What is expected of an offer: the value that it may earn, the penalty that it may cost, for each GPU-hour.

A task is worth its ``spec.value``; without one, 2 times the root of hours times billions of parameters times the task
type's weight, the work value of the historic task market, whose sizes were clipped to 1 to 40 billion there. It is
earned when the task succeeds and ends in time. That it ends in time follows from the prediction, whose error is taken
to be log-normal: the probability is that of a normal variable below ln(limit / predicted) / spread.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from taskoffer.api.v1alpha1.profiles import TaskTypeRule
from taskoffer.api.v1alpha1.scoring import ExpectedValue
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.finish import Finish
from taskoffer.decision.outcomes import Estimate, Learned
from taskoffer.decision.prediction import Outlook, Prediction

_PLACES = Decimal("0.0001")
_MOST = 1e8
"""More than a score can hold: odd factors of a policy are cut here, so that they cannot stop a cycle."""


class Expectation(NamedTuple):
    """What is expected of an offer on its GPUs."""

    value: float
    """What the task earns when it ends in time."""
    in_time: float
    """Probability that it ends in time, if it succeeds."""
    success: float
    """Probability that it succeeds at all."""
    gpu_hours: float
    gain: Decimal
    """Expected earnings for each GPU-hour."""
    loss: Decimal
    """Expected penalty for each GPU-hour, at most 0."""

    @property
    def probability(self) -> float:
        """Probability that the value is earned."""
        return self.in_time * self.success


class Stakes:
    """What an offer's task may earn and cost. Each number of GPUs is worked out once, when somebody asks."""

    __slots__ = ("_found", "_learned", "_penalty", "_prior", "_spread", "_value")

    def __init__(
        self, spec: TaskOfferSpec, task: TaskTypeRule, parameters: int, scoring: ExpectedValue, learned: Learned
    ) -> None:
        self._value = value_of(spec, task, parameters, scoring)
        self._penalty = float(scoring.penalty)
        self._spread = float(scoring.duration_spread)
        self._prior = Decimal(task.success_rate)
        self._learned = learned
        self._found: dict[int, Expectation] = {}

    def on(self, finish: Finish, known: Estimate) -> Expectation:
        """Return what is expected on so many GPUs, from when it ends there and what is known of such tasks."""
        found = self._found.get(finish.gpus)
        if found is None:
            found = self._found[finish.gpus] = self._expect(finish, self._learned.success_rate(known, self._prior))
        return found

    def lateness(self, known: Estimate) -> float:
        """Return what the task's expected earnings lose between being certainly in time and being certainly late."""
        success = self._learned.success_rate(known, self._prior)
        return min(1.0, float(success)) * (self._value + self._penalty)

    def _expect(self, finish: Finish, success: Decimal) -> Expectation:
        margin = math.log(finish.limit / finish.counted) / self._spread if finish.counted > 0 else 9.0
        in_time, succeeds = 0.5 * (1 + math.erf(margin / math.sqrt(2))), min(1.0, float(success))
        probability, gpu_hours = in_time * succeeds, max(finish.gpus * finish.seconds / 3600, 1e-6)
        return Expectation(
            value=self._value,
            in_time=in_time,
            success=succeeds,
            gpu_hours=gpu_hours,
            gain=_places(probability * self._value / gpu_hours),
            loss=_places(-(1 - probability) * self._penalty / gpu_hours),
        )


def value_of(spec: TaskOfferSpec, task: TaskTypeRule, parameters: int, scoring: ExpectedValue) -> float:
    """Return what the task is worth when it ends in time."""
    if spec.value is not None:
        return float(spec.value)
    billions = min(max(parameters / 1e9, float(scoring.min_billions)), float(scoring.max_billions))
    return float(scoring.factor) * math.sqrt(spec.time_limit_seconds / 3600 * billions) * float(task.weight)


def by_value(outlook: Outlook, stakes: Stakes) -> list[tuple[int, Prediction]]:
    """Return the counts with which the task holds, first the one that is expected to earn most for each GPU-hour."""

    def place(found: tuple[int, Prediction, Finish]) -> tuple[Decimal, int]:
        gpus, prediction, finish = found
        expected = stakes.on(finish, prediction.known)
        return -(expected.gain + expected.loss), gpus

    return [(gpus, it) for gpus, it, _ in sorted(outlook.holding(), key=place)]


def _places(number: float) -> Decimal:
    bounded = max(-_MOST, min(_MOST, number))
    return Decimal(f"{bounded:.6f}").quantize(_PLACES, ROUND_HALF_UP)
