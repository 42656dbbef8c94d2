"""What perfect foresight would have earned on a trace, beside what policies earned on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.simulation.clairvoyant import best_schedule
from taskoffer.simulation.engine import Fleet
from taskoffer.simulation.run import Run
from taskoffer.simulation.task import Task
from taskoffer.simulation.trace import Trace
from taskoffer.simulation.truth import tasks_of

Progress = Callable[[float, float, float], None]
"""Called with the seconds so far, the worth that is found and the bound that is proven."""


@dataclass(frozen=True, slots=True)
class Hindsight:
    """The best schedule that was found for a trace, and what no schedule can exceed."""

    policy: str
    """Whose training settings it uses: how long a task takes depends on them."""
    runs: tuple[Run, ...]
    worth: float
    bound: float
    seconds: float

    def share(self, earned: float) -> float:
        """Return what somebody has earned as a share of the schedule."""
        return earned / self.worth if self.worth else 0.0


def in_hindsight(
    trace: Trace,
    policy: tuple[str, CapacityPolicySpec],
    fleet: Fleet,
    seconds: float,
    *,
    hint: Sequence[Run] = (),
    workers: int = 1,
    progress: Progress | None = None,
) -> Hindsight:
    """Search for the schedule that would have earned the most, knowing every offer, duration and failure beforehand.

    Args:
        trace: The offers.
        policy: Name and spec of the policy whose training settings are used; its rules are not.
        fleet: The nodes.
        seconds: How long to search.
        hint: What a policy made of the trace, for the search to begin with.
        workers: Threads of the solver.
        progress: Told from time to time how far the search is.

    Raises:
        MissingExtraError: without the extra ``simulate``.
    """
    name, spec = policy
    found = best_schedule(
        _bounded(tasks_of(trace, spec)),
        gpus=fleet.gpus,
        nodes=fleet.nodes,
        seconds=seconds,
        workers=workers,
        hint=hint,
        progress=progress,
    )
    return Hindsight(name, found.runs, found.worth, found.bound, found.seconds)


def _bounded(tasks: Sequence[Task]) -> list[Task]:
    """Give tasks that wait for ever a last start that costs no schedule anything.

    Once the last task has arrived nobody needs to wait longer than it takes to run all of them one after another.
    """
    latest = max((task.arrival for task in tasks), default=0.0) + sum(max(t.seconds_by_gpus.values()) for t in tasks)
    return [replace(task, last_start=min(task.last_start, latest)) for task in tasks]
