"""What an audit says, how strictly it judges time, and what every rule of the auditor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from auditor_history import Event, World


@dataclass(frozen=True)
class Violation:
    """One broken rule: its letter, the object, and what happened with the numbers."""

    rule: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"({self.rule}) {self.subject}: {self.message}"


@dataclass(frozen=True)
class Limits:
    """How strictly time is judged.

    Attributes:
        resource: Extended resource that is counted.
        bound: Seconds within which a consequence must follow (rules d and e).
        lag: Seconds of news that nobody can know yet: a foreign pod bound, a node shrunk or an offer deleted
            less than this before is not held against the operator. What it did itself always is.
        excused: Intervals of the clock that do not count towards ``bound``, as when a test stopped the
            operator. They must not overlap.
    """

    resource: str = "nvidia.com/gpu"
    bound: float = 10.0
    lag: float = 2.0
    excused: Sequence[tuple[float, float]] = ()

    def elapsed(self, start: float, end: float) -> float:
        """Return the seconds from start to end without the excused ones."""
        spared = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self.excused)
        return end - start - spared


@dataclass
class Rule(ABC):
    """Looks at each event with the world before it and collects violations."""

    limits: Limits
    found: list[Violation] = field(default_factory=list)

    @abstractmethod
    def observe(self, event: Event, world: World) -> None:
        """Judge an event; ``world`` does not contain it yet."""

    def settle(self, event: Event, world: World) -> None:  # noqa: B027
        """Judge the world after an event; most rules need not."""

    def finish(self, now: float) -> None:  # noqa: B027
        """Judge what is still going on when the audit ends; most rules need not."""

    def report(self, letter: str, subject: str, message: str) -> None:
        """Note a violation."""
        self.found.append(Violation(letter, subject, message))
