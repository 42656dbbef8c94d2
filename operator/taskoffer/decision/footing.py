"""What offers have in common that train the same under one policy: how it fits their GPUs, and how fast it goes.

A queue holds many offers and few models, so both are worked out once for each model and number of GPUs. What is left
to do for one offer is to multiply with its rows, or to work out its pace, where it declares how long they are.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.finish import Pacing, pacing_of
from taskoffer.decision.fit import Fit, Subject, fit, fit_by_copies
from taskoffer.decision.identity import Itself
from taskoffer.decision.recipe import estimation_of, settings_for
from taskoffer.decision.sizing import parameters_of

_AS_PLANNED = Decimal(1)


class Footing(NamedTuple):
    """How a task fits so many GPUs, and how it goes there."""

    fit: Fit
    pacing: Pacing | None
    """None where the policy does not predict the time, or the task does not fit."""
    faster: Footing | None = None
    """With a smaller rank, for tasks that would end too late in shares; None where it is not the rank that shares."""


class Footings:
    """The footing of a subject under a policy on each number of GPUs, worked out when somebody asks."""

    __slots__ = ("_asked", "_estimation", "_planned", "_subject")

    def __init__(self, policy: CapacityPolicySpec, subject: Subject) -> None:
        self._subject = subject
        self._asked = settings_for(subject.parameters, subject.task, policy, subject.architecture)
        self._estimation = estimation_of(policy)
        self._planned: dict[int, Footing | None] = {}

    def on(self, gpus: int, memory_factor: Decimal = _AS_PLANNED) -> Footing | None:
        """Return the footing on so many GPUs of one node, or None where the policy has no settings for the subject.

        Args:
            gpus: The number of GPUs.
            memory_factor: What outcomes have shown every need of memory to be a multiple of.
        """
        if memory_factor != _AS_PLANNED:
            return _corrected(Itself(self), gpus, memory_factor)
        if gpus not in self._planned:
            self._planned[gpus] = self.work_out(gpus, memory_factor)
        return self._planned[gpus]

    def work_out(self, gpus: int, memory_factor: Decimal) -> Footing | None:
        """Return the same without a look at what was found before."""
        subject, asked, estimation = self._subject, self._asked, self._estimation
        if asked is None or estimation is None:
            return None
        found = fit(subject, asked, estimation, gpus, memory_factor)
        if estimation.duration is None or not found.fits:
            return Footing(found, None)
        faster = None
        if found.layout.sharded:
            other = fit_by_copies(subject, asked, estimation, gpus, memory_factor)
            if other is not None:
                faster = Footing(other, pacing_of(subject, other.effective, estimation.duration, gpus))
        return Footing(found, pacing_of(subject, found.effective, estimation.duration, gpus), faster)

    def paced(self, found: Footing, gpus: int, tokens: float) -> Footing:
        """Return one of these footings for rows of so many tokens, instead of what the policy assumes of them."""
        duration = self._estimation.duration if self._estimation is not None else None
        if found.pacing is None or duration is None:
            return found
        pacing = pacing_of(self._subject, found.fit.effective, duration, gpus, tokens)
        return Footing(found.fit, pacing, self.paced(found.faster, gpus, tokens) if found.faster is not None else None)


@lru_cache(maxsize=4096)
def _corrected(footings: Itself[Footings], gpus: int, memory_factor: Decimal) -> Footing | None:
    """Return what outcomes have corrected: they go on doing so, and what they have said before is forgotten."""
    return footings.value.work_out(gpus, memory_factor)


def footings_of(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Footings | None:
    """Return the footings of an offer, the same value for all that train the same under this policy.

    None where the policy does not estimate, the model's size is not known, or the offer brings its own trainer.
    """
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    if policy.estimation is None or parameters is None or spec.trainer is not None:
        return None
    resolution = spec.dataset.image.resolution if spec.dataset.image is not None else None
    return footings_under(Itself(policy), Subject.of(spec.model, parameters, spec.task_type, resolution))


@lru_cache(maxsize=4096)
def footings_under(policy: Itself[CapacityPolicySpec], subject: Subject) -> Footings:
    """Return the footings of a subject, the same value for all subjects that are alike."""
    return Footings(policy.value, subject)


def footing_on(footings: Footings, spec: TaskOfferSpec, gpus: int, memory_factor: Decimal = _AS_PLANNED) -> Footing:
    """Return an offer's footing on so many GPUs.

    Raises:
        ValueError: when the policy has no size class or task type for the offer.
    """
    found = footings.on(gpus, memory_factor)
    if found is None:
        raise ValueError(f"the policy has no settings for {spec.task_type.value} on {spec.model.name}")
    # What is declared is one offer's, and nothing that is kept for others.
    tokens = spec.dataset.tokens_per_row
    return found if tokens is None else footings.paced(found, gpus, tokens)
