"""What is predicted of an offer on so many GPUs: whether it fits and when it ends, as refusals and as estimates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from taskoffer.api.contract import Clamp
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.learning import MOST_BYTES, MOST_SECONDS, Predicted
from taskoffer.api.v1alpha1.taskoffer import LONGEST_TIME_LIMIT, ExplanationItem, TaskOfferSpec
from taskoffer.decision.finish import Finish, duration_text, finish_of
from taskoffer.decision.fit import Fit
from taskoffer.decision.identity import Itself
from taskoffer.decision.memory import GIB
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Learned
from taskoffer.decision.recipe import estimation_of, fit_of
from taskoffer.decision.sizing import parameters_of
from taskoffer.decision.verdict import Refusal

_TOLD_CLAMPS = 3


@dataclass(frozen=True, slots=True)
class Prediction:
    """How an offer's task fits its GPUs, and how long it takes there; None where nothing says so.

    Both are corrected by what is known of tasks like it.
    """

    fit: Fit
    finish: Finish | None
    known: Estimate = UNKNOWN

    @property
    def holds(self) -> bool:
        """Tell whether the task fits and ends in time, as far as that is known."""
        return self.fit.fits and (self.finish is None or self.finish.in_time)

    @property
    def seconds(self) -> float:
        """What the task takes from its admission, with the reserve; 0 where nothing says so."""
        return 0.0 if self.finish is None else self.finish.seconds + self.finish.reserve

    @property
    def memory_numbers(self) -> str:
        """Say the peak and its limit, and how it was corrected."""
        basis = self.known.memory_basis
        return f"{self.fit.numbers}, {basis}" if basis else self.fit.numbers

    def record(self) -> Predicted:
        """Return what the formulas say and the factors beside it, for a job to keep until it is measured."""
        duration, memory = self.known.duration_factor, self.known.memory_factor
        training = None if self.finish is None else min(self.finish.training / float(duration), MOST_SECONDS)
        return Predicted(
            training_seconds=None if training is None else round(training),
            peak_memory_bytes=max(1, min(round(self.fit.peak / float(memory)), MOST_BYTES)),
            duration_factor=str(duration) if self.finish is not None else None,
            memory_factor=str(memory),
        )


def predict(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, learned: Learned = NOTHING
) -> Prediction | None:
    """Return what is predicted of an offer on so many GPUs, or None where the policy does not estimate.

    Raises:
        ValueError: when the policy has no size class or task type for the offer.
    """
    return _predict(Itself(spec), Itself(policy), gpus, Itself(learned.about(spec, policy, gpus)))


@lru_cache(maxsize=32)
def _predict(
    offered: Itself[TaskOfferSpec], under: Itself[CapacityPolicySpec], gpus: int, shown: Itself[Estimate]
) -> Prediction | None:
    """Predict. One evaluation asks for the same counts again and again: to choose, to score, to name a remedy."""
    spec, policy, known = offered.value, under.value, shown.value
    fits = fit_of(spec, policy, gpus, known.memory_factor)
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    estimation = estimation_of(policy)
    if fits is None or estimation is None or parameters is None:
        return None
    duration, finish = estimation.duration, None
    if duration is not None and fits.fits and (spec.dataset.rows or fits.effective.train.max_steps > 0):
        finish = _corrected(finish_of(spec, parameters, fits.effective, duration, gpus), known)
    return Prediction(fits, finish, known)


def _corrected(finish: Finish, known: Estimate) -> Finish:
    """Return the prediction as outcomes have shown it to be; the pod's start is not part of what they measure."""
    basis = known.duration_basis
    if not basis:
        return finish
    training = finish.training * float(known.duration_factor)
    return finish._replace(training=training, basis=f"{finish.basis}, {basis}")


def holding_counts(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned = NOTHING
) -> Iterator[tuple[int, Prediction]]:
    """Yield the counts that the policy hands out with which the task fits and ends in time, with the prediction."""
    for gpus in policy.resources[0].counts:
        found = predict(spec, policy, gpus, learned)
        if found is None or (found.fit.fits and found.finish is None):
            # Nothing says how long the task takes, on whatever count.
            return
        if found.finish is not None and found.holds:
            yield gpus, found


def fewest_gpu_hours(spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned = NOTHING) -> int | None:
    """Return the count that the policy hands out with which the task holds and takes the fewest GPU-hours, or None.

    A pod's start takes as long on four GPUs as on one, so that as a rule it is the smallest count that holds.
    """
    hours_of = {
        gpus: gpus * found.finish.seconds
        for gpus, found in holding_counts(spec, policy, learned)
        if found.finish is not None
    }
    return min(hours_of, key=lambda gpus: (hours_of[gpus], gpus), default=None)


def refusals_of(
    found: Prediction,
    spec: TaskOfferSpec,
    policy: CapacityPolicySpec,
    gpus: int,
    most_gpus: int | None,
    learned: Learned = NOTHING,
) -> Iterator[Refusal]:
    """Say what stands against the offer on its GPUs, and what would be taken under the policy.

    Args:
        found: What is predicted on these GPUs.
        spec: The offer.
        policy: The policy.
        gpus: Its GPUs.
        most_gpus: The most that its lane has, where it has one.
        learned: What the policy has learned.
    """
    if found.holds:
        return
    counts = (n for n in policy.resources[0].counts if n != gpus and (most_gpus is None or n <= most_gpus))
    nearest = sorted(counts, key=lambda n: (abs(n - gpus), n))
    others = ((n, predict(spec, policy, n, learned)) for n in nearest)
    enough = next((n for n, other in others if other is not None and other.holds), None)
    remedies = [f"gpuCount {enough}"] if enough is not None else []
    if not found.fit.fits:
        yield Refusal(
            Reason.INSUFFICIENT_MEMORY,
            f"{spec.model.name} needs {found.memory_numbers}, with LoRA rank {found.fit.effective.lora.r}",
            f"accepted with {' or '.join(remedies or ['a smaller model'])}",
        )
    elif found.finish is not None:
        longest = policy.filters.max_time_limit_seconds
        bound = LONGEST_TIME_LIMIT if longest is None else min(LONGEST_TIME_LIMIT, longest - 1)
        if found.finish.least_limit <= bound:
            remedies.append(f"timeLimitSeconds of at least {found.finish.least_limit}")
        yield Refusal(
            Reason.CANNOT_FINISH_IN_TIME,
            f"predicted to take {found.finish.numbers}",
            f"accepted with {' or '.join(remedies or ['fewer rows or a smaller model'])}",
        )


def estimates_of(found: Prediction | None) -> tuple[ExplanationItem, ...]:
    """Return the prediction as the offer's status tells it."""
    if found is None:
        return ()
    items = [_estimate("PeakMemory", f"{found.fit.peak / GIB:.1f}GiB", found.memory_numbers)]
    if found.finish is not None:
        items.append(_estimate("Duration", duration_text(found.finish.seconds), found.finish.numbers))
    return (*items, *(_clamped(clamp) for clamp in found.fit.clamps[:_TOLD_CLAMPS]))


def _clamped(clamp: Clamp) -> ExplanationItem:
    return _estimate(clamp.reason, f"{clamp.requested} -> {clamp.effective}"[:64], clamp.message[:400])


@lru_cache(maxsize=4096)
def _estimate(name: str, value: str, message: str) -> ExplanationItem:
    """Return an estimate. Offers of a queue share most of theirs, and the values are immutable."""
    return ExplanationItem(type="Estimate", name=name, value=value, message=message)
