"""The clock, in one place."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def utcnow() -> datetime:
    """Return the wall clock's time in UTC. Decisions get it as an argument."""
    return datetime.now(UTC)


def monotonic() -> float:
    """Return seconds on a clock that never jumps, for leases and timeouts."""
    return time.monotonic()
