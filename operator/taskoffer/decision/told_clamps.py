"""What a job's status and its events say of settings that were not taken literally."""

from __future__ import annotations

from collections.abc import Iterator

from taskoffer.api.contract import Clamp, ProgressReport, Termination
from taskoffer.api.reasons import Reason
from taskoffer.decision.job_facts import Notice

_MOST = 64
"""The schema's bound on status.clamps."""
_LONGEST_EVENT = 1024
"""Characters that the API server takes in the message of an event."""


def clamps_of(
    before: tuple[Clamp, ...],
    decided: tuple[Clamp, ...],
    report: ProgressReport | None,
    termination: Termination | None = None,
) -> tuple[Clamp, ...]:
    """Return what was clamped: by the decision, and by the trainer once it has said so.

    Args:
        before: What the status has.
        decided: What the decision has clamped.
        report: What the running attempt's trainer says; all of its clamps at that moment.
        termination: What it has left at its end. That may lack some for want of room, but what it says of a setting
            is the last word on it.
    """
    told = (*decided, *report.clamps) if report is not None and report.clamps else before or decided
    if termination is not None and termination.clamps:
        settled = {clamp.field for clamp in termination.clamps}
        kept = tuple(clamp for clamp in told if clamp in decided or clamp.field not in settled)
        told = (*kept, *(clamp for clamp in termination.clamps if clamp not in kept))
    return told[:_MOST]


def notice_of(before: tuple[Clamp, ...], now: tuple[Clamp, ...]) -> Iterator[Notice]:
    """Yield the event that tells of clamps that the status did not have: one for all of them together."""
    new = [clamp for clamp in now if clamp not in before]
    if not new:
        return
    parts, told = [f"{one.field} {one.requested} → {one.effective} ({one.reason})" for one in new], ""
    for number, part in enumerate(parts):
        rest = f"; {len(parts) - number} more in status.clamps"
        longer = f"{told}; {part}" if told else part
        if len(longer) + len(rest) > _LONGEST_EVENT:
            told += rest
            break
        told = longer
    yield Notice(Reason.SETTINGS_CLAMPED, told[:_LONGEST_EVENT])
