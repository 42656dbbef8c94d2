"""The admission cycle: one pure function from a snapshot to a plan for all pending offers.

Order of decisions: attempts of admitted jobs that must move come first, then offers by score, then age, then UID.
An offer that does not fit now does not hold up the ones behind it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from operator import itemgetter

from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Assignment, PolicyRef
from taskoffer.api.v1alpha1.taskoffer import Admission, ClockMode, ExplanationItem, TaskOfferSpec
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.finish import duration_text
from taskoffer.decision.ledger import best_fit
from taskoffer.decision.naming import job_name
from taskoffer.decision.room import Obstacle, Room
from taskoffer.decision.snapshot import (
    OfferKey,
    OfferTerms,
    OfferView,
    PolicyView,
    Shape,
    Sibling,
    Snapshot,
    Waiting,
    end_of,
    ttl_end,
)
from taskoffer.decision.verdict import Answer, Verdict

_MOST_ITEMS = 16
"""Items that the schema allows in an explanation."""
_TOLD_CONSTRAINTS = 8


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer that is to be written on an offer at exactly this resourceVersion."""

    offer: OfferView
    answer: Answer
    policy: PolicyRef | None


@dataclass(frozen=True, slots=True)
class Move:
    """GPUs for the next attempt of a job that cannot stay where it was."""

    key: OfferKey
    offer_uid: str
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cycle decided, and when time alone will change an answer (the next expiry)."""

    decisions: tuple[Decision, ...]
    moves: tuple[Move, ...] = ()
    wake_at: datetime | None = None
    waiting: int = 0
    """Offers that wait after this cycle, whether or not their answer changed."""


def plan(snapshot: Snapshot) -> Plan:
    """Decide every pending offer of the snapshot. Only answers whose verdict or reason changed are in the plan."""
    room = Room(snapshot)
    moves = tuple(_moves(snapshot, room))
    decisions: list[Decision] = []
    wake_at = snapshot.standing_end
    waiting = 0
    for offer, policy, early, evaluation in _in_order(snapshot, room):
        if evaluation is None or policy is None:
            answer = early
        else:
            obstacle = room.obstacle(policy, evaluation)
            if obstacle is not None and _says(offer, obstacle.reason) and not room.rejects(policy, obstacle):
                answer = None
            else:
                answer = _place(offer, policy, evaluation, obstacle, room, snapshot.now)
        if answer is None or answer.verdict is Verdict.WAIT:
            waiting += 1
            ends = end_of(offer, evaluation)
            if ends is not None and (wake_at is None or ends < wake_at):
                wake_at = ends
        if answer is not None and not (answer.verdict is Verdict.WAIT and _says(offer, answer.reason)):
            decisions.append(Decision(offer, answer, policy.ref if policy else None))
    return Plan(tuple(decisions), moves, wake_at, waiting + room.passed_over)


def _says(offer: OfferView, reason: Reason) -> bool:
    """Tell whether the offer's status gives this reason already, for this generation."""
    return offer.reason == reason.value and offer.observed_generation == offer.generation


def _in_order(
    snapshot: Snapshot, room: Room
) -> Iterable[tuple[OfferView, PolicyView | None, Answer | None, Evaluation | None]]:
    """Yield offers with answers that need no capacity first, then the others by score, age and UID."""
    ranked: list[Waiting] = []
    policies: dict[str, PolicyView] = {}
    resolved: dict[str | None, tuple[PolicyView | None, Reason | None, str]] = {}
    for offer in snapshot.offers:
        if offer.spec is not None and offer.spec.policy_name not in resolved:
            resolved[offer.spec.policy_name] = snapshot.policy_for(offer.spec)
        policy, early, evaluation = _without_capacity(offer, snapshot, resolved)
        if early is not None or policy is None or evaluation is None:
            yield offer, policy, early, None
        else:
            ranked.append((-evaluation.rank, offer.created, offer.uid, offer, evaluation))
            policies[offer.uid] = policy
    ranked.sort(key=itemgetter(0, 1, 2))
    for shape, (_, _, uid, offer, evaluation) in _by_rank(ranked, snapshot, room):
        yield offer, snapshot.policies[shape.policy] if shape else policies[uid], None, evaluation


def _by_rank(ranked: Sequence[Waiting], snapshot: Snapshot, room: Room) -> Iterable[tuple[Shape | None, Waiting]]:
    """Merge the ranked offers with the standing groups; a group ends where its obstacle is met again."""
    queues: list[tuple[Shape | None, Sequence[Waiting]]] = [(None, ranked), *snapshot.standing.items()]
    heads = [(queue[0][:3], number, 0) for number, (_, queue) in enumerate(queues) if queue]
    heapq.heapify(heads)
    while heads:
        _, number, at = heads[0]
        shape, queue = queues[number]
        if shape is not None and room.still_stops(snapshot.policies[shape.policy], queue[at][4], shape.reason):
            room.passed_over += len(queue) - at
            heapq.heappop(heads)
            continue
        yield shape, queue[at]
        if at + 1 < len(queue):
            heapq.heapreplace(heads, (queue[at + 1][:3], number, at + 1))
        else:
            heapq.heappop(heads)


def _without_capacity(
    offer: OfferView,
    snapshot: Snapshot,
    resolved: Mapping[str | None, tuple[PolicyView | None, Reason | None, str]],
) -> tuple[PolicyView | None, Answer | None, Evaluation | None]:
    """Return an offer's policy with its answer where capacity does not matter, else with its evaluation."""
    spec = offer.spec
    if spec is None:
        message = f"the stored offer is not valid: {offer.invalid}"
        return None, Answer(Verdict.REJECT, Reason.INVALID_OFFER, message), None
    ends = offer.ends
    if ends is not None and snapshot.now >= ends:
        field = "expiresAt" if spec.expires_at == ends else "deadline"
        message = f"not admitted before spec.{field} {rfc3339(ends)}"
        return None, Answer(Verdict.REJECT, Reason.EXPIRED, message), None
    duplicate = _older_sibling(offer, spec, snapshot)
    if duplicate is not None:
        return None, duplicate, None
    policy, reason, message = resolved[spec.policy_name]
    if policy is None:
        return None, Answer(Verdict.WAIT, reason or Reason.POLICY_NOT_FOUND, message), None
    evaluation = snapshot.evaluations[offer.uid, policy.name]
    if evaluation.refusals:
        return policy, _rejection(evaluation), None
    if not spec.is_active:
        message = "spec.active is false: set it to true to have the offer decided"
        score = evaluation.score.total if evaluation.score else None
        return policy, Answer(Verdict.WAIT, Reason.SUSPENDED, message, score), None
    if (ends := end_of(offer, evaluation)) is not None and snapshot.now >= ends:
        ttl = ttl_end(offer, evaluation)
        if ttl is not None and snapshot.now >= ttl:
            message = f"not admitted within the policy's offerTtlSeconds {evaluation.ttl}, until {rfc3339(ttl)}"
            return policy, Answer(Verdict.REJECT, Reason.EXPIRED, message), None
        return policy, _too_late(spec, evaluation, snapshot.now), None
    return policy, None, evaluation


def _too_late(spec: TaskOfferSpec | OfferTerms, evaluation: Evaluation, now: datetime) -> Answer:
    """Answer an offer whose task would end after its deadline if it started now."""
    assert spec.deadline is not None  # noqa: S101
    left = duration_text(max(0.0, (spec.deadline - now).total_seconds()))
    takes = duration_text(evaluation.seconds)
    message = (
        f"predicted to take {takes}, reserve included, and {left} are left until spec.deadline {rfc3339(spec.deadline)}"
    )
    constraint = ExplanationItem(type="Constraint", name=Reason.CANNOT_FINISH_IN_TIME.value, message=message)
    remedy = _remedy(Reason.CANNOT_FINISH_IN_TIME, f"accepted with a deadline more than {takes} away")
    total = evaluation.score.total if evaluation.score else None
    items = _explanation(evaluation, [constraint, remedy])
    return Answer(Verdict.REJECT, Reason.CANNOT_FINISH_IN_TIME, message, total, items)


def _older_sibling(offer: OfferView, spec: TaskOfferSpec | OfferTerms, snapshot: Snapshot) -> Answer | None:
    first = first_of_task(offer, snapshot.siblings.get((offer.key.namespace, spec.task_id), ()))
    if first is None:
        return None
    return Answer(
        Verdict.REJECT,
        Reason.DUPLICATE_TASK,
        f"TaskOffer {first.name} has the same taskID {spec.task_id} and is older; its answer ({first.reason}) counts",
    )


def first_of_task(offer: OfferView, siblings: Iterable[Sibling]) -> Sibling | None:
    """Return the offer of the same task id that counts instead of this one, None where this one counts."""
    # Creation times have a resolution of one second, so one that is admitted already counts as the older one.
    older = [
        s
        for s in siblings
        if s.uid != offer.uid and (s.reason == Reason.ADMITTED or (s.created, s.uid) < (offer.created, offer.uid))
    ]
    return min(older, key=lambda s: (s.created, s.uid), default=None)


def _rejection(evaluation: Evaluation) -> Answer:
    first = evaluation.refusals[0]
    more = len(evaluation.refusals) - 1
    constraints = [
        ExplanationItem(type="Constraint", name=r.reason.value, message=r.message[:400])
        for r in evaluation.refusals[:_TOLD_CONSTRAINTS]
    ]
    remedy = [_remedy(first.reason, first.counterfactual)] if first.counterfactual else []
    return Answer(
        verdict=Verdict.REJECT,
        reason=first.reason,
        message=first.message + (f" (and {more} more in status.explanation)" if more else ""),
        score=evaluation.score.total if evaluation.score else None,
        explanation=_explanation(evaluation, [*constraints, *remedy]),
    )


def _remedy(reason: Reason, counterfactual: str) -> ExplanationItem:
    return ExplanationItem(type="Counterfactual", name=reason.value, message=counterfactual[:400])


def _explanation(evaluation: Evaluation, rest: Sequence[ExplanationItem]) -> tuple[ExplanationItem, ...]:
    """Put the pieces together. When there are too many of them, estimates give way first."""
    terms = evaluation.score.terms if evaluation.score else ()
    room = max(0, _MOST_ITEMS - len(terms) - len(rest))
    return (*terms, *evaluation.estimates[:room], *rest)[:_MOST_ITEMS]


def _place(
    offer: OfferView,
    policy: PolicyView,
    evaluation: Evaluation,
    obstacle: Obstacle | None,
    room: Room,
    now: datetime,
) -> Answer:
    """Answer an offer that passed every filter: admit it where it fits, else say what is missing."""
    spec, ledger = policy.spec, room.ledger
    assert spec is not None  # noqa: S101
    assert offer.spec is not None  # noqa: S101
    if obstacle is not None:
        reason, full = obstacle.reason, room.rejects(policy, obstacle)
        constraint = ExplanationItem(type="Constraint", name=reason.value, message=obstacle.message[:400])
        items = _explanation(evaluation, [constraint, _remedy(reason, obstacle.counterfactual)])
        return Answer(
            Verdict.REJECT if full else Verdict.WAIT,
            Reason.CAPACITY_FULL if full else reason,
            f"{obstacle.message}; the policy rejects instead of queueing" if full else obstacle.message,
            evaluation.score.total if evaluation.score else None,
            items,
        )
    node = best_fit(room.nodes(policy.name), ledger, evaluation.gpus)
    assert node is not None  # noqa: S101
    ledger.book(offer.uid, node.name, evaluation.gpus, policy.name, evaluation.lane)
    resource = spec.resources[0].name
    lane = f" in lane {evaluation.lane}" if evaluation.lane else ""
    booked = node.allocatable - ledger.free(node)
    total = evaluation.score.total if evaluation.score else Decimal(0)
    return Answer(
        verdict=Verdict.ADMIT,
        reason=Reason.ADMITTED,
        message=(
            f"score {total}; {evaluation.gpus} x {resource} on {node.name}{lane}, "
            f"where {booked} of {node.allocatable} are booked now"
        ),
        score=total,
        explanation=_explanation(
            evaluation, [ExplanationItem(type="Constraint", name="SizeClass", value=evaluation.size_class)]
        ),
        admission=Admission(
            policy_ref=policy.ref,
            job_name=job_name(offer.key.name, offer.uid),
            decided_at=now,
            deadline=deadline_of(offer.spec, now),
            assignments=(
                Assignment(node_name=node.name, resource_name=resource, count=evaluation.gpus, lane=evaluation.lane),
            ),
        ),
    )


def deadline_of(spec: TaskOfferSpec | OfferTerms, start: datetime) -> datetime | None:
    """Return when the result is due if the clock starts now, or None while a Training clock has not started."""
    if spec.clock_mode is ClockMode.TRAINING:
        return spec.deadline
    due = start + timedelta(seconds=spec.time_limit_seconds)
    return min(due, spec.deadline) if spec.deadline is not None else due


def _moves(snapshot: Snapshot, room: Room) -> Iterable[Move]:
    """Find GPUs for attempts that must move. Their holder stays charged where its old pods still are."""
    ledger = room.ledger
    for request in snapshot.moves:
        policy = snapshot.policies.get(request.policy)
        if policy is None or policy.spec is None:
            continue
        allowed = [n for n in room.nodes(request.policy) if n.name not in request.avoid_nodes]
        kept = _kept_without_pods(snapshot, request.offer_uid)
        node = best_fit([n for n in allowed if n.name not in kept], ledger, request.count)
        if node is not None:
            ledger.booked[node.name] = ledger.booked.get(node.name, 0) + request.count
        else:
            # Nowhere else is room, so the job may use the place again that is still booked for it.
            own = [n for n in allowed if n.ready and ledger.free(n) + kept.get(n.name, 0) >= request.count]
            node = min(own, key=lambda n: n.name, default=None)
        if node is None:
            continue
        yield Move(
            request.key,
            request.offer_uid,
            (
                Assignment(
                    node_name=node.name,
                    resource_name=policy.spec.resources[0].name,
                    count=request.count,
                    lane=request.lane,
                ),
            ),
        )


def _kept_without_pods(snapshot: Snapshot, holder: str) -> dict[str, int]:
    """Return the GPUs by node that are booked for a holder although none of its Jobs or pods has them any more."""
    own = [c for c in snapshot.claims if c.holder == holder]
    in_use = {c.node for c in own if c.source in ("job", "pod")}
    return {c.node: c.count for c in own if c.node not in in_use}
