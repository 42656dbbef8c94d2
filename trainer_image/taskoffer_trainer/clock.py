"""When an attempt has to be over, whichever way its clock runs, and how much earlier its result is to be ready."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from taskoffer.api.contract import Clamp, RunConfig

__all__ = ["STARTED", "Clock", "now", "process_started", "reserve_clamp", "reserve_seconds"]

STARTED = "TASKOFFER_STARTED"
"""Environment variable in which the launcher tells the ranks when the container was started (ISO 8601)."""
RESERVE_MINUTES = 3.0
"""Reserve before the deadline where the settings name none (what trainers in the task market keep, §5.1)."""
SLOW_REWARD_RESERVE_MINUTES = 12.0
"""The same where rewards are source text, whose time nobody can foretell (task market, §5.1)."""
RESERVE_SHARE = 0.1
"""Most of an attempt's time that is kept as a reserve, so that a task of five minutes still has four and a half."""
_LONGEST_START = 600.0
"""Seconds that the launcher can have taken to come here; a longer time is a kernel that tells no start times."""


def now() -> datetime:
    """Return the present moment in UTC."""
    return datetime.now(UTC)


def process_started() -> datetime:
    """Return when this program was started, which for a container's first process is when the container started.

    Field 22 of ``/proc/self/stat`` counts clock ticks since the machine was started (proc(5)).
    """
    text = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    # The second field is the program's name in brackets, which may hold blanks and brackets itself.
    ticks = int(text.rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now() - timedelta(seconds=age if 0 <= age <= _LONGEST_START else 0)


def _has_slow_rewards(config: RunConfig) -> bool:
    return config.data.grpo is not None and any(bool(one.source) for one in config.data.grpo.reward_functions)


def reserve_seconds(config: RunConfig, available: float) -> float:
    """Return how long before the deadline the result is to be ready.

    Args:
        config: the run; ``train.reserveMinutes`` is taken where it is given.
        available: seconds from the attempt's start to its deadline.
    """
    minutes = config.train.reserve_minutes
    if minutes is None:
        minutes = SLOW_REWARD_RESERVE_MINUTES if _has_slow_rewards(config) else RESERVE_MINUTES
    return min(60 * minutes, RESERVE_SHARE * max(0.0, available))


@dataclass(frozen=True)
class Clock:
    """An attempt's time.

    Attributes:
        started: when the container was started.
        deadline: when the result must be there, or ``None`` where there is no limit.
        reserve: seconds before it at which the result is to be ready.
    """

    started: datetime
    deadline: datetime | None = None
    reserve: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, started: datetime) -> Clock:
        """Return the clock of an attempt that began at a moment.

        A clock that runs from the admission is a deadline in the configuration. One that runs from the container's
        start is a time limit; the operator sets the deadline from the first container's start, so that further
        attempts find it in their configuration and the earlier end holds.
        """
        limit = config.time_limit_seconds
        ends = [config.deadline, started + timedelta(seconds=limit) if limit is not None else None]
        known = [end for end in ends if end is not None]
        if not known:
            return cls(started)
        deadline = min(known)
        return cls(started, deadline, reserve_seconds(config, (deadline - started).total_seconds()))

    def left(self) -> float | None:
        """Return the seconds until the deadline (negative after it), or ``None`` without one."""
        return None if self.deadline is None else (self.deadline - now()).total_seconds()

    def planned_left(self) -> float | None:
        """Return the seconds until the result is to be ready, or ``None`` without a deadline."""
        left = self.left()
        return None if left is None else left - self.reserve


def reserve_clamp(config: RunConfig, clock: Clock) -> tuple[Clamp, ...]:
    """Say that the reserve is shorter than the one that was asked for, where the time of an attempt is short."""
    asked = config.train.reserve_minutes
    if asked is None or clock.deadline is None or 60 * asked <= clock.reserve:
        return ()
    available = max(0.0, (clock.deadline - clock.started).total_seconds())
    message = (
        f"A reserve takes at most a tenth of the time of an attempt; this one has {available / 60:.3g} minutes from "
        "its start to its end."
    )
    effective = f"{clock.reserve / 60:.3g}"
    return (
        Clamp(
            field="train.reserveMinutes",
            requested=f"{asked:g}",
            effective=effective,
            reason="ReserveClamped",
            message=message,
        ),
    )
