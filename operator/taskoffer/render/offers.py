"""The status patch of a decision and the end of an offer."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Condition
from taskoffer.decision.conditions import is_true, set_condition
from taskoffer.decision.cycle import Decision
from taskoffer.decision.job_facts import OfferEnd
from taskoffer.decision.verdict import Verdict

Patch = dict[str, Any]


def decision_patch(decision: Decision, now: datetime) -> Patch:
    """Return the merge patch of ``status`` that answers an offer.

    It carries the resourceVersion that was decided on, so that the server refuses it with 409 once the offer was
    edited, deleted or created anew in between.
    """
    offer, answer = decision.offer, decision.answer
    conditions = set_condition(
        offer.conditions,
        "Admitted",
        answer.verdict is Verdict.ADMIT,
        answer.reason,
        answer.message,
        now=now,
        generation=offer.generation,
    )
    if answer.verdict is Verdict.ADMIT and is_true(conditions, "Evicted"):
        conditions = set_condition(
            conditions, "Evicted", False, answer.reason, answer.message, now=now, generation=offer.generation
        )
    if answer.verdict is Verdict.REJECT:
        conditions = set_condition(
            conditions,
            "Finished",
            True,
            Reason.REJECTED,
            answer.message,
            now=now,
            generation=offer.generation,
        )
    status: Patch = {
        "observedGeneration": offer.generation,
        "conditions": [c.to_wire() for c in conditions],
        "score": None if answer.score is None else str(answer.score),
        "explanation": [item.to_wire() for item in answer.explanation],
    }
    if answer.admission is not None:
        status["admission"] = answer.admission.to_wire()
    return {"metadata": {"resourceVersion": offer.resource_version, "uid": offer.uid}, "status": status}


def end_patch(
    end: OfferEnd,
    conditions: tuple[Condition, ...],
    *,
    uid: str,
    resource_version: str,
    generation: int,
    now: datetime,
) -> Patch:
    """Return the merge patch that marks an offer as finished; the admission stays as a record."""
    finished = set_condition(conditions, "Finished", True, end.reason, end.message, now=now, generation=generation)
    return {
        "metadata": {"resourceVersion": resource_version, "uid": uid},
        "status": {"conditions": [c.to_wire() for c in finished]},
    }


def revocation_patch(
    reason: Reason,
    message: str,
    conditions: tuple[Condition, ...],
    *,
    uid: str,
    resource_version: str,
    generation: int,
    now: datetime,
) -> Patch:
    """Return the merge patch that takes an admission back, for an offer whose TrainingJob does not exist."""
    changed = set_condition(conditions, "Admitted", False, reason, message, now=now, generation=generation)
    changed = set_condition(changed, "Evicted", True, reason, message, now=now, generation=generation)
    return {
        "metadata": {"resourceVersion": resource_version, "uid": uid},
        "status": {"conditions": [c.to_wire() for c in changed], "admission": None},
    }
