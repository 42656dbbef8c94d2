"""The predicted timeline: when so many GPUs are free together, from when running jobs are predicted to end.

It knows nothing of offers that will come, nor of a lower one that is admitted in between, so that what it says is the
earliest start as things stand.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from taskoffer.decision.ledger import Ledger, NodeView, Release


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be free together: GPUs on one node, and room within the limits of the policy."""

    gpus: int
    policy: str
    lane: str | None = None
    lane_gpus: int = 0
    """GPUs of the lane."""
    namespace: str | None = None
    namespace_gpus: int = 0
    """GPUs that the namespace may hold."""
    slots: int | None = None
    """Jobs that the policy lets run at a time; None does not bind."""


@dataclass(frozen=True, slots=True)
class Opening:
    """When and where something can start."""

    at: datetime
    node: str
    left: int
    """GPUs that stay free on the node then."""
    after: str = ""
    """Whose end it waits for."""


@dataclass(slots=True)
class Timeline:
    """Bookings as they are now and as they are predicted to end, in order."""

    now: datetime
    ledger: Ledger
    releases: Sequence[Release]
    started: list[Release] = field(default_factory=list)
    """What the cycle has admitted so far."""
    _ordered: list[Release] | None = None
    """All of them in the order of their ends, once somebody has asked."""

    def start(self, release: Release) -> None:
        """Take in a booking that has been made just now."""
        self.started.append(release)
        if self._ordered is not None:
            insort(self._ordered, release, key=self._place_of)

    def opening(self, demand: Demand, nodes: Sequence[NodeView]) -> Opening | None:
        """Return when the demand can be met first, or None where no prediction says so."""
        ledger, fitting = self.ledger, {n.name: n for n in nodes if n.ready and n.allocatable >= demand.gpus}
        free = {name: ledger.free(node) for name, node in fitting.items()}
        lane = demand.lane_gpus - ledger.lane_used(demand.policy, demand.lane) if demand.lane is not None else None
        quota = (
            demand.namespace_gpus - ledger.held_by(demand.policy, demand.namespace)
            if demand.namespace is not None
            else None
        )
        slots = demand.slots - ledger.running(demand.policy) if demand.slots is not None else None
        if self._ordered is None:
            self._ordered = sorted((*self.releases, *self.started), key=self._place_of)
        moment, after, pending = self.now, "", iter(self._ordered)
        enough = {name for name, gpus in free.items() if gpus >= demand.gpus}
        while True:
            if (
                enough
                and (lane is None or lane >= demand.gpus)
                and (quota is None or quota >= demand.gpus)
                and (slots is None or slots > 0)
            ):
                best = min(enough, key=lambda n: (free[n], n))
                return Opening(moment, best, free[best] - demand.gpus, after)
            release = next(pending, None)
            if release is None:
                return None
            moment, after = end_expected(release, self.now), release.name
            if release.node in free:
                free[release.node] += release.count
                if free[release.node] >= demand.gpus:
                    enough.add(release.node)
            if release.policy == demand.policy:
                if lane is not None and release.lane == demand.lane:
                    lane += release.count
                if quota is not None and release.namespace == demand.namespace:
                    quota += release.count
                if slots is not None:
                    slots += 1

    def _place_of(self, release: Release) -> tuple[datetime, str, str]:
        return end_expected(release, self.now), release.holder, release.node


def end_expected(release: Release, now: datetime) -> datetime:
    """Return when a booking ends: as predicted, and once that is past, in as long again as it is overdue."""
    if release.ends > now:
        return release.ends
    return now + max(_SOON, now - release.ends)


_SOON = timedelta(minutes=1)
