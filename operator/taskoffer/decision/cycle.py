"""The admission cycle: one pure function from a snapshot to a plan for all pending offers.

Order of decisions: attempts of admitted jobs that must move come first, then offers by score, then age, then UID.
An offer that does not fit now does not hold up the ones behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, FullMode
from taskoffer.api.v1alpha1.meta import Assignment, PolicyRef
from taskoffer.api.v1alpha1.taskoffer import Admission, ClockMode, ExplanationItem, TaskOfferSpec
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.ledger import Ledger, NodeView, best_fit, open_ledger
from taskoffer.decision.naming import job_name
from taskoffer.decision.snapshot import OfferKey, OfferView, PolicyView, Snapshot
from taskoffer.decision.verdict import Answer, Verdict


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
    ledger = open_ledger(snapshot.claims)
    by_policy = {
        name: [n for n in snapshot.nodes if policy.selects(n) and n.allocatable > 0]
        for name, policy in snapshot.policies.items()
        if policy.spec is not None
    }
    moves = tuple(_moves(snapshot, ledger, by_policy))
    decisions: list[Decision] = []
    wake_at: datetime | None = None
    waiting = 0
    for offer, policy, answer_or_evaluation in _in_order(snapshot):
        if isinstance(answer_or_evaluation, Answer):
            answer = answer_or_evaluation
        else:
            assert policy is not None  # noqa: S101
            answer = _place(offer, policy, answer_or_evaluation, ledger, by_policy[policy.name], snapshot.now)
        if answer.verdict is Verdict.WAIT:
            waiting += 1
            ends = _ends(offer.spec) if offer.spec else None
            wake_at = min((t for t in (wake_at, ends) if t is not None), default=None)
        if _changed(offer, answer):
            decisions.append(Decision(offer, answer, policy.ref if policy else None))
    return Plan(tuple(decisions), moves, wake_at, waiting)


def _ends(spec: TaskOfferSpec) -> datetime | None:
    """Return the moment after which a waiting offer is refused as expired."""
    return min((t for t in (spec.expires_at, spec.deadline) if t is not None), default=None)


def _changed(offer: OfferView, answer: Answer) -> bool:
    """Tell whether the offer's status does not yet give this verdict and reason for this generation."""
    admitted = condition_of(offer.conditions, "Admitted")
    return (
        admitted is None
        or admitted.reason != answer.reason.value
        or answer.verdict is not Verdict.WAIT
        or offer.observed_generation != offer.generation
    )


def _in_order(snapshot: Snapshot) -> Iterable[tuple[OfferView, PolicyView | None, Answer | Evaluation]]:
    """Yield offers with answers that need no capacity first, then the others by score, age and UID."""
    ranked: list[tuple[Decimal, datetime, str, OfferView, PolicyView, Evaluation]] = []
    for offer in snapshot.offers:
        policy, early = _without_capacity(offer, snapshot)
        if early is not None:
            yield offer, policy, early
            continue
        assert policy is not None  # noqa: S101
        evaluation = snapshot.evaluations[offer.uid, policy.name]
        score = evaluation.score.total if evaluation.score else Decimal(0)
        ranked.append((-score, offer.created, offer.uid, offer, policy, evaluation))
    ranked.sort(key=lambda item: item[:3])
    for *_, offer, policy, evaluation in ranked:
        yield offer, policy, evaluation


def _without_capacity(offer: OfferView, snapshot: Snapshot) -> tuple[PolicyView | None, Answer | None]:
    """Return the policy of an offer, and its answer where capacity does not matter."""
    spec = offer.spec
    if spec is None:
        return None, Answer(Verdict.REJECT, Reason.INVALID_OFFER, f"the stored offer is not valid: {offer.invalid}")
    ends = _ends(spec)
    if ends is not None and snapshot.now >= ends:
        field = "expiresAt" if spec.expires_at == ends else "deadline"
        return None, Answer(Verdict.REJECT, Reason.EXPIRED, f"not admitted before spec.{field} {rfc3339(ends)}")
    duplicate = _older_sibling(offer, spec, snapshot)
    if duplicate is not None:
        return None, duplicate
    policy, reason, message = snapshot.policy_for(spec)
    if policy is None:
        return None, Answer(Verdict.WAIT, reason or Reason.POLICY_NOT_FOUND, message)
    evaluation = snapshot.evaluations[offer.uid, policy.name]
    if evaluation.refusals:
        return policy, _rejection(evaluation)
    if not spec.is_active:
        return policy, Answer(
            Verdict.WAIT,
            Reason.SUSPENDED,
            "spec.active is false: set it to true to have the offer decided",
            evaluation.score.total if evaluation.score else None,
        )
    return policy, None


def _older_sibling(offer: OfferView, spec: TaskOfferSpec, snapshot: Snapshot) -> Answer | None:
    siblings = snapshot.siblings.get((offer.key.namespace, spec.task_id), ())
    older = [s for s in siblings if (s.created, s.uid) < (offer.created, offer.uid)]
    if not older:
        return None
    first = min(older, key=lambda s: (s.created, s.uid))
    return Answer(
        Verdict.REJECT,
        Reason.DUPLICATE_TASK,
        f"TaskOffer {first.name} has the same taskID {spec.task_id} and is older; its answer ({first.reason}) counts",
    )


def _rejection(evaluation: Evaluation) -> Answer:
    first = evaluation.refusals[0]
    more = len(evaluation.refusals) - 1
    items: list[ExplanationItem] = list(evaluation.score.terms) if evaluation.score else []
    items += [
        ExplanationItem(type="Constraint", name=r.reason.value, message=r.message[:400])
        for r in evaluation.refusals[:8]
    ]
    if first.counterfactual:
        items.append(
            ExplanationItem(type="Counterfactual", name=first.reason.value, message=first.counterfactual[:400])
        )
    return Answer(
        verdict=Verdict.REJECT,
        reason=first.reason,
        message=first.message + (f" (and {more} more in status.explanation)" if more else ""),
        score=evaluation.score.total if evaluation.score else None,
        explanation=tuple(items[:16]),
    )


def _place(
    offer: OfferView,
    policy: PolicyView,
    evaluation: Evaluation,
    ledger: Ledger,
    eligible: Sequence[NodeView],
    now: datetime,
) -> Answer:
    """Answer an offer that passed every filter: admit it where it fits, else say what is missing."""
    spec, terms = policy.spec, evaluation.score.terms if evaluation.score else ()
    assert spec is not None  # noqa: S101
    assert offer.spec is not None  # noqa: S101
    obstacle = _obstacle(policy.name, spec, evaluation, ledger, eligible)
    if obstacle is not None:
        reason, message, counterfactual = obstacle
        full = spec.filters.on_full is FullMode.REJECT and reason is not Reason.INVENTORY_NOT_READY
        items = [
            *terms,
            ExplanationItem(type="Constraint", name=reason.value, message=message[:400]),
            ExplanationItem(type="Counterfactual", name=reason.value, message=counterfactual[:400]),
        ]
        return Answer(
            Verdict.REJECT if full else Verdict.WAIT,
            Reason.CAPACITY_FULL if full else reason,
            f"{message}; the policy rejects instead of queueing" if full else message,
            evaluation.score.total if evaluation.score else None,
            tuple(items),
        )
    node = best_fit(eligible, ledger, evaluation.gpus)
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
        explanation=(
            *terms,
            ExplanationItem(type="Constraint", name="SizeClass", value=evaluation.size_class),
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


def deadline_of(spec: TaskOfferSpec, start: datetime) -> datetime | None:
    """Return when the result is due if the clock starts now, or None while a Training clock has not started."""
    if spec.clock_mode is ClockMode.TRAINING:
        return spec.deadline
    due = start + timedelta(seconds=spec.time_limit_seconds)
    return min(due, spec.deadline) if spec.deadline is not None else due


def _obstacle(
    policy_name: str,
    policy: CapacityPolicySpec,
    evaluation: Evaluation,
    ledger: Ledger,
    eligible: Sequence[NodeView],
) -> tuple[Reason, str, str] | None:
    """Return reason, message and counterfactual of the first thing that stands in the way, or None."""
    resource, gpus = policy.resources[0].name, evaluation.gpus
    usable = [n for n in eligible if n.ready]
    if not usable:
        return (
            Reason.INVENTORY_NOT_READY,
            f"no Ready and schedulable node that the policy selects offers {resource}",
            "admitted once such a node is Ready",
        )
    slots = policy.filters.max_concurrent_jobs
    if slots is not None and ledger.running(policy_name) >= slots:
        return (
            Reason.WAITING_FOR_JOB_SLOT,
            f"{ledger.running(policy_name)} of {slots} concurrent jobs run",
            "admitted once one of them has ended",
        )
    if evaluation.lane is not None:
        size = next(lane.gpus for lane in policy.lanes if lane.name == evaluation.lane)
        used = ledger.lane_used(policy_name, evaluation.lane)
        if used + gpus > size:
            return (
                Reason.WAITING_FOR_LANE,
                f"needs {gpus} x {resource} in lane {evaluation.lane}, where {used} of {size} are booked",
                f"admitted once {used + gpus - size} more are free in lane {evaluation.lane}",
            )
    large = [n for n in usable if n.allocatable >= gpus]
    if not large:
        largest = max(usable, key=lambda n: (n.allocatable, n.name))
        return (
            Reason.WAITING_FOR_CAPACITY,
            f"needs {gpus} x {resource} on one node; the largest Ready node, {largest.name}, has {largest.allocatable}",
            f"admitted once a node with {gpus} x {resource} is Ready",
        )
    freest = max(large, key=lambda n: (ledger.free(n), n.name))
    if ledger.free(freest) < gpus:
        free = max(0, ledger.free(freest))
        return (
            Reason.WAITING_FOR_CAPACITY,
            f"needs {gpus} x {resource} on one node; {freest.name} has the most free, {free} of {freest.allocatable}",
            f"admitted once {gpus - free} more are free on {freest.name}",
        )
    return None


def _moves(snapshot: Snapshot, ledger: Ledger, by_policy: dict[str, list[NodeView]]) -> Iterable[Move]:
    """Find GPUs for attempts that must move. Their holder stays charged where its old pods still are."""
    for request in snapshot.moves:
        policy, eligible = snapshot.policies.get(request.policy), by_policy.get(request.policy)
        if policy is None or policy.spec is None or eligible is None:
            continue
        allowed = [n for n in eligible if n.name not in request.avoid_nodes]
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
