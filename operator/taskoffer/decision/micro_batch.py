"""The next size of a running job's micro-batch, where a rule asks for a tenth less or a fifth more.

Sizes are whole rows, so that a share of one cannot be taken literally: a tenth less than 1 would be 0, and a fifth more
than 4 would be 4 for ever. The rule is that of the first strategy document ("batch -10 %", "batch +20 %") in the form
in which it always moves, never leaves its bounds and does not oscillate.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal

from taskoffer.api.contract import Clamp
from taskoffer.api.reasons import Reason
from taskoffer.decision.clamping import clamp_of

__all__ = ["Bounds", "Next", "fewer_rows", "more_rows"]

_FIELD = "tuning.microBatch"


@dataclass(frozen=True)
class Bounds:
    """Between what the rows that go through the model at once may vary.

    Attributes:
        unit: rows that stay together; sizes are multiples of it (the completions of a prompt under GRPO).
        most: the largest size that is predicted to fit, a multiple of the unit.
    """

    unit: int
    most: int


@dataclass(frozen=True)
class Next:
    """The size to ask for next, and what is said where the share could not be taken literally."""

    size: int
    clamp: Clamp | None = None


def fewer_rows(size: int, share: Decimal, bounds: Bounds) -> Next:
    """Return the size after a request for less: rounded down, one unit less at least, never less than one unit.

    Args:
        size: rows at once now.
        share: what is to be taken off, 0.1 for a tenth.
        bounds: between what it may vary.
    """
    exact = size * (1 - share)
    lower = max(bounds.unit, _whole(min(exact, Decimal(size - 1)), bounds.unit))
    if lower >= size:
        message = f"{size} at a time is the fewest that go through together; what helps now is a gentler fallback"
        return Next(size, _told(size, -share, size, Reason.BATCH_AT_MINIMUM, message))
    return _moved(size, -share, exact, lower, bounds)


def more_rows(size: int, share: Decimal, bounds: Bounds, since_fewer: timedelta | None, settle: timedelta) -> Next:
    """Return the size after a request for more: one unit more at least, and never more than fits.

    What has just been lowered stays, for memory that is free after a decrease is what the decrease was for; a rule on
    memory and one on efficiency would else take turns.

    Args:
        size: rows at once now.
        share: what is to be added, 0.2 for a fifth.
        bounds: between what it may vary.
        since_fewer: how long ago the size was lowered last; None when it never was.
        settle: for how long nothing is added after that.
    """
    if since_fewer is not None and since_fewer < settle:
        ago, rest = since_fewer.total_seconds(), settle.total_seconds()
        message = f"it was lowered {ago:.0f} s ago, and nothing is added within {rest:.0f} s of that"
        return Next(size, _told(size, share, size, Reason.BATCH_SETTLES, message))
    exact = size * (1 + share)
    higher = min(bounds.most, _whole(max(exact, Decimal(size + bounds.unit)), bounds.unit))
    if higher <= size:
        message = f"{bounds.most} at a time is the most that is predicted to fit"
        return Next(size, _told(size, share, size, Reason.BATCH_AT_MAXIMUM, message))
    return _moved(size, share, exact, higher, bounds)


def _moved(size: int, share: Decimal, exact: Decimal, size_next: int, bounds: Bounds) -> Next:
    if exact == size_next:
        return Next(size_next)
    groups = f" in groups of {bounds.unit}" if bounds.unit > 1 else ""
    limit = f" and at most {bounds.most}, which fit" if size_next == bounds.most else ""
    message = f"{size} {_percent(share)} is {exact.normalize():f}; rows are whole{groups}{limit}"
    return Next(size_next, _told(size, share, size_next, Reason.BATCH_CLAMPED, message))


def _told(size: int, share: Decimal, effective: int, reason: Reason, message: str) -> Clamp:
    return clamp_of(_FIELD, f"{size} {_percent(share)}", effective, reason, message)


def _percent(share: Decimal) -> str:
    return f"{'+' if share > 0 else '-'}{(abs(share) * 100).normalize():f} %"


def _whole(rows: Decimal, unit: int) -> int:
    return int((rows / unit).to_integral_value(ROUND_FLOOR)) * unit
