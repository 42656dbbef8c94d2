"""One accepted offer, from its admission to the end of its job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["in-time", "late", "failed"]
"""How a job ended: with a result in time, killed at its time limit, or with an error."""


@dataclass(frozen=True, slots=True)
class Run:
    """The GPUs that an accepted offer held, and what came of it. Times are seconds of the trace."""

    name: str
    start: float
    end: float
    gpus: int
    node: str
    outcome: Outcome
    worth: float
    """What it earned: nothing unless it ended in time."""
