"""What is free while a cycle decides, and what stands in the way of an offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, FullMode
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.ledger import Ledger, NodeView, open_ledger
from taskoffer.decision.snapshot import PolicyView, Snapshot

CAPACITY_REASONS = frozenset(
    {
        Reason.INVENTORY_NOT_READY.value,
        Reason.WAITING_FOR_JOB_SLOT.value,
        Reason.WAITING_FOR_LANE.value,
        Reason.WAITING_FOR_CAPACITY.value,
    }
)
"""Reasons of a wait that capacity alone can end."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What stands in the way of every offer of one kind at the moment."""

    reason: Reason
    message: str
    counterfactual: str


class Room:
    """What is free while a cycle decides.

    Offers of the same policy, GPU count and lane are alike: capacity only shrinks during a cycle, so what stops one
    of them stops all that come after it. Only the first one of each kind pays for the search.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.ledger = open_ledger(snapshot.claims)
        self._nodes = {
            name: [n for n in snapshot.nodes if policy.selects(n) and n.allocatable > 0]
            for name, policy in snapshot.policies.items()
            if policy.spec is not None
        }
        self._stopped: dict[tuple[str, int, str | None], Obstacle] = {}
        self.passed_over = 0
        """Standing offers whose answer still holds."""

    def nodes(self, policy: str) -> list[NodeView]:
        """Return the nodes that a policy selects and that offer anything."""
        return self._nodes.get(policy, [])

    def obstacle(self, policy: PolicyView, evaluation: Evaluation) -> Obstacle | None:
        """Return what stops an offer of this kind, or None when it can be placed."""
        kind = (policy.name, evaluation.gpus, evaluation.lane)
        found = self._stopped.get(kind)
        if found is None and policy.spec is not None:
            found = _obstacle(policy.name, policy.spec, evaluation, self.ledger, self.nodes(policy.name))
            if found is not None:
                self._stopped[kind] = found
        return found

    def still_stops(self, policy: PolicyView, evaluation: Evaluation, reason: str) -> bool:
        """Tell whether offers of this kind, which wait for this reason already, go on waiting for it."""
        obstacle = self.obstacle(policy, evaluation)
        return obstacle is not None and obstacle.reason.value == reason and not self.rejects(policy, obstacle)

    @staticmethod
    def rejects(policy: PolicyView, obstacle: Obstacle) -> bool:
        """Tell whether the policy refuses what it has no capacity for. An empty inventory is always a wait."""
        full = policy.spec is not None and policy.spec.filters.on_full is FullMode.REJECT
        return full and obstacle.reason is not Reason.INVENTORY_NOT_READY


def _obstacle(
    policy_name: str,
    policy: CapacityPolicySpec,
    evaluation: Evaluation,
    ledger: Ledger,
    eligible: Sequence[NodeView],
) -> Obstacle | None:
    """Return the first thing that stands in the way of such an offer, or None."""
    resource, gpus = policy.resources[0].name, evaluation.gpus
    usable = [n for n in eligible if n.ready]
    if not usable:
        return Obstacle(
            Reason.INVENTORY_NOT_READY,
            f"no Ready and schedulable node that the policy selects offers {resource}",
            "admitted once such a node is Ready",
        )
    slots = policy.filters.max_concurrent_jobs
    if slots is not None and ledger.running(policy_name) >= slots:
        return Obstacle(
            Reason.WAITING_FOR_JOB_SLOT,
            f"{ledger.running(policy_name)} of {slots} concurrent jobs run",
            "admitted once one of them has ended",
        )
    if evaluation.lane is not None:
        size = next(lane.gpus for lane in policy.lanes if lane.name == evaluation.lane)
        used = ledger.lane_used(policy_name, evaluation.lane)
        if used + gpus > size:
            return Obstacle(
                Reason.WAITING_FOR_LANE,
                f"needs {gpus} x {resource} in lane {evaluation.lane}, where {used} of {size} are booked",
                f"admitted once {used + gpus - size} more are free in lane {evaluation.lane}",
            )
    large = [n for n in usable if n.allocatable >= gpus]
    if not large:
        largest = max(usable, key=lambda n: (n.allocatable, n.name))
        return Obstacle(
            Reason.WAITING_FOR_CAPACITY,
            f"needs {gpus} x {resource} on one node; the largest Ready node, {largest.name}, has {largest.allocatable}",
            f"admitted once a node with {gpus} x {resource} is Ready",
        )
    freest = max(large, key=lambda n: (ledger.free(n), n.name))
    if ledger.free(freest) < gpus:
        free = max(0, ledger.free(freest))
        return Obstacle(
            Reason.WAITING_FOR_CAPACITY,
            f"needs {gpus} x {resource} on one node; {freest.name} has the most free, {free} of {freest.allocatable}",
            f"admitted once {gpus - free} more are free on {freest.name}",
        )
    return None
