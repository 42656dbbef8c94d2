"""A task as the search for the best schedule sees it: everything about it is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """A task with what only hindsight knows: how long it takes on each GPU count, and what it earns.

    Times are seconds since the trace's start. The task may start from ``arrival`` to ``last_start``, on any of the GPU
    counts in ``seconds_by_gpus``, and then takes so many seconds on them. It earns ``worth`` if it is done. A task
    without any GPU count can never earn.
    """

    name: str
    arrival: float
    last_start: float
    worth: float
    seconds_by_gpus: Mapping[int, float]
