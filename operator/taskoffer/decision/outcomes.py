"""What finished jobs teach: success rates and corrections of the predictions, for each kind of task.

A kind is a task type on a model family and size class with a number of GPUs. With n outcomes of a kind, s of them
successes, and k the policy's ``learning.priorStrength``:

* success rate: ``(prior * k + s) / (k + n)``, the mean of the posterior when the policy's rate is a Beta prior worth k
  observations (conjugate Beta-Bernoulli; Gelman et al., Bayesian Data Analysis, 3rd ed., section 2.4);
* duration factor: ``exp(sum(ln(measured / predicted)) / (n + k))``, a geometric mean drawn towards 1: the mean of the
  posterior of a normal with known variance on the logarithm, whose prior is at 0 and worth k observations (the same,
  section 2.5). Times are off by factors, and a factor of 2 and one of 1/2 are to cancel out;
* memory factor likewise, and at least 1: what fitted with room to spare is no reason to plan with less.

Without outcomes all of them are the policy's own word. The sums are over the newest outcomes only, so that what an
older image or older settings did is forgotten.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Attempt, AttemptOutcome, TrainingJob
from taskoffer.decision.conditions import condition_of, is_true
from taskoffer.decision.sizing import family_of, parameters_of, size_class_of

FAILURES: Mapping[Reason, str] = {
    Reason.FAILED: "an exit code after which the same settings fail again: data, model, verification",
    Reason.ATTEMPTS_EXHAUSTED: "every attempt failed, for example for lack of memory or gradients that are not finite",
    Reason.DEADLINE_EXCEEDED: "the training took longer than the offer gave",
}
"""Reasons of a Failed condition that say something of the task or its settings, and what. No other reason counts: the
offer was cancelled or deleted, its admission could not be read, a policy or a name stood in the way."""

_OF_THE_CLUSTER = frozenset({AttemptOutcome.NODE_LOST, AttemptOutcome.START_TIMEOUT})
"""Ends of an attempt that say nothing of the task."""
_LEAST_SHARE = 0.5
"""Of a shorter part of the planned steps the time says too little: warm-up and verification come once."""
_FURTHEST = math.log(10)
"""A record that is off by more than a factor of ten is taken as off by ten; a trainer runs foreign code."""
_RATE, _FACTOR = Decimal("0.0001"), Decimal("0.01")


class Kind(NamedTuple):
    """What tasks have in common that share their outcomes."""

    task_type: TaskType
    family: str
    """Empty where the policy knows none for the model."""
    size_class: str
    gpus: int

    @property
    def group(self) -> Group:
        """The kind whatever the number of GPUs."""
        return Group(self.task_type, self.family, self.size_class)


class Group(NamedTuple):
    """A kind of task whatever its number of GPUs: all that an offer's evaluation may ask for."""

    task_type: TaskType
    family: str
    size_class: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one finished job says of its kind; None where it says nothing."""

    uid: str
    policy: str
    kind: Kind
    finished: datetime
    success: bool | None
    duration: float | None
    """ln(measured / predicted) of the training's time."""
    memory: float | None
    """ln(measured / predicted) of the peak memory of a GPU."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the outcomes of a kind amount to."""

    judged: int = 0
    """Outcomes that were a success or a failure."""
    successes: int = 0
    durations: int = 0
    duration_factor: Decimal = Decimal(1)
    memories: int = 0
    memory_factor: Decimal = Decimal(1)

    @property
    def duration_basis(self) -> str:
        """Say how a time was corrected; empty where it was not."""
        return _basis(self.duration_factor, self.durations)

    @property
    def memory_basis(self) -> str:
        """Say how a peak was corrected; empty where it was not."""
        return _basis(self.memory_factor, self.memories)


UNKNOWN = Estimate()
"""What is known of a kind without outcomes."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What a policy has learned."""

    strength: Decimal = Decimal(1)
    """The policy's ``learning.priorStrength``."""
    estimates: Mapping[Kind, Estimate] = field(default_factory=dict)
    versions: Mapping[Group, int] = field(default_factory=dict)
    """A number for each group that changes whenever one of its estimates does."""

    def of(self, kind: Kind) -> Estimate:
        """Return what is known of a kind."""
        return self.estimates.get(kind, UNKNOWN)

    def about(self, spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int) -> Estimate:
        """Return what is known of tasks like an offer's on so many GPUs."""
        group = group_of(spec, policy) if self.estimates else None
        return self.of(Kind(*group, gpus)) if group is not None else UNKNOWN

    def success_rate(self, estimate: Estimate, prior: Decimal) -> Decimal:
        """Return the success rate of a kind from the policy's own and the outcomes; the policy's where there is none.

        It lies between the two, rounded half up to four places.
        """
        if estimate.judged == 0:
            return prior
        rate = (prior * self.strength + estimate.successes) / (self.strength + estimate.judged)
        return rate.quantize(_RATE, ROUND_HALF_UP)

    def version(self, group: Group | None) -> int:
        """Return the number of a group's estimates; it changes whenever one of them does."""
        return self.versions.get(group, 0) if group is not None else 0


NOTHING = Learned()
"""What a policy without ``learning`` has learned."""


def group_of(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Group | None:
    """Return the group that an offer's task belongs to under a policy; None where it has no size class there."""
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    size = size_class_of(parameters, policy.size_classes) if parameters is not None else None
    family = family_of(spec.model.name, policy.families)
    return Group(spec.task_type, family.name if family else "", size.name) if size is not None else None


def outcome_of(job: TrainingJob) -> Outcome | None:
    """Return what a job says of its kind.

    None while it runs, where its kind is not recorded, and where its offer brought its own trainer.
    """
    run, status = job.spec.run, job.status
    kind = next((kind for kind in ("Complete", "Failed") if is_true(status.conditions, kind)), "")
    ended = condition_of(status.conditions, kind)
    if ended is None or run.size_class is None or run.trainer is not None:
        return None
    # The best so far of a training that ended early was handed over, and yet its settings did not do what they should.
    success = True if ended.type == "Complete" and status.early_end is None else None
    if ended.type == "Failed" and is_failure(ended.reason, status.attempts):
        success = False
    measured, predicted = status.measured, run.predicted
    duration = memory = None
    if measured is not None and predicted is not None:
        share = float(measured.trained_share or 0)
        if share >= _LEAST_SHARE:
            duration = _log_ratio(measured.training_seconds, (predicted.training_seconds or 0) * share)
        memory = _log_ratio(measured.peak_memory_bytes, predicted.peak_memory_bytes or 0)
    return Outcome(
        uid=job.metadata.uid or "",
        policy=run.policy_ref.name,
        kind=Kind(run.task_type, run.family or "", run.size_class, run.gpus),
        finished=ended.last_transition_time,
        success=success,
        duration=duration,
        memory=memory,
    )


def is_failure(reason: str, attempts: Sequence[Attempt]) -> bool:
    """Tell whether a job that failed for this reason says something of its task.

    A reason that speaks of the attempts does only where the container itself ended the last one; a deadline only where
    the task ran and no attempt was lost to the cluster.
    """
    if reason not in FAILURES or not attempts:
        return False
    last = attempts[-1]
    if reason == Reason.DEADLINE_EXCEEDED:
        return last.started_at is not None and not any(a.outcome in _OF_THE_CLUSTER for a in attempts)
    # Without an exit code somebody removed the pod; one that was stopped was asked to.
    return last.outcome is AttemptOutcome.FAILED and last.exit_code is not None


def estimate(outcomes: Iterable[Outcome], learning: Learning) -> Estimate:
    """Return what the outcomes of one kind amount to under a policy's settings, in whatever order they come."""
    strength = float(learning.prior_strength)
    newest = heapq.nlargest(learning.newest, outcomes, key=lambda outcome: (outcome.finished, outcome.uid))
    judged = [outcome.success for outcome in newest if outcome.success is not None]
    durations = [outcome.duration for outcome in newest if outcome.duration is not None]
    memories = [outcome.memory for outcome in newest if outcome.memory is not None]
    return Estimate(
        judged=len(judged),
        successes=sum(judged),
        durations=len(durations),
        duration_factor=_factor(durations, strength),
        memories=len(memories),
        memory_factor=max(Decimal(1), _factor(memories, strength)),
    )


def _factor(logs: Sequence[float], strength: float) -> Decimal:
    # Rounded, so that what is told is what is used, and so that a small change is none.
    exact = math.exp(math.fsum(logs) / (len(logs) + strength))
    return Decimal(exact).quantize(_FACTOR, ROUND_HALF_UP) if logs else Decimal(1)


def _log_ratio(measured: int | None, predicted: float) -> float | None:
    if not measured or predicted <= 0:
        return None
    return max(-_FURTHEST, min(_FURTHEST, math.log(measured / predicted)))


def _basis(factor: Decimal, count: int) -> str:
    return f"x{factor.normalize():f} from {count} outcome{'' if count == 1 else 's'}" if factor != 1 else ""
