"""Conditions as values: find one, set one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import Condition, ConditionStatus

MAX_CONDITIONS = 16
"""The schema takes no more; conditions of other writers give way."""
_OWN = frozenset(
    {
        *("Admitted", "Evicted", "Finished"),
        *("Running", "Complete", "Failed"),
        *("Ready", "CapacityConsistent", "Linted"),
    }
)


def condition_of(conditions: Sequence[Condition], kind: str) -> Condition | None:
    """Return the condition of a type, or None."""
    for condition in conditions:
        if condition.type == kind:
            return condition
    return None


def is_true(conditions: Sequence[Condition], kind: str) -> bool:
    """Tell whether a condition is there and True."""
    found = condition_of(conditions, kind)
    return found is not None and found.status is ConditionStatus.TRUE


def set_condition(
    conditions: Sequence[Condition],
    kind: str,
    status: bool | None,
    reason: Reason,
    message: str,
    *,
    now: datetime,
    generation: int,
) -> tuple[Condition, ...]:
    """Return the conditions with one of them set, each type once; lastTransitionTime moves only with the status.

    Args:
        conditions: The conditions as they are.
        kind: Type of the condition.
        status: True, False, or None for Unknown.
        reason: The cause.
        message: The cause with numbers and remedy; cut at the schema's 2,048 characters.
        now: The moment of the change.
        generation: The metadata.generation that was looked at.
    """
    text = {True: ConditionStatus.TRUE, False: ConditionStatus.FALSE, None: ConditionStatus.UNKNOWN}[status]
    before = condition_of(conditions, kind)
    moved = before is None or before.status is not text
    made = Condition(
        type=kind,
        status=text,
        reason=reason.value,
        message=message[:2048],
        last_transition_time=now.replace(microsecond=0) if moved or before is None else before.last_transition_time,
        observed_generation=generation,
    )
    found = {c.type: c for c in reversed(conditions)}
    kept = {c.type: found[c.type] for c in conditions} | {kind: made}
    foreign = [other for other in kept if other not in _OWN]
    for other in foreign[: max(0, len(kept) - MAX_CONDITIONS)]:
        del kept[other]
    return tuple(kept.values())
