"""Moments a while after others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_LAST = datetime.max.replace(tzinfo=UTC)


def later(moment: datetime, seconds: int) -> datetime:
    """Return the moment so many seconds later, at most the last one that there is: stored values may be of any size."""
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:
        return _LAST
