"""One accepted offer, from its admission to the end of its job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["InTime", "Late", "Failed"]
"""How a job ended: with a result in time, killed at its time limit, or with an error."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some time on a node, without a break."""

    start: float
    end: float
    node: str


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
    stretches: tuple[Stretch, ...] = ()
    """When and where it held its GPUs, if it was stopped for others in between; empty stands for all of the time."""

    @property
    def parts(self) -> tuple[Stretch, ...]:
        """When and where it held its GPUs."""
        return self.stretches or (Stretch(self.start, self.end, self.node),)

    @property
    def seconds(self) -> float:
        """How long it held its GPUs."""
        return sum(part.end - part.start for part in self.parts)
