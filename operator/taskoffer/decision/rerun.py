"""Deciding again: the answer to one offer if it, or what is booked, were different."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime

from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.cycle import plan
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.outcomes import NOTHING
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot, on_count_in_time
from taskoffer.decision.verdict import Answer

_MOST_RUNS, _FEWEST_RUNS = 64, 8
_MOST_LOOKS = 100_000
"""Offers that all runs together look at one by one; those that stand aside in groups cost next to nothing."""


def undecided(offer: OfferView) -> OfferView:
    """Return an offer as if nobody had answered it: a plan leaves out answers that an offer carries already."""
    return replace(offer, conditions=(), observed_generation=None)


def without(snapshot: Snapshot, uid: str) -> Snapshot:
    """Return the snapshot without one pending offer."""
    standing = {
        shape: [found for found in group if found.offer.uid != uid] for shape, group in snapshot.standing.items()
    }
    return replace(
        snapshot,
        offers=[offer for offer in snapshot.offers if offer.uid != uid],
        standing={shape: group for shape, group in standing.items() if group},
    )


def released(snapshot: Snapshot, holders: Collection[str]) -> Snapshot:
    """Return the snapshot as if these holders' GPUs had come free."""
    return replace(
        snapshot,
        claims=[claim for claim in snapshot.claims if claim.holder not in holders],
        releases=[release for release in snapshot.releases if release.holder not in holders],
        running=[running for running in snapshot.running if running.holder not in holders],
    )


@dataclass(frozen=True, slots=True)
class Verified:
    """What a cycle answers an offer, and what it was evaluated to under which policy."""

    answer: Answer
    policy: PolicyView | None
    evaluation: Evaluation | None


@dataclass(slots=True)
class Rerun:
    """Decides one offer again, together with everything else that waits."""

    snapshot: Snapshot
    """Without the offer."""
    offer: OfferView
    """The offer with its full spec, undecided."""
    left: int = _MOST_RUNS
    """How many runs may still be made: each is a whole cycle."""

    @classmethod
    def of(cls, snapshot: Snapshot, offer: OfferView) -> Rerun:
        """Prepare to decide an offer again, whether or not the snapshot has it."""
        runs = min(_MOST_RUNS, max(_FEWEST_RUNS, _MOST_LOOKS // (len(snapshot.offers) + 1)))
        return cls(without(snapshot, offer.uid), undecided(offer), runs)

    def evaluate(self, spec: TaskOfferSpec) -> tuple[PolicyView | None, Evaluation | None]:
        """Return the policy that decides a spec, and what the spec is evaluated to under it."""
        policy = self.snapshot.policy_for(spec)[0]
        if policy is None or policy.spec is None:
            return policy, None
        learned = self.snapshot.learned.get(policy.name, NOTHING)
        return policy, evaluate(spec, policy.spec, self.offer.key.namespace, learned)

    def decide(
        self, spec: TaskOfferSpec | None, *, created: datetime | None = None, ended: Collection[str] = ()
    ) -> Verified | None:
        """Decide the offer with this spec, or None when no run is left.

        Args:
            spec: What it offers; None where the stored offer cannot be read.
            created: When it was created, if that is to be another moment.
            ended: Holders whose GPUs are to have come free.
        """
        if self.left <= 0:
            return None
        self.left -= 1
        view = replace(self.offer, spec=spec, created=created or self.offer.created)
        policy, evaluation = self.evaluate(spec) if spec is not None else (None, None)
        evaluations = dict(self.snapshot.evaluations)
        if policy is not None and evaluation is not None:
            evaluation = on_count_in_time(view, evaluation, self.snapshot.now)
            evaluations[view.uid, policy.name] = evaluation
        world = released(self.snapshot, ended) if ended else self.snapshot
        made = plan(replace(world, offers=[*world.offers, view], evaluations=evaluations))
        answer = next(decision.answer for decision in made.decisions if decision.offer.uid == view.uid)
        return Verified(answer, policy, evaluation)
