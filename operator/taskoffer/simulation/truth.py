"""How a task of a trace really goes, which no policy sees.

The real duration is what ``decision.finish`` predicts with the numbers of :data:`REFERENCE`, whatever a policy's own
``estimation`` says, times the trace's factor. What a policy does decide are the GPUs and the training settings: a
policy that asks for fewer steps is done sooner, also in truth. Memory is judged the same way: what does not fit a
whole GPU of 80 GB even with one row at a time fails once the model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.estimation import DurationEstimation, Estimation
from taskoffer.api.v1alpha1.meta import GPU_COUNTS
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.finish import finish_of
from taskoffer.decision.fit import Subject, fit
from taskoffer.decision.moments import later
from taskoffer.decision.prediction import predict
from taskoffer.decision.recipe import estimation_of, requested_settings
from taskoffer.decision.sizing import parameters_of
from taskoffer.simulation.run import Outcome
from taskoffer.simulation.task import Task
from taskoffer.simulation.trace import Trace, TraceOffer

MEASURED_SHARE = 0.1
"""Share of its training after which a job's trainer knows how long the rest takes. The real one goes by its last 20
steps, which is sooner as a rule."""

START = datetime(2026, 1, 1, tzinfo=UTC)
"""The moment at which every trace begins; a spec's deadline is read against it."""

_DURATION = DurationEstimation()
REFERENCE = Estimation(gpu_memory="80G", memory_fraction="1.0", duration=_DURATION)
"""The simulated GPUs: those that the defaults of ``estimation`` describe, with all of their memory usable."""

REFERENCE_SETTINGS = Settings(
    lora=LoraSettings(r=128, lora_alpha=256), train=TrainSettings(per_device_train_batch_size=16)
)
"""Settings where no policy is given: one pass over the data, rank 128 with alpha 256 as the market's winners use."""


@dataclass(frozen=True, slots=True)
class Course:
    """How a job goes on its GPUs: how long it holds them, and what comes of it."""

    seconds: float
    outcome: Outcome
    whole: float
    """Seconds that it would take if it did not fail and had all the time it wants."""


def moment(seconds: float) -> datetime:
    """Return the moment so many seconds after the start of a trace."""
    return later(START, seconds)


def seconds_at(when: datetime) -> float:
    """Return how many seconds after the start of a trace a moment lies."""
    return (when - START).total_seconds()


def settings_under(policy: CapacityPolicySpec | None, spec: TaskOfferSpec, gpus: int) -> Settings:
    """Return the settings that a policy trains an offer with on so many GPUs, or those without a policy.

    Raises:
        ValueError: when the policy has no size class or task type for the offer.
    """
    if policy is None:
        return REFERENCE_SETTINGS
    predicted = predict(spec, policy, gpus)
    return predicted.fit.effective if predicted is not None else requested_settings(spec, policy)


def hardware_of(policy: CapacityPolicySpec) -> Estimation:
    """Return what one unit of a policy's resource really is: a whole GPU, or its share of a GPU that is shared."""
    return estimation_of(policy.model_copy(update={"estimation": REFERENCE})) or REFERENCE


def duration_of(offer: TraceOffer, settings: Settings, gpus: int, hardware: Estimation = REFERENCE) -> float:
    """Return the seconds from the admission to the result, when nothing goes wrong."""
    finish = finish_of(offer.spec, _parameters(offer.spec), settings, hardware.duration or _DURATION, gpus)
    return finish.seconds * offer.truth.factor


def course_of(
    offer: TraceOffer, settings: Settings, gpus: int, admitted: float, hardware: Estimation = REFERENCE
) -> Course:
    """Return how a job goes that is admitted at a second of the trace.

    A job that is not done when its clock has run out is stopped then. One attempt is all that it has.
    """
    allowed = seconds_allowed(offer, admitted)
    fitting, share = _fitting(offer.spec, settings, gpus, hardware), offer.truth.fails_after
    whole = again_of(offer) if fitting is None else duration_of(offer, fitting, gpus, hardware)
    if fitting is None:
        course = Course(whole, "Failed", whole)
    elif share is not None:
        course = Course(whole * share, "Failed", whole)
    else:
        course = Course(whole, "InTime", whole)
    return course if course.seconds <= allowed else Course(allowed, "Late", whole)


def measured_after(offer: TraceOffer, seconds: float) -> float:
    """Return the seconds after its start from which a job's trainer says when it will end: it has measured its steps.

    Args:
        offer: The offer.
        seconds: What the job will really take, from its start to its result.
    """
    start = again_of(offer)
    return start + MEASURED_SHARE * max(0.0, seconds - start)


def again_of(offer: TraceOffer) -> float:
    """Return the seconds that a job takes to start once more: what it has trained is saved when it is stopped."""
    return _DURATION.start_seconds * offer.truth.factor


def seconds_allowed(offer: TraceOffer, admitted: float) -> float:
    """Return the seconds after its admission within which a job must be done."""
    spec = offer.spec
    allowed = float(spec.time_limit_seconds)
    if spec.clock_mode is ClockMode.TRAINING:
        allowed += _DURATION.start_seconds * offer.truth.factor
    if spec.deadline is not None:
        allowed = min(allowed, seconds_at(spec.deadline) - admitted)
    return max(0.0, allowed)


def expiry_of(offer: TraceOffer) -> float | None:
    """Return the second of the trace at which the offer is gone, or None where it waits for ever."""
    ends = [] if offer.patience is None else [offer.at + offer.patience]
    ends += [seconds_at(moment) for moment in (offer.spec.expires_at, offer.spec.source_ends) if moment is not None]
    return min(ends, default=None)


def tasks_of(trace: Trace, policy: CapacityPolicySpec | None = None) -> list[Task]:
    """Return what a scheduler could do with a trace who knows the future.

    Args:
        trace: The offers.
        policy: Its training settings are used, its rules and GPU counts are not, nor that it shares GPUs; absent uses
            the reference settings. Offers that it has no settings for are left out.

    Returns:
        Offers that can be finished in time if they start as soon as they arrive, with every GPU count that does it.
        The last start of an offer that waits for ever is infinite.
    """
    tasks = []
    for offer in trace.offers:
        if offer.truth.fails_after is not None:
            continue
        seconds_by_gpus = {}
        for gpus in GPU_COUNTS:
            seconds = _seconds_in_time(offer, policy, gpus)
            if seconds is not None:
                seconds_by_gpus[gpus] = seconds
        if seconds_by_gpus:
            ends = expiry_of(offer)
            last_start = math.inf if ends is None else ends
            due = math.inf if offer.spec.deadline is None else seconds_at(offer.spec.deadline)
            tasks.append(Task(offer.name, offer.at, last_start, offer.worth, seconds_by_gpus, due))
    return tasks


def _seconds_in_time(offer: TraceOffer, policy: CapacityPolicySpec | None, gpus: int) -> float | None:
    try:
        settings = settings_under(policy, offer.spec, gpus)
    except ValueError:
        # The policy has no settings for such an offer, so nobody can train it under them.
        return None
    course = course_of(offer, settings, gpus, offer.at)
    return course.seconds if course.outcome == "InTime" else None


def _fitting(spec: TaskOfferSpec, settings: Settings, gpus: int, hardware: Estimation) -> Settings | None:
    """Return the settings with which a job fits the memory there is, or None where not even one row does."""
    resolution = spec.dataset.image.resolution if spec.dataset.image else None
    subject = Subject.of(spec.model, _parameters(spec), spec.task_type, resolution)
    found = fit(subject, settings, hardware, gpus)
    return found.effective if found.fits else None


def _parameters(spec: TaskOfferSpec) -> int:
    parameters = parameters_of(spec.model, None)
    assert parameters is not None  # noqa: S101 - a trace holds no offer without it.
    return parameters
