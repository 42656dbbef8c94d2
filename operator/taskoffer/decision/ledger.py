"""The ledger: who holds which GPUs on which node.

A holder is an offer, by its UID, or a foreign pod. One holder can show up in several ways at once: as an admission
that is being written, as an admission on the offer, as a Job, and as pods. These are views of one booking, so a node
is charged the maximum of them, not their sum. Pods of one holder on one node are different pods and add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from taskoffer.api.v1alpha1.devices import Device
from taskoffer.api.v1alpha1.queueing import NodeSelector
from taskoffer.decision.devices import NodeDevice, choose

Source = Literal["assumed", "admission", "job", "pod", "claim"]


@dataclass(frozen=True, slots=True)
class Claim:
    """GPUs on a node that one source says a holder has."""

    holder: str
    node: str
    count: int
    source: Source
    policy: str | None = None
    lane: str | None = None
    namespace: str | None = None
    devices: tuple[str, ...] = ()
    """Keys of the very GPUs, where they are known."""


@dataclass(frozen=True, slots=True)
class Release:
    """When a booking is predicted to end, so that its GPUs come free."""

    holder: str
    node: str
    count: int
    ends: datetime
    policy: str | None = None
    lane: str | None = None
    namespace: str | None = None
    name: str = ""
    """Who that is, for people."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as far as booking goes: what it offers and whether anything new may go there."""

    name: str
    allocatable: int
    ready: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[NodeDevice, ...] = ()
    """The very GPUs, where the policy pins them."""


@dataclass(slots=True)
class Ledger:
    """Booked GPUs by node, lane and namespace, and holders by policy. ``book`` adds to it while a cycle decides."""

    booked: dict[str, int]
    lanes: dict[tuple[str, str], int]
    holders: dict[str, set[str]]
    namespaces: dict[tuple[str, str], int] = field(default_factory=dict)
    """GPUs by policy and namespace."""
    devices: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    """Holders by node and key of a device."""

    def free(self, node: NodeView) -> int:
        """Return what may still be booked on a node; 0 on one that is not Ready, negative when it is overbooked."""
        return node.allocatable - self.booked.get(node.name, 0) if node.ready else 0

    def book(
        self, holder: str, node: str, count: int, policy: str, lane: str | None, namespace: str | None = None
    ) -> None:
        """Add a new booking of a holder that has none."""
        self.booked[node] = self.booked.get(node, 0) + count
        self.holders.setdefault(policy, set()).add(holder)
        if lane is not None:
            self.lanes[policy, lane] = self.lanes.get((policy, lane), 0) + count
        if namespace is not None:
            self.namespaces[policy, namespace] = self.namespaces.get((policy, namespace), 0) + count

    def pick(self, holder: str, node: NodeView, count: int, *, again: bool = False) -> tuple[Device, ...] | None:
        """Choose the very GPUs of a booking, and book them; None where the node does not tell its GPUs apart.

        A node never has fewer of them left than its count of free GPUs says: whoever has devices is charged for each.

        Args:
            holder: Who gets them.
            node: Where.
            count: How many, as many as are free there.
            again: Whether the holder may get those again that are booked for it there; then it gets them first.
        """
        if not node.devices:
            return None
        taken = self.devices.setdefault(node.name, {})
        others = {key for key, holders in taken.items() if holders - {holder} or not again}
        own = [one for one in node.devices if one.device.key in taken]
        found = choose(own, others, count) or choose(node.devices, others, count)
        assert found is not None  # noqa: S101
        for device in found:
            taken.setdefault(device.key, set()).add(holder)
        return found

    def shared_devices(self, node: str, keys: Iterable[str]) -> str | None:
        """Return one of these devices that several holders have, or None."""
        known = self.devices.get(node, {})
        return next((key for key in keys if len(known.get(key, ())) > 1), None)

    def lane_used(self, policy: str, lane: str) -> int:
        """Return the GPUs that are booked in a lane of a policy."""
        return self.lanes.get((policy, lane), 0)

    def running(self, policy: str) -> int:
        """Return how many holders a policy has."""
        return len(self.holders.get(policy, ()))

    def held_by(self, policy: str, namespace: str) -> int:
        """Return the GPUs that offers of a namespace hold under a policy."""
        return self.namespaces.get((policy, namespace), 0)


def open_ledger(claims: Iterable[Claim]) -> Ledger:
    """Sum up claims: per holder and node the maximum over the sources, per source the sum.

    Where devices are known, a holder is charged for each of them: a second attempt may have others than the first.
    """
    amounts: dict[tuple[str, str], dict[Source, int]] = defaultdict(dict)
    lane_of: dict[tuple[str, str], tuple[str, str]] = {}
    namespace_of: dict[tuple[str, str], tuple[str, str]] = {}
    holders: dict[str, set[str]] = defaultdict(set)
    devices: dict[str, dict[str, set[str]]] = {}
    known: dict[tuple[str, str], set[str]] = {}
    for claim in claims:
        place = (claim.holder, claim.node)
        if claim.devices:
            known.setdefault(place, set()).update(claim.devices)
            for key in claim.devices:
                devices.setdefault(claim.node, {}).setdefault(key, set()).add(claim.holder)
        by_source = amounts[place]
        by_source[claim.source] = by_source.get(claim.source, 0) + claim.count
        if claim.policy is not None:
            holders[claim.policy].add(claim.holder)
            if claim.namespace is not None and (place not in namespace_of or claim.source in ("assumed", "admission")):
                namespace_of[place] = (claim.policy, claim.namespace)
            # Labels hold shortened names, so what an admission says of the lane counts before what a pod says.
            if claim.lane is not None and (place not in lane_of or claim.source in ("assumed", "admission")):
                lane_of[place] = (claim.policy, claim.lane)
    booked: dict[str, int] = defaultdict(int)
    lanes: dict[tuple[str, str], int] = defaultdict(int)
    namespaces: dict[tuple[str, str], int] = defaultdict(int)
    for place, by_source in amounts.items():
        charge = max(*by_source.values(), len(known.get(place, ())))
        booked[place[1]] += charge
        if place in lane_of:
            lanes[lane_of[place]] += charge
        if place in namespace_of:
            namespaces[namespace_of[place]] += charge
    return Ledger(dict(booked), dict(lanes), dict(holders), dict(namespaces), devices)


_BLOCK, _PAIR = 4, 2
"""GPUs that the large tasks take, and that are joined where a node has its GPUs in pairs."""


def best_fit(
    nodes: Iterable[NodeView], ledger: Ledger, count: int, paired: NodeSelector | None = None
) -> NodeView | None:
    """Return the node that fits ``count`` GPUs and loses the fewest free blocks of four by it.

    Of several it is the one that keeps the least free, so that gaps stay whole; ties go by name. On nodes whose GPUs
    are joined in pairs, free pairs count next to the blocks.
    """

    def cost(node: NodeView) -> tuple[int, int, int, str]:
        free = ledger.free(node)
        blocks = free // _BLOCK - (free - count) // _BLOCK
        joined = paired is not None and paired.matches(node.labels)
        # A pair is lost when it is broken, or taken by a task that could have had it whole elsewhere.
        broken = free // _PAIR - (free - count) // _PAIR - count // _PAIR if joined else 0
        return blocks, broken, free, node.name

    return min((node for node in nodes if ledger.free(node) >= count), key=cost, default=None)
