"""What a schedule may do with an offer once everything about it is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """An offer that can be finished in time, as one sees it who knows the future. Times are seconds of the trace."""

    name: str
    arrival: float
    last_start: float
    """The offer is gone after this moment."""
    worth: float
    """What it earns when it is done in time."""
    seconds_by_gpus: Mapping[int, float]
    """How long it holds its GPUs, by their count; only counts with which it ends in time."""
    deadline: float = math.inf
    """A result after this moment earns nothing, however many GPUs it was made with."""

    def last_start_on(self, gpus: int) -> float:
        """Return the last moment at which it can start on so many GPUs: the slower it is there, the earlier."""
        return min(self.last_start, self.deadline - self.seconds_by_gpus[gpus])
