"""Moments a while after others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def later(moment: datetime, seconds: float) -> datetime:
    """Return the moment so many seconds later, or earlier when negative.

    Stored values may be of any size, so it is at most the last moment that there is, and at least the first.
    """
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return _LAST if seconds > 0 else _FIRST
