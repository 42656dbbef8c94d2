"""The answers to offers, with what the status says about them: refused, waiting, too late, admitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache

from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.devices import Device
from taskoffer.api.v1alpha1.taskoffer import Admission, ClockMode, ExplanationItem, TaskOfferSpec
from taskoffer.decision.devices import assignment
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.finish import duration_text
from taskoffer.decision.ledger import NodeView
from taskoffer.decision.naming import job_name
from taskoffer.decision.preemption import Choice
from taskoffer.decision.room import Obstacle
from taskoffer.decision.snapshot import OfferTerms, OfferView, PolicyView, Sibling, Snapshot
from taskoffer.decision.timeline import Opening
from taskoffer.decision.verdict import Answer, Verdict

_MOST_ITEMS = 16
"""Items that the schema allows in an explanation."""
_TOLD_CONSTRAINTS = 8


def expired(spec: TaskOfferSpec | OfferTerms, ends: datetime, now: datetime) -> Answer:
    """Answer an offer of which a moment has passed that it names itself."""
    names = {"expiresAt": spec.expires_at, "deadline": spec.deadline}
    name = next((name for name, moment in names.items() if moment == ends), None)
    if name is not None:
        return Answer(Verdict.REJECT, Reason.EXPIRED, f"not admitted before spec.{name} {rfc3339(ends)}")
    message = (
        f"the data cannot be fetched: its address stops to work at {rfc3339(ends)}, as spec.dataset.source.url says by "
        f"expiresAt or by its signature, and now it is {rfc3339(now.replace(microsecond=0))}"
    )
    remedy = _remedy(Reason.SOURCE_EXPIRES, "decided with a new address that works until the task has begun")
    return Answer(Verdict.REJECT, Reason.SOURCE_EXPIRES, message, explanation=(remedy,))


def too_late(spec: TaskOfferSpec | OfferTerms, evaluation: Evaluation, now: datetime) -> Answer:
    """Answer an offer whose task would end after its deadline if it started now."""
    assert spec.deadline is not None  # noqa: S101
    left = duration_text(max(0.0, (spec.deadline - now).total_seconds()))
    takes = duration_text(evaluation.least_seconds)
    message = (
        f"predicted to take {takes}, reserve included, and {left} are left until spec.deadline {rfc3339(spec.deadline)}"
    )
    constraint = ExplanationItem(type="Constraint", name=Reason.CANNOT_FINISH_IN_TIME.value, message=message)
    remedy = _remedy(Reason.CANNOT_FINISH_IN_TIME, f"accepted with a deadline more than {takes} away")
    total = evaluation.score.total if evaluation.score else None
    items = _explanation(evaluation, [constraint, remedy])
    return Answer(Verdict.REJECT, Reason.CANNOT_FINISH_IN_TIME, message, total, items)


def duplicate_of(offer: OfferView, spec: TaskOfferSpec | OfferTerms, snapshot: Snapshot) -> Answer | None:
    """Return the answer to an offer whose task id an older one has, or None."""
    siblings = snapshot.siblings.get((offer.key.namespace, spec.task_id))
    first = first_of_task(offer, siblings) if siblings else None
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


def rejection(evaluation: Evaluation) -> Answer:
    """Answer an offer that the policy refuses, with all causes."""
    first = evaluation.refusals[0]
    more = len(evaluation.refusals) - 1
    told = evaluation.refusals[:_TOLD_CONSTRAINTS]
    constraints = [_constraint(refusal.reason, refusal.message) for refusal in told]
    remedies = [_remedy(refusal.reason, refusal.counterfactual) for refusal in told if refusal.counterfactual]
    return Answer(
        verdict=Verdict.REJECT,
        reason=first.reason,
        message=first.message + (f" (and {more} more in status.explanation)" if more else ""),
        score=evaluation.score.total if evaluation.score else None,
        explanation=_explanation(evaluation, [*constraints, *remedies]),
    )


@lru_cache(maxsize=4096)
def _constraint(reason: Reason, message: str) -> ExplanationItem:
    """Return a constraint. Offers of a queue share most of theirs, and the values are immutable."""
    return ExplanationItem(type="Constraint", name=reason.value, message=message[:400])


@lru_cache(maxsize=4096)
def _remedy(reason: Reason, counterfactual: str) -> ExplanationItem:
    return ExplanationItem(type="Counterfactual", name=reason.value, message=counterfactual[:400])


def _explanation(evaluation: Evaluation, rest: Sequence[ExplanationItem]) -> tuple[ExplanationItem, ...]:
    """Put the pieces together. When there are too many of them, estimates give way first."""
    terms = evaluation.score.terms if evaluation.score else ()
    room = max(0, _MOST_ITEMS - len(terms) - len(rest))
    return (*terms, *evaluation.estimates[:room], *rest)[:_MOST_ITEMS]


def waits(evaluation: Evaluation, obstacle: Obstacle, *, rejects: bool) -> Answer:
    """Answer an offer that something stands in the way of; ``rejects`` where the policy does not queue."""
    reason = obstacle.reason
    constraint = _constraint(reason, obstacle.message)
    items = _explanation(evaluation, [constraint, _remedy(reason, obstacle.counterfactual)])
    return Answer(
        Verdict.REJECT if rejects else Verdict.WAIT,
        Reason.CAPACITY_FULL if rejects else reason,
        f"{obstacle.message}; the policy rejects instead of queueing" if rejects else obstacle.message,
        evaluation.score.total if evaluation.score else None,
        items,
    )


def ends_earlier(evaluation: Evaluation, gpus: int, opening: Opening, ends: datetime, otherwise: str) -> Answer:
    """Answer an offer that is predicted to end first when it waits for more GPUs."""
    message = (
        f"predicted to end at {rfc3339(ends)} on {gpus} GPU(s), which {opening.node} is predicted to have free at "
        f"{rfc3339(opening.at)}; {otherwise}"
    )
    reason = Reason.WAITING_FOR_EARLIER_END
    constraint = _constraint(reason, message)
    items = _explanation(evaluation, [constraint, _remedy(reason, f"admitted once {gpus} are free on one node")])
    total = evaluation.score.total if evaluation.score else None
    return Answer(Verdict.WAIT, reason, message, total, items)


def waits_for(evaluation: Evaluation, policy: PolicyView, choice: Choice) -> Answer:
    """Answer an offer for which running jobs are to stop."""
    assert policy.spec is not None  # noqa: S101
    shown = ", ".join(f"{running.name} ({running.gpus})" for running in choice.leaving[:_TOLD_CONSTRAINTS])
    more = f" and {len(choice.leaving) - _TOLD_CONSTRAINTS} more" if len(choice.leaving) > _TOLD_CONSTRAINTS else ""
    message = (
        f"needs {evaluation.gpus} x {policy.spec.resources[0].name}; {shown}{more} on {choice.node} save, stop and go "
        "on later, for which the policy's preemption is set"
    )
    reason = Reason.WAITING_FOR_PREEMPTION
    remedy = _remedy(reason, f"admitted once {choice.gpus} GPU(s) of them are free")
    total = evaluation.score.total if evaluation.score else None
    return Answer(
        Verdict.WAIT, reason, message, total, _explanation(evaluation, [_constraint(reason, message), remedy])
    )


def admitted(
    offer: OfferView,
    policy: PolicyView,
    evaluation: Evaluation,
    node: NodeView,
    booked: int,
    now: datetime,
    devices: tuple[Device, ...] | None = None,
) -> Answer:
    """Answer an offer that has just been booked on a node, of whose GPUs so many are booked now.

    With ``devices`` it has these very GPUs, else as many as the device plugin will choose.
    """
    assert policy.spec is not None  # noqa: S101
    assert offer.spec is not None  # noqa: S101
    pool = policy.spec.resources[0]
    resource = pool.name
    lane = f" in lane {evaluation.lane}" if evaluation.lane else ""
    total = evaluation.score.total if evaluation.score else Decimal(0)
    facts = [ExplanationItem(type="Constraint", name="SizeClass", value=evaluation.size_class)]
    if evaluation.refusals and evaluation.floor is not None:
        message = f"{evaluation.refusals[0].message}; admitted all the same, for fewer than {evaluation.floor[0]} "
        message += f"{offer.spec.task_type.value} offers were within 24 hours"
        facts.append(ExplanationItem(type="Constraint", name="ParticipationFloor", message=message[:400]))
    return Answer(
        verdict=Verdict.ADMIT,
        reason=Reason.ADMITTED,
        message=(
            f"score {total}; {evaluation.gpus} x {resource} on {node.name}{_names(devices)}{lane}, "
            f"where {booked} of {node.allocatable} are booked now"
        ),
        score=total,
        explanation=_explanation(evaluation, facts),
        admission=Admission(
            policy_ref=policy.ref,
            job_name=job_name(offer.key.name, offer.uid),
            decided_at=now,
            deadline=deadline_of(offer.spec, now),
            assignments=(assignment(pool, node.name, evaluation.gpus, evaluation.lane, devices),),
        ),
    )


def _names(devices: tuple[Device, ...] | None) -> str:
    return f" ({', '.join(device.name for device in devices)})" if devices else ""


def deadline_of(spec: TaskOfferSpec | OfferTerms, start: datetime) -> datetime | None:
    """Return when the result is due if the clock starts now, or None while a Training clock has not started."""
    if spec.clock_mode is ClockMode.TRAINING:
        return spec.deadline
    due = start + timedelta(seconds=spec.time_limit_seconds)
    return min(due, spec.deadline) if spec.deadline is not None else due
