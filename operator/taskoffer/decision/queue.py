"""Who waits, in the order of admission, and when each is predicted to be admitted."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from taskoffer.api.inquiry import QueueAnswer, Queued, Start
from taskoffer.api.reasons import Reason
from taskoffer.decision.cycle import plan
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.forecast import STEPS, Forecast, forecasts, spread_of
from taskoffer.decision.snapshot import OfferView, Snapshot, Waiting, waiting
from taskoffer.decision.verdict import Answer, Verdict

LOOKED_AHEAD = 200
"""Offers from the first on whose start is estimated. What is behind them could only fill gaps that they leave."""


@dataclass(frozen=True, slots=True)
class Place:
    """An offer that waits, and where."""

    offer: OfferView
    policy: str | None
    evaluation: Evaluation | None
    reason: str
    position: int | None
    """From 1; None where something else than capacity is waited for, so that there is no order."""


@dataclass(frozen=True, slots=True)
class Line:
    """The offers that wait, and those that the next cycle admits, which take their GPUs first."""

    places: list[Place]
    """In the order in which cycles try to admit them; those in no order come last."""
    starting: list[Place]

    @property
    def ordered(self) -> int:
        """How many of them capacity decides."""
        return sum(1 for place in self.places if place.position is not None)


def line(snapshot: Snapshot) -> Line:
    """Return who waits and who is about to start."""
    answers = {decision.offer.uid: decision.answer for decision in plan(snapshot).decisions}
    policies: dict[str, str] = {}
    heirs = snapshot.heirs
    ranked: list[Waiting] = []
    unranked: list[Place] = []
    for offer in snapshot.offers:
        policy = snapshot.policy_for(offer.spec)[0] if offer.spec is not None else None
        name = policy.name if policy is not None else None
        evaluation = snapshot.evaluations.get((offer.uid, name)) if name is not None else None
        reason = _reason(offer, answers)
        if name is not None and evaluation is not None and reason != Reason.SUSPENDED:
            policies[offer.uid] = name
            ranked.append(waiting(offer, evaluation, snapshot.now, is_heir=offer.uid in heirs))
        elif _verdict(offer, answers) is Verdict.WAIT:
            unranked.append(Place(offer, name, evaluation, reason, None))
    groups: list[Sequence[Waiting]] = [sorted(ranked)]
    for shape, group in snapshot.standing.items():
        policies.update((found.offer.uid, shape.policy) for found in group)
        groups.append(group)
    placed: list[Place] = []
    starting: list[Place] = []
    for _, offer, evaluation in heapq.merge(*groups):
        verdict, policy_name = _verdict(offer, answers), policies[offer.uid]
        if verdict is Verdict.WAIT:
            placed.append(Place(offer, policy_name, evaluation, _reason(offer, answers), len(placed) + 1))
        elif verdict is Verdict.ADMIT:
            starting.append(Place(offer, policy_name, evaluation, Reason.ADMITTED.value, None))
    unranked.sort(key=lambda place: (place.offer.created, place.offer.uid))
    return Line([*placed, *unranked], starting)


def _verdict(offer: OfferView, answers: Mapping[str, Answer]) -> Verdict:
    """Return a plan's verdict; an offer that a plan leaves out goes on waiting."""
    return answers[offer.uid].verdict if offer.uid in answers else Verdict.WAIT


def _reason(offer: OfferView, answers: Mapping[str, Answer]) -> str:
    answer = answers.get(offer.uid)
    return answer.reason.value if answer is not None else offer.reason or ""


def queue(
    snapshot: Snapshot, limit: int, *, policy: str | None = None, namespace: str | None = None, leading: bool = True
) -> QueueAnswer:
    """Return the first offers of the queue that a policy decides and that are in a namespace.

    Args:
        snapshot: What a cycle would decide on.
        limit: How many to list.
        policy: Only what this policy decides.
        namespace: Only what is in this namespace.
        leading: Whether the replica that answers is the one that decides.
    """
    everyone = line(snapshot)
    matching = [
        place
        for place in everyone.places
        if (policy is None or place.policy == policy) and (namespace is None or place.offer.key.namespace == namespace)
    ]
    listed = matching[:limit]
    found = tell(snapshot, everyone, listed)
    estimated = min(LOOKED_AHEAD, everyone.ordered)
    return QueueAnswer(
        leading=leading,
        now=snapshot.now,
        waiting=len(everyone.places),
        matching=len(matching),
        estimated=estimated,
        notes=_notes(snapshot, estimated, everyone.ordered),
        offers=found,
    )


def _notes(snapshot: Snapshot, estimated: int, ordered: int) -> tuple[str, ...]:
    spread = f"{100 * spread_of(snapshot):.0f} %"
    told = [f"starts assume that no further offers come; earliest and latest are remaining times off by {spread}"]
    if estimated < ordered:
        told.append(f"estimated for the first {estimated} of {ordered}: those behind could fill gaps that they leave")
    known = {release.holder for release in snapshot.releases}
    unknown = {claim.holder for claim in snapshot.claims} - known
    if unknown:
        told.append(f"nothing says when {len(unknown)} holder(s) of GPUs end, so theirs count as taken")
    return tuple(told)


def tell(snapshot: Snapshot, everyone: Line, listed: Sequence[Place]) -> tuple[Queued, ...]:
    """Return places as they are told to people, with the estimated starts of those that are near the front."""
    ahead = [place for place in everyone.places[:LOOKED_AHEAD] if place.position is not None]
    uids = {place.offer.uid for place in ahead}
    runs: tuple[Forecast, ...] = ()
    if not uids.isdisjoint(place.offer.uid for place in listed):
        runs = _run_ahead(snapshot, [*everyone.starting, *ahead])
    return tuple(_queued(place, runs, uids) for place in listed)


def _run_ahead(snapshot: Snapshot, places: Sequence[Place]) -> tuple[Forecast, ...]:
    made = {(p.offer.uid, p.policy): p.evaluation for p in places if p.policy is not None and p.evaluation is not None}
    return forecasts(replace(snapshot, evaluations=made), [place.offer for place in places])


def _queued(place: Place, runs: Sequence[Forecast], looked_ahead: Collection[str]) -> Queued:
    offer, evaluation = place.offer, place.evaluation
    start, outlook = (None, "")
    if runs and offer.uid in looked_ahead:
        start, outlook = _start(offer.uid, runs)
    score = evaluation.score.total if evaluation is not None and evaluation.score is not None else None
    return Queued(
        namespace=offer.key.namespace,
        name=offer.key.name,
        position=place.position,
        policy=place.policy,
        reason=place.reason,
        gpus=evaluation.gpus if evaluation is not None and evaluation.gpus else None,
        score=str(score) if score is not None else None,
        since=offer.created,
        start=start,
        outlook=outlook,
    )


def _start(uid: str, runs: Sequence[Forecast]) -> tuple[Start | None, str]:
    """Return the start that the first run finds with the bounds of all, or why there is none."""
    found = [run.starts[uid] for run in runs if uid in run.starts]
    expected = runs[0].starts.get(uid)
    if expected is not None:
        latest = _whole(max(found)) if len(found) == len(runs) else None
        return Start(expected=_whole(expected), earliest=_whole(min(found)), latest=latest), ""
    if uid in runs[0].refused:
        return None, f"predicted to be {runs[0].refused[uid]}"
    if runs[0].complete:
        return None, "no predicted end of a job makes room for it"
    return None, f"not within the next {STEPS} ends of jobs"


def _whole(moment: datetime) -> datetime:
    """Return a moment in whole seconds; nothing that is predicted is more exact."""
    return moment.replace(microsecond=0)


def place_of(snapshot: Snapshot, uid: str) -> Queued | None:
    """Return where one offer stands in the queue, or None when it does not wait."""
    everyone = line(snapshot)
    own = next((place for place in everyone.places if place.offer.uid == uid), None)
    return tell(snapshot, everyone, [own])[0] if own is not None else None
