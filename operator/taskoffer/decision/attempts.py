"""Where a TrainingJob begins and ends: the first attempt follows from the admission, the offer's end from the job's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Condition
from taskoffer.api.v1alpha1.trainingjob import Attempt, AttemptOutcome, TrainingJobStatus
from taskoffer.decision.conditions import condition_of, is_true
from taskoffer.decision.job_facts import JobFacts, OfferEnd, Refusal
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.moments import later
from taskoffer.decision.naming import attempt_name
from taskoffer.decision.placed_jobs import MoveRequest

_PAUSE, _LONGEST_PAUSE = 5, 40
"""Seconds after the first refusal, doubled with each one, and the most of them."""


def first_attempt(facts: JobFacts) -> tuple[Attempt, ...]:
    """Return the attempt that the offer's admission stands for, or nothing where there is no such admission."""
    admission = facts.offer.admission if facts.offer else None
    if admission is None or admission.job_name != facts.job.metadata.name:
        return ()
    return (
        Attempt(
            job_name=attempt_name(facts.job.metadata.name, 1),
            assignments=admission.assignments,
            created_at=admission.decided_at,
            deadline=admission.deadline,
        ),
    )


def end_of_offer(facts: JobFacts) -> OfferEnd | None:
    """Return what a finished job means for its offer, or None where that has been said or there is no offer."""
    if facts.offer is None or facts.offer.finished:
        return None
    complete = condition_of(facts.job.status.conditions, "Complete")
    if complete is not None and complete.status == "True":
        return OfferEnd(Reason.SUCCEEDED, complete.message)
    failed = condition_of(facts.job.status.conditions, "Failed")
    message = failed.message if failed else ""
    cancelled = failed is not None and failed.reason == Reason.CANCELLED
    return OfferEnd(Reason.CANCELLED if cancelled else Reason.FAILED, message)


def says_refused(conditions: Sequence[Condition], number: int) -> bool:
    """Tell whether the status says already that the API server does not take this attempt's Job."""
    told = condition_of(conditions, "Running")
    return told is not None and told.reason == Reason.JOB_REFUSED and told.message.startswith(f"attempt {number}:")


def asked_again_at(refusal: Refusal) -> datetime:
    """Return when the API server is asked again: a quota may be raised, a webhook may come back."""
    return later(refusal.at, min(_LONGEST_PAUSE, _PAUSE * 2 ** min(refusal.times - 1, 10)))


def needs_devices(status: TrainingJobStatus, job_name: str) -> bool:
    """Tell whether the attempt of this name may still use the devices that were claimed for it."""
    if is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed"):
        return False
    last = status.attempts[-1] if status.attempts else None
    return last is None or (last.job_name == job_name and last.outcome is None)


def needs_no_place(status: TrainingJobStatus) -> bool:
    """Tell whether no attempt comes any more: the job is over, or hands its best adapter so far over."""
    over = is_true(status.conditions, "Complete") or is_true(status.conditions, "Failed")
    return over or status.early_end is not None


def need_of(last: Attempt) -> str:
    """Say what the attempt after this one waits for."""
    wanted = " + ".join(f"{a.count} x {a.resource_name}" for a in last.assignments)
    where = "one node" if last.outcome is AttemptOutcome.PREEMPTED else "another node"
    return f"the next attempt waits for {wanted} on {where}"


def move_request(facts: JobFacts, last: Attempt, avoid_nodes: frozenset[str]) -> MoveRequest:
    """Return what the cycle is asked for: a place of the same size for the attempt after this one."""
    first = last.assignments[0]
    return MoveRequest(
        key=OfferKey(facts.job.metadata.namespace or "", facts.job.metadata.name),
        offer_uid=facts.job.spec.offer_ref.uid,
        policy=facts.job.spec.run.policy_ref.name,
        count=first.count,
        lane=first.lane,
        avoid_nodes=avoid_nodes,
        last=first,
    )
