"""Outcomes of finished TrainingJobs as they come in, and what each policy makes of them from time to time.

Nothing is stored beside the TrainingJobs themselves: after a restart the list of them gives the same estimates. An
outcome counts from ``learning.refreshSeconds`` after it came in, together with all that came in meanwhile. So the
finish of a job, which frees GPUs for those who wait, does not have all of them evaluated again at that very moment.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from taskoffer.adapters.metrics import LEARNED_DURATION_FACTOR, LEARNED_SUCCESS_RATE, PREDICTION_RATIO
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.api.v1alpha1.meta import PolicyRef
from taskoffer.api.v1alpha1.trainingjob import TrainingJob, TrainingJobStatus
from taskoffer.decision.moments import later
from taskoffer.decision.outcomes import NOTHING, Estimate, Group, Kind, Learned, Outcome, estimate, outcome_of
from taskoffer.decision.snapshot import PolicyView
from taskoffer.reconcile.views import TrainingJobEntry


@dataclass(slots=True)
class _Known:
    """What one policy knows."""

    learned: Learned = NOTHING
    under: PolicyRef | None = None
    """The version of the policy with which it was learned; None while it does not learn."""
    due: datetime | None = None
    """When outcomes that came in since are learned from."""


@dataclass(slots=True)
class Outcomes:
    """Outcomes by policy and kind, and what was learned from them."""

    of: dict[str, dict[Kind, dict[str, Outcome]]] = field(default_factory=dict)
    _changed: dict[str, set[Kind]] = field(default_factory=lambda: defaultdict(set))
    _known: dict[str, _Known] = field(default_factory=dict)
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """One count for all policies, so that no version comes twice, whatever happened to a policy meanwhile."""

    def take(self, before: TrainingJobEntry | None, after: TrainingJobEntry | None) -> None:
        """Take in that a TrainingJob came, changed or went."""
        old, new = _outcome(before), _outcome(after)
        if old == new:
            return
        if old is not None:
            self.of[old.policy][old.kind].pop(old.uid, None)
            self._changed[old.policy].add(old.kind)
        if new is not None:
            self.of.setdefault(new.policy, {}).setdefault(new.kind, {})[new.uid] = new
            self._changed[new.policy].add(new.kind)

    def refresh(self, policies: Mapping[str, PolicyView], now: datetime) -> None:
        """Learn where it is due: at once under another version of a policy, else some time after an outcome came in."""
        for policy in policies.values():
            if policy.spec is not None and policy.spec.learning is not None:
                self._refresh(policy, policy.spec, policy.spec.learning, now)
            elif policy.name in self._known:
                self._forget(policy.name)
        for gone in self._known.keys() - policies.keys():
            self._forget(gone)

    def _forget(self, policy: str) -> None:
        _show(policy, None, NOTHING, self._known.pop(policy).learned.estimates)

    def _refresh(self, policy: PolicyView, spec: CapacityPolicySpec, learning: Learning, now: datetime) -> None:
        name = policy.name
        known = self._known.setdefault(name, _Known())
        kinds = self._changed.get(name, set())
        if known.under != policy.ref:
            kinds = kinds | set(self.of.get(name, ())) | set(known.learned.estimates)
        elif not kinds:
            return
        elif known.due is None or now < known.due:
            known.due = known.due or later(now, learning.refresh_seconds)
            return
        before = known.learned.estimates
        known.learned, known.under, known.due = self._learn(policy, spec, learning, kinds), policy.ref, None
        self._changed.pop(name, None)
        _show(name, spec, known.learned, before)

    def wake_at(self, other: datetime | None) -> datetime | None:
        """Return when outcomes are due to be learned from, or the other moment where that comes first."""
        moments = [other, *(known.due for known in self._known.values())]
        return min((moment for moment in moments if moment is not None), default=None)

    def learned(self, policy: str) -> Learned:
        """Return what a policy has learned so far."""
        known = self._known.get(policy)
        return known.learned if known is not None else NOTHING

    def versions(self) -> dict[str, Mapping[Group, int]]:
        """Return the versions of all groups by policy: they change whenever an evaluation may."""
        return {name: known.learned.versions for name, known in self._known.items()}

    def _learn(self, policy: PolicyView, spec: CapacityPolicySpec, learning: Learning, kinds: set[Kind]) -> Learned:
        before = self._known[policy.name].learned
        estimates, versions = dict(before.estimates), dict(before.versions)
        families, sizes = {"", *(f.name for f in spec.families)}, {size.name for size in spec.size_classes}
        for kind in kinds:
            outcomes = self.of.get(policy.name, {}).get(kind)
            # What the policy does not know any more concerns no offer, and would make metrics without end.
            known = kind.family in families and kind.size_class in sizes
            made = estimate(outcomes.values(), learning) if outcomes and known else None
            if made != estimates.get(kind):
                versions[kind.group] = next(self._versions)
            if made is None:
                estimates.pop(kind, None)
            else:
                estimates[kind] = made
        return Learned(Decimal(learning.prior_strength), estimates, versions)


def observe_errors(job: TrainingJob, status: TrainingJobStatus) -> None:
    """Count by how much the predictions of a job were off that ends with this status."""
    measured, run = status.measured, job.spec.run
    if measured is None:
        return
    share = float(measured.trained_share or 0)
    pairs = (
        ("Duration", measured.training_seconds, (measured.predicted_seconds or 0) * share),
        ("PeakMemory", measured.peak_memory_bytes, float(measured.predicted_peak_bytes or 0)),
    )
    for quantity, found, told in pairs:
        if found and told > 0:
            PREDICTION_RATIO.labels(run.policy_ref.name, run.task_type.value, quantity).observe(found / told)


def _outcome(entry: TrainingJobEntry | None) -> Outcome | None:
    return outcome_of(entry.job) if entry is not None and entry.job is not None else None


def _show(policy: str, spec: CapacityPolicySpec | None, learned: Learned, before: Mapping[Kind, Estimate]) -> None:
    """Show in the metrics what a policy knows, and no more of what it knew before."""
    for kind in before.keys() - learned.estimates.keys():
        for gauge in (LEARNED_SUCCESS_RATE, LEARNED_DURATION_FACTOR):
            gauge.remove(*_labels(policy, kind))
    priors = {task.name: Decimal(task.success_rate) for task in spec.task_types} if spec is not None else {}
    for kind, found in learned.estimates.items():
        if kind.task_type in priors:
            rate = learned.success_rate(found, priors[kind.task_type])
            LEARNED_SUCCESS_RATE.labels(*_labels(policy, kind)).set(float(rate))
        LEARNED_DURATION_FACTOR.labels(*_labels(policy, kind)).set(float(found.duration_factor))


def _labels(policy: str, kind: Kind) -> tuple[str, ...]:
    return policy, kind.task_type.value, kind.family, kind.size_class, str(kind.gpus)
