"""Devices of the cluster: what nodes offer of a DeviceClass, and what ResourceClaims have of that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

from taskoffer.adapters.kube import DEVICE_CLASSES
from taskoffer.api.v1alpha1.capacitypolicy import ResourcePool
from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.inventory import ClassRule, Inventory, Slice, inventory, nodes_of
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, NodeView
from taskoffer.reconcile.cache import Store
from taskoffer.reconcile.device_views import (
    DeviceClassEntry,
    ResourceClaimEntry,
    device_class_entry,
    resource_claim_entry,
    slice_entry,
)

_API = f"{DEVICE_CLASSES.group}/{DEVICE_CLASSES.version}"


class Access(Enum):
    """Whether the operator can know of devices; the value says why not."""

    WATCHED = ""
    NOT_SERVED = f"this cluster does not serve {_API}: remove deviceClassName, or upgrade to Kubernetes 1.34 or later"
    NOT_ALLOWED = f"the operator may not read {_API}: apply deploy/devices.yaml"


class Devices:
    """The stores of the three kinds, and what follows from them; computed again only when they have changed."""

    def __init__(self) -> None:
        self.access = Access.NOT_SERVED
        self.slices: Store[Slice] = Store("ResourceSlice", slice_entry)
        self.classes: Store[DeviceClassEntry] = Store("DeviceClass", device_class_entry)
        self.claims: Store[ResourceClaimEntry] = Store("ResourceClaim", resource_claim_entry)
        self.claims_of: dict[OfferKey, dict[str, ResourceClaimEntry]] = defaultdict(dict)
        """Our claims by TrainingJob and UID."""
        self._inventories: dict[str, Inventory | str] = {}
        self._charges: dict[str | None, tuple[Claim, ...]] = {}
        self.slices.on_change = self._forget_inventories
        self.classes.on_change = self._forget_inventories
        self.claims.on_change = self._index

    @property
    def stores(self) -> tuple[Store[Any], ...]:
        """The stores that are to be listed: none where nobody can read them."""
        return (self.slices, self.classes, self.claims) if self.access is Access.WATCHED else ()

    def tell(self, access: Access) -> None:
        """Take in whether devices can be known of."""
        self.access = access
        self._forget_inventories(None, None)

    def _forget_inventories(self, _before: object, _after: object) -> None:
        self._inventories.clear()
        self._charges.clear()

    def _index(self, before: ResourceClaimEntry | None, after: ResourceClaimEntry | None) -> None:
        self._charges.clear()
        if before is not None and before.job_key is not None:
            self.claims_of[before.job_key].pop(before.uid, None)
            if not self.claims_of[before.job_key]:
                del self.claims_of[before.job_key]
        if after is not None and after.job_key is not None:
            self.claims_of[after.job_key][after.uid] = after

    # What nodes offer

    def problem(self, pool: ResourcePool) -> str | None:
        """Say why the GPUs of a policy cannot be pinned, and what helps; None where they can."""
        name = pool.device_class_name
        if name is None:
            return None
        found = self._inventory(name)
        return f"resources[{pool.name}].deviceClassName {name}: {found}" if isinstance(found, str) else None

    def _inventory(self, name: str) -> Inventory | str:
        if name not in self._inventories:
            self._inventories[name] = self._made(name)
        return self._inventories[name]

    def _made(self, name: str) -> Inventory | str:
        if self.access is not Access.WATCHED:
            return str(self.access.value)
        rule: ClassRule | str | None = next((entry.rule for entry in self.classes if entry.name == name), None)
        if rule is None:
            known = ", ".join(sorted(entry.name for entry in self.classes)[:8]) or "none"
            return f"there is no such DeviceClass ({known}): install the DRA driver that brings it, or name another one"
        if isinstance(rule, str):
            return rule
        found = inventory(self.slices, rule)
        if found.unnamed and not found.offered:
            return f"none of its {found.unnamed} devices has a uuid or a pciBusID, by which a claim could name it"
        return found

    def _offered(self, name: str | None) -> Inventory:
        found = self._inventory(name) if name is not None else ""
        return found if isinstance(found, Inventory) else Inventory()

    def seen(self, node: NodeView, pool: ResourcePool | None) -> NodeView:
        """Return a node as a policy's resource sees it: with its devices, where the policy pins them."""
        name = pool.device_class_name if pool is not None else None
        if name is None:
            return node
        devices = self._offered(name).offered.get(node.name, ())
        return replace(node, allocatable=len(devices), devices=devices)

    def withdrawn(self, assignments: Iterable[Assignment]) -> bool:
        """Tell whether a device of an attempt is not offered any more: its driver lost it, or a taint closes it."""
        return any(
            key not in {one.device.key for one in self._offered(part.device_class_name).offered.get(part.node_name, ())}
            for part in assignments
            for key in part.device_keys
        )

    # What claims have

    def charges(self, pool: ResourcePool | None) -> Iterator[Claim]:
        """Yield what ResourceClaims have of the nodes' GPUs.

        One of ours has its devices as long as it exists, for its pod may come at any time. One of somebody else has
        what is allocated to it, as far as the policy could hand that out.
        """
        name = pool.device_class_name if pool is not None else None
        if name not in self._charges:
            self._charges[name] = tuple(self._counted(name))
        yield from self._charges[name]

    def _counted(self, name: str | None) -> Iterator[Claim]:
        nodes = nodes_of(self.slices)
        offered = {one.device.key for devices in self._offered(name).offered.values() for one in devices}
        for claim in self.claims:
            ours = bool(claim.owner_uid)
            at: dict[str, list[str]] = defaultdict(list)
            for key in dict.fromkeys((*claim.pinned, *claim.allocated)):
                node = nodes.get(key, claim.node)
                if node is not None and (ours or key in offered):
                    at[node].append(key)
            for node, keys in at.items():
                yield _claim(claim, node, tuple(keys))


def _claim(claim: ResourceClaimEntry, node: str, keys: tuple[str, ...]) -> Claim:
    if claim.owner_uid:
        holder, namespace = claim.offer_uid, claim.key.namespace
        return Claim(holder, node, len(keys), "claim", claim.policy, claim.lane, namespace, keys)
    # A pod can ask for a resource that is turned into a claim; then its request and the claim are the same GPUs.
    holder = f"pod:{claim.pods[0]}" if len(claim.pods) == 1 else f"claim:{claim.uid}"
    return Claim(holder, node, len(keys), "claim", devices=keys)
