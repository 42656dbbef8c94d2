"""What is free while a cycle decides, and what stands in the way of an offer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, FullMode
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.finish import duration_text
from taskoffer.decision.lack import Lack
from taskoffer.decision.ledger import NodeView, Release, best_fit, open_ledger
from taskoffer.decision.moments import later
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot, end_of
from taskoffer.decision.timeline import Demand, Opening, Timeline
from taskoffer.decision.want import Asked, Want

CAPACITY_REASONS = frozenset(
    {
        Reason.INVENTORY_NOT_READY.value,
        Reason.WAITING_FOR_JOB_SLOT.value,
        Reason.WAITING_FOR_LANE.value,
        Reason.WAITING_FOR_QUOTA.value,
        Reason.WAITING_FOR_CAPACITY.value,
        Reason.WAITING_BEHIND_RESERVATION.value,
    }
)
"""Reasons of a wait that capacity alone can end."""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What stands in the way of every offer of one kind at the moment."""

    reason: Reason
    message: str
    counterfactual: str
    unless_seconds: float = 0.0
    """An offer that holds its GPUs for no longer than this may still be placed."""


@dataclass(slots=True)
class Reservation:
    """A node that is kept for an offer that needs many of its GPUs at once."""

    offer: str
    uid: str
    node: str
    gpus: int
    starts: datetime
    """When they are predicted to be free together."""
    extra: int
    """GPUs of the node that the offer leaves free then."""

    def admits(self, gpus: int, ends: datetime) -> bool:
        """Tell whether so many of the node's GPUs can be lent until then without the offer starting later."""
        return gpus <= self.extra or ends <= self.starts


Kind = tuple[str, int, str | None, str | None]


@dataclass(slots=True)
class Room:
    """What is free while a cycle decides.

    Offers of the same policy, GPU count, lane and limited namespace are alike: capacity only shrinks during a cycle,
    so what stops one of them stops all that come after it. Only the first one of each kind pays for the search.
    """

    snapshot: Snapshot
    timeline: Timeline = field(init=False)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    """By node."""
    admitted_today: Counter[tuple[str, TaskType]] = field(init=False)
    lanes_wanted: set[tuple[str, str]] = field(default_factory=set)
    """Lanes whose own offers wait: nobody borrows there."""
    passed_over: int = 0
    """Standing offers whose answer still holds."""
    changes: int = 0
    """How often less has become free, or a node has been kept."""
    _nodes: dict[str, list[NodeView]] = field(init=False)
    _stopped: dict[Kind, Obstacle] = field(default_factory=dict)
    _free: dict[Kind, float] = field(default_factory=dict)
    """For how long offers may hold their GPUs whose kind nothing stops, as far as somebody has asked."""
    _openings: dict[Kind, Opening | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        snapshot = self.snapshot
        self.timeline = Timeline(snapshot.now, open_ledger(snapshot.claims), snapshot.releases)
        self.admitted_today = Counter(dict(snapshot.admitted_today))
        self._nodes = {
            name: [n for n in snapshot.nodes if policy.selects(n) and n.allocatable > 0]
            for name, policy in snapshot.policies.items()
            if policy.spec is not None
        }

    def nodes(self, policy: str) -> list[NodeView]:
        """Return the nodes that a policy selects and that offer anything."""
        return self._nodes.get(policy, [])

    def obstacle(self, policy: PolicyView, evaluation: Want) -> Obstacle | None:
        """Return what stops an offer of this kind, or None when it can be placed."""
        kind = _kind(policy, evaluation)
        found = self._stopped.get(kind)
        if found is not None and evaluation.occupies > found.unless_seconds:
            return found
        if policy.spec is None or evaluation.occupies <= self._free.get(kind, -1.0):
            return None
        found = self._search(policy, policy.spec, evaluation)
        if found is not None:
            self._stopped[kind] = found
        else:
            self._free[kind] = evaluation.occupies
        return found

    def same_for_all(self, policy: PolicyView, asked: Asked) -> bool:
        """Tell whether offers of this kind are all stopped or all free, however long they hold their GPUs.

        A node that is kept is lent to the shorter ones only.
        """
        if policy.spec is None or not self.reservations:
            return True
        longest = asked._replace(occupies=math.inf)
        free = self._search(policy, policy.spec, longest) is None
        return free or self._search(policy, policy.spec, longest._replace(occupies=0.0)) is not None

    def _search(self, policy: PolicyView, spec: CapacityPolicySpec, want: Want) -> Obstacle | None:
        return self._limit(policy.name, spec, want) or self._shortage(policy, spec, want)

    def still_stops(self, policy: PolicyView, evaluation: Evaluation, reason: str) -> Obstacle | None:
        """Return what stops offers of this kind that wait for this reason already, if they go on waiting for it."""
        obstacle = self.obstacle(policy, evaluation)
        if obstacle is None or obstacle.reason.value != reason or self.rejects(policy, obstacle):
            return None
        return obstacle

    def _less_is_free(self) -> None:
        """Forget what was found free, and when more will be."""
        self.changes += 1
        self._free.clear()
        self._openings.clear()

    @staticmethod
    def rejects(policy: PolicyView, obstacle: Obstacle) -> bool:
        """Tell whether the policy refuses what it has no capacity for. An empty inventory is always a wait."""
        full = policy.spec is not None and policy.spec.filters.on_full is FullMode.REJECT
        return full and obstacle.reason is not Reason.INVENTORY_NOT_READY

    def book(self, policy: PolicyView, offer: OfferView, evaluation: Evaluation) -> NodeView:
        """Book an offer that nothing stops, and return its node."""
        node = self.place(policy, evaluation, offer.uid, str(offer.key))
        if offer.spec is not None:
            self.admitted_today[policy.name, offer.spec.task_type] += 1
        return node

    def place(self, policy: PolicyView, want: Want, holder: str, name: str) -> NodeView:
        """Book what nothing stops for a holder, under the name that people know, and return the node."""
        assert policy.spec is not None  # noqa: S101
        ends = later(self.snapshot.now, want.occupies)
        nodes = [n for n in self.nodes(policy.name) if self.lends(n, want.gpus, ends)]
        pairs = policy.spec.placement.nvlink_pairs if policy.spec.placement is not None else None
        node = best_fit(nodes, self.timeline.ledger, want.gpus, pairs)
        assert node is not None  # noqa: S101
        kept = self.reservations.get(node.name)
        if kept is not None and ends > kept.starts:
            kept.extra -= want.gpus
        self.timeline.ledger.book(holder, node.name, want.gpus, policy.name, want.lane, want.quota)
        self.timeline.start(Release(holder, node.name, want.gpus, ends, policy.name, want.lane, want.quota, name))
        self._less_is_free()
        return node

    def lack(self, policy: PolicyView, node: NodeView, evaluation: Evaluation) -> Lack:
        """Return what is missing for an offer to start on a node."""
        spec, ledger, gpus = policy.spec, self.timeline.ledger, evaluation.gpus
        assert spec is not None  # noqa: S101
        lane = next((lane for lane in spec.lanes if lane.name == evaluation.lane), None)
        quota, slots = evaluation.quota, spec.filters.max_concurrent_jobs
        return Lack(
            node.name,
            evaluation.lane,
            quota,
            gpus - ledger.free(node),
            ledger.lane_used(policy.name, lane.name) + gpus - lane.gpus if lane is not None else 0,
            ledger.held_by(policy.name, quota) + gpus - _quota(spec, quota) if quota is not None else 0,
            ledger.running(policy.name) + 1 - slots if slots is not None else 0,
        )

    def hold(self, policy: str, holder: str, node: str, gpus: int, evaluation: Evaluation) -> None:
        """Keep free GPUs of a node for an offer that waits there for more."""
        self.timeline.ledger.book(holder, node, gpus, policy, evaluation.lane, evaluation.quota)
        self._less_is_free()

    def take(self, node: str, gpus: int) -> None:
        """Book GPUs that count for the node alone: those of a job that moves, or that has no policy any more."""
        booked = self.timeline.ledger.booked
        booked[node] = booked.get(node, 0) + gpus
        self._less_is_free()

    def lender(self, policy: PolicyView, evaluation: Evaluation) -> Evaluation | None:
        """Return the evaluation in the first lane that lends its GPUs to the offer's, or None."""
        for lane in evaluation.borrows_from:
            borrowed = evaluation.in_lane(lane)
            if (policy.name, lane) not in self.lanes_wanted and self.obstacle(policy, borrowed) is None:
                return borrowed
        return None

    def reserve(self, policy: PolicyView, offer: OfferView, evaluation: Evaluation) -> bool:
        """Keep a node for an offer that waits for capacity, unless it is gone before it could start there.

        Tell whether there was a node to keep for an offer of this size.
        """
        nodes = [
            n
            for n in self.nodes(policy.name)
            if n.ready and n.allocatable >= evaluation.gpus and n.name not in self.reservations
        ]
        if not nodes:
            return False
        found = self.timeline.opening(Demand(evaluation.gpus, policy.name), nodes)
        ends = end_of(offer, evaluation)
        if found is None:
            # Nothing says when so much is free together, so keeping others off would help nobody.
            return False
        if ends is None or found.at < ends:
            self.keep(offer, evaluation, found)
        return True

    def keep(self, offer: OfferView, evaluation: Evaluation, opening: Opening) -> None:
        """Keep a node for an offer that starts there once enough is free."""
        self.reservations[opening.node] = Reservation(
            str(offer.key), offer.uid, opening.node, evaluation.gpus, opening.at, opening.left
        )
        self._less_is_free()

    def lends_nothing(self, policy: PolicyView, evaluation: Evaluation) -> bool:
        """Tell whether no offer of this kind can borrow, however short it is."""
        for lane in evaluation.borrows_from:
            if (policy.name, lane) not in self.lanes_wanted:
                obstacle = self.obstacle(policy, evaluation.in_lane(lane))
                if obstacle is None or obstacle.unless_seconds > 0:
                    return False
        return True

    def no_room(self, policy: PolicyView, evaluation: Evaluation) -> Obstacle:
        """Return the obstacle of an offer whose counts all miss its deadline by now."""
        return Obstacle(
            Reason.WAITING_FOR_CAPACITY,
            f"none of the counts of GPUs that {policy.name} hands out is free in time",
            f"admitted once {evaluation.gpus} are free in time",
        )

    def opening(self, policy: PolicyView, evaluation: Want) -> Opening | None:
        """Return when an offer of this kind can start first on the predicted timeline, or None where nothing says."""
        kind = _kind(policy, evaluation)
        if kind not in self._openings:
            nodes = [n for n in self.nodes(policy.name) if n.name not in self.reservations]
            demand = demand_of(policy, evaluation)
            self._openings[kind] = self.timeline.opening(demand, nodes) if demand is not None else None
        return self._openings[kind]

    def lends(self, node: NodeView, gpus: int, ends: datetime) -> bool:
        """Tell whether no reservation keeps so many of a node's GPUs from a job that ends by then."""
        kept = self.reservations.get(node.name)
        return kept is None or kept.admits(gpus, ends)

    def _limit(self, policy_name: str, policy: CapacityPolicySpec, evaluation: Want) -> Obstacle | None:
        """Return the first limit of the policy that is reached, or None."""
        resource, gpus, ledger = policy.resources[0].name, evaluation.gpus, self.timeline.ledger
        if not any(n.ready for n in self.nodes(policy_name)):
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
            size = next((lane.gpus for lane in policy.lanes if lane.name == evaluation.lane), 0)
            used = ledger.lane_used(policy_name, evaluation.lane)
            if used + gpus > size:
                return Obstacle(
                    Reason.WAITING_FOR_LANE,
                    f"needs {gpus} x {resource} in lane {evaluation.lane}, where {used} of {size} are booked",
                    f"admitted once {used + gpus - size} more are free in lane {evaluation.lane}",
                )
        if evaluation.quota is not None:
            size = _quota(policy, evaluation.quota)
            used = ledger.held_by(policy_name, evaluation.quota)
            if used + gpus > size:
                return Obstacle(
                    Reason.WAITING_FOR_QUOTA,
                    f"needs {gpus} x {resource}, and namespace {evaluation.quota} holds {used} of its {size}",
                    f"admitted once its offers hold at most {size - gpus}",
                )
        return None

    def _shortage(self, policy: PolicyView, spec: CapacityPolicySpec, evaluation: Want) -> Obstacle | None:
        """Return what is missing on the nodes, or None."""
        resource, gpus, ledger = spec.resources[0].name, evaluation.gpus, self.timeline.ledger
        usable = [n for n in self.nodes(policy.name) if n.ready]
        large = [n for n in usable if n.allocatable >= gpus]
        if not large:
            largest = max(usable, key=lambda n: (n.allocatable, n.name))
            return Obstacle(
                Reason.WAITING_FOR_CAPACITY,
                f"needs {gpus} x {resource} on one node; the largest Ready node, {largest.name}, has "
                f"{largest.allocatable}",
                f"admitted once a node with {gpus} x {resource} is Ready",
            )
        fitting = [n for n in large if ledger.free(n) >= gpus]
        if not fitting:
            freest = max(large, key=lambda n: (ledger.free(n), n.name))
            free = max(0, ledger.free(freest))
            return Obstacle(
                Reason.WAITING_FOR_CAPACITY,
                f"needs {gpus} x {resource} on one node; {freest.name} has the most free, {free} of "
                f"{freest.allocatable}",
                f"admitted once {gpus - free} more are free on {freest.name}",
            )
        ends = later(self.snapshot.now, evaluation.occupies)
        if any(self.lends(n, gpus, ends) for n in fitting):
            return None
        return self._kept(resource, gpus, [self.reservations[n.name] for n in fitting])

    def _kept(self, resource: str, gpus: int, kept: Sequence[Reservation]) -> Obstacle:
        """Return the obstacle that all nodes with enough free GPUs are kept for other offers."""
        now, first = self.snapshot.now, min(kept, key=lambda r: r.node)
        window = max((r.starts - now).total_seconds() for r in kept)
        when = f" from about {rfc3339(first.starts)} on"
        return Obstacle(
            Reason.WAITING_BEHIND_RESERVATION,
            f"needs {gpus} x {resource}; {first.node} has them free and is kept for {first.offer}, which needs "
            f"{first.gpus}{when}",
            f"admitted once {first.offer} has started"
            + (f", or with a task of at most {duration_text(window)}" if window > 0 else ""),
            unless_seconds=max(0.0, window),
        )


def demand_of(policy: PolicyView, evaluation: Want) -> Demand | None:
    """Return what an offer of this kind needs to be free together, or None where the policy is not usable."""
    spec = policy.spec
    if spec is None:
        return None
    lane_gpus = next((lane.gpus for lane in spec.lanes if lane.name == evaluation.lane), 0)
    return Demand(
        gpus=evaluation.gpus,
        policy=policy.name,
        lane=evaluation.lane,
        lane_gpus=lane_gpus,
        namespace=evaluation.quota,
        namespace_gpus=_quota(spec, evaluation.quota) if evaluation.quota is not None else 0,
        slots=spec.filters.max_concurrent_jobs,
    )


def _quota(policy: CapacityPolicySpec, namespace: str) -> int:
    limit = next((n.gpus for n in policy.namespaces if n.name == namespace), None)
    return limit if limit is not None else 0


def _kind(policy: PolicyView, evaluation: Want) -> Kind:
    return policy.name, evaluation.gpus, evaluation.lane, evaluation.quota
