"""What is predicted of an offer on so many GPUs: whether it fits and when it ends, as refusals and as estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.contract import Clamp
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.learning import MOST_BYTES, MOST_SECONDS, Predicted
from taskoffer.api.v1alpha1.taskoffer import LONGEST_TIME_LIMIT, ExplanationItem, TaskOfferSpec
from taskoffer.decision.finish import Finish, duration_text
from taskoffer.decision.fit import Fit
from taskoffer.decision.footing import Footing, Footings, footing_on, footings_of
from taskoffer.decision.identity import Itself
from taskoffer.decision.memory import GIB
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Group, Kind, Learned, group_of
from taskoffer.decision.verdict import Refusal, Remedy

_TOLD_CLAMPS = 3

NOT_ESTIMATED = ExplanationItem(
    type="Estimate", name="OwnTrainer", message="not estimated: the offer brings its own trainer"
)
"""Told in the place of a prediction, which would be one of the policy's own recipe."""


class Prediction(NamedTuple):
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
        return 0.0 if self.finish is None else self.finish.seconds + self.finish.pacing.reserve

    @property
    def memory_numbers(self) -> str:
        """Say the peak and its limit, and how it was corrected."""
        return _memory_numbers(self.fit, self.known.memory_basis)

    def record(self) -> Predicted:
        """Return what the formulas say and the factors beside it, for a job to keep until it is measured."""
        duration, memory = self.known.duration_factor, self.known.memory_factor
        training = None if self.finish is None else min(self.finish.training / float(duration), MOST_SECONDS)
        return Predicted(
            training_seconds=None if training is None else round(training),
            peak_memory_bytes=max(1, min(round(self.fit.peak / float(memory)), MOST_BYTES)),
            checkpoint_bytes=max(1, min(self.fit.checkpoint_bytes, MOST_BYTES)),
            duration_factor=str(duration) if self.finish is not None else None,
            memory_factor=str(memory),
        )


class Outlook:
    """What is predicted of one offer under a policy. Each number of GPUs is worked out once, when somebody asks."""

    __slots__ = ("_footings", "_found", "_group", "_learned", "_spec", "counts")

    def __init__(
        self,
        spec: TaskOfferSpec,
        counts: Sequence[int],
        footings: Footings | None,
        group: Group | None,
        learned: Learned = NOTHING,
    ) -> None:
        """Take what is known of an offer.

        Args:
            spec: The offer.
            counts: The numbers of GPUs that the policy hands out.
            footings: What the offer shares with others that train the same; None where nothing is estimated.
            group: Whose outcomes count for it.
            learned: What the policy has learned.
        """
        self.counts = counts
        self._spec = spec
        self._footings = footings
        self._group = group if learned.estimates else None
        self._learned = learned
        self._found: dict[int, Prediction | None] = {}

    def known(self, gpus: int) -> Estimate:
        """Return what outcomes have shown of tasks like this one on so many GPUs."""
        return self._learned.of(Kind(*self._group, gpus)) if self._group is not None else UNKNOWN

    def on(self, gpus: int) -> Prediction | None:
        """Return what is predicted on so many GPUs, or None where the policy does not estimate.

        Raises:
            ValueError: when the policy has no size class or task type for the offer.
        """
        if gpus not in self._found:
            self._found[gpus] = self._predict(gpus)
        return self._found[gpus]

    def _predict(self, gpus: int) -> Prediction | None:
        if self._footings is None:
            return None
        spec, known = self._spec, self.known(gpus)
        footing = footing_on(self._footings, spec, gpus, known.memory_factor)
        found = _predicted(spec, footing, known)
        if found.holds or footing.faster is None:
            return found
        faster = _predicted(spec, footing.faster, known)
        return faster if faster.holds else found

    def holding(self) -> Iterator[tuple[int, Prediction, Finish]]:
        """Yield the counts that the policy hands out with which the task fits and ends in time, with what is predicted.

        There are none where nothing says how long the task takes.
        """
        for gpus in self.counts:
            found = self.on(gpus)
            if found is None:
                return
            finish = found.finish
            if finish is not None:
                if finish.in_time:
                    yield gpus, found, finish
            elif found.fit.fits:
                # Nothing says so, on whatever count.
                return

    def by_gpu_hours(self) -> list[tuple[int, Prediction]]:
        """Return the counts with which the task holds, first the one on which it takes the fewest GPU-hours.

        A pod's start takes as long on four GPUs as on one, so that as a rule it is the smallest count that holds.
        """
        ranked = sorted(self.holding(), key=lambda found: (found[0] * found[2].seconds, found[0]))
        return [(gpus, it) for gpus, it, _ in ranked]


def _predicted(spec: TaskOfferSpec, footing: Footing, known: Estimate) -> Prediction:
    pacing = footing.pacing
    if pacing is None or not (spec.dataset.rows or pacing.max_steps > 0):
        return Prediction(footing.fit, None, known)
    basis = known.duration_basis if known is not UNKNOWN else ""
    # A factor of which nothing would be told does not count.
    factor = float(known.duration_factor) if basis else 1.0
    return Prediction(footing.fit, pacing.finish(spec, factor, basis), known)


def outlook_of(spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned = NOTHING) -> Outlook:
    """Return the outlook of an offer under a policy."""
    group = group_of(spec, policy) if learned.estimates else None
    return Outlook(spec, policy.resources[0].counts, footings_of(spec, policy), group, learned)


def predict(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, learned: Learned = NOTHING
) -> Prediction | None:
    """Return what is predicted of an offer on so many GPUs, or None where the policy does not estimate.

    Raises:
        ValueError: when the policy has no size class or task type for the offer.
    """
    return outlook_of(spec, policy, learned).on(gpus)


def refusals_of(
    outlook: Outlook, spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, possible: Sequence[int]
) -> Iterator[Refusal]:
    """Say what stands against the offer on its GPUs, and what would be taken under the policy.

    Args:
        outlook: What is predicted of the offer.
        spec: The offer.
        policy: The policy.
        gpus: Its GPUs.
        possible: The counts that it may have in its lane and namespace.
    """
    found = outlook.on(gpus)
    if found is None or found.holds:
        return
    nearest = sorted((n for n in possible if n != gpus), key=lambda n: (abs(n - gpus), n))
    others = ((n, outlook.on(n)) for n in nearest)
    enough = next((n for n, other in others if other is not None and other.holds), None)
    remedies = [Remedy(f"with gpuCount {enough}", {"gpu_count": enough})] if enough is not None else []
    if found.fit.lacks_storage:
        yield _lacks_storage(found.fit, spec, policy)
    elif not found.fit.fits:
        yield Refusal(
            Reason.INSUFFICIENT_MEMORY,
            f"{spec.model.name} needs {found.memory_numbers}, with LoRA rank {found.fit.effective.lora.r}",
            remedies=tuple(remedies) or (Remedy("with a smaller model"),),
        )
    elif found.finish is not None:
        longest = policy.filters.max_time_limit_seconds
        bound = LONGEST_TIME_LIMIT if longest is None else min(LONGEST_TIME_LIMIT, longest - 1)
        if (least := found.finish.least_limit) <= bound:
            remedies.append(Remedy(f"with timeLimitSeconds of at least {least}", {"time_limit_seconds": least}))
        yield Refusal(
            Reason.CANNOT_FINISH_IN_TIME,
            f"predicted to take {found.finish.numbers}",
            remedies=tuple(remedies) or (Remedy("with fewer rows or a smaller model"),),
        )


def _lacks_storage(fit: Fit, spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Refusal:
    volume = policy.estimation.checkpoint_volume if policy.estimation is not None else None
    return Refusal(
        Reason.INSUFFICIENT_STORAGE,
        f"the best checkpoint of {spec.model.name}, the newest and one being written take "
        f"{fit.checkpoint_bytes / 1e9:.3g} GB, with LoRA rank {fit.effective.lora.r}, and the policy's "
        f"estimation.checkpointVolume is {volume}",
        remedies=(Remedy("with a smaller model"), Remedy("once estimation.checkpointVolume is raised")),
    )


def estimates_of(found: Prediction | None) -> tuple[ExplanationItem, ...]:
    """Return the prediction as the offer's status tells it."""
    if found is None:
        return ()
    peak, *clamps = _memory_estimates(Itself(found.fit), "" if found.known is UNKNOWN else found.known.memory_basis)
    if found.finish is None:
        return (peak, *clamps)
    seconds = duration_text(found.finish.seconds)
    duration = ExplanationItem(type="Estimate", name="Duration", value=seconds, message=found.finish.numbers)
    return (peak, duration, *clamps)


@lru_cache(maxsize=4096)
def _memory_estimates(fits: Itself[Fit], basis: str) -> tuple[ExplanationItem, ...]:
    """Return what is told of memory: the peak, and what was clamped. All offers that train the same are told it."""
    fit = fits.value
    peak = ExplanationItem(
        type="Estimate", name="PeakMemory", value=f"{fit.peak / GIB:.1f}GiB", message=_memory_numbers(fit, basis)
    )
    return (peak, *(_clamped(clamp) for clamp in fit.clamps[:_TOLD_CLAMPS]))


def _memory_numbers(fit: Fit, basis: str) -> str:
    return f"{fit.numbers}, {basis}" if basis else fit.numbers


def _clamped(clamp: Clamp) -> ExplanationItem:
    value = f"{clamp.requested} -> {clamp.effective}"[:64]
    return ExplanationItem(type="Estimate", name=clamp.reason, value=value, message=clamp.message[:400])
