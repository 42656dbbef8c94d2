"""From raw ResourceSlices, DeviceClasses and ResourceClaims to the few facts that are kept of them.

Nothing here raises on a malformed object.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskoffer.api.v1alpha1.devices import device_key
from taskoffer.decision.inventory import Attribute, ClassRule, PublishedDevice, Slice, class_rule
from taskoffer.decision.keys import OfferKey
from taskoffer.reconcile.cache import Raw
from taskoffer.reconcile.shapes import count, mapping, mappings, text
from taskoffer.render.names import (
    DEVICES_ANNOTATION,
    JOB_LABEL,
    LANE_LABEL,
    NODE_ANNOTATION,
    OFFER_UID_LABEL,
    POLICY_LABEL,
)

_CLOSING_EFFECTS = ("NoSchedule", "NoExecute")


def slice_entry(raw: Raw) -> Slice:
    """Reduce a ResourceSlice."""
    spec = mapping(raw.get("spec"))
    pool, driver = mapping(spec.get("pool")), text(spec.get("driver")) or ""
    return Slice(
        driver=driver,
        pool=text(pool.get("name")) or "",
        generation=count(pool.get("generation")) or 0,
        slices=count(pool.get("resourceSliceCount")) or 0,
        node=text(spec.get("nodeName")),
        devices=tuple(_published(driver, device) for device in mappings(spec.get("devices"))),
    )


def _published(driver: str, raw: Raw) -> PublishedDevice:
    attributes: dict[str, Attribute] = {}
    for name, typed in mapping(raw.get("attributes")).items():
        value = next(iter(mapping(typed).values()), None)
        if isinstance(value, str | int | bool):
            attributes[name if "/" in name else f"{driver}/{name}"] = value
    return PublishedDevice(
        name=text(raw.get("name")) or "",
        attributes=attributes,
        closed=any(taint.get("effect") in _CLOSING_EFFECTS for taint in mappings(raw.get("taints"))),
        shared=bool(raw.get("allowMultipleAllocations") or raw.get("consumesCounters")),
    )


@dataclass(frozen=True, slots=True)
class DeviceClassEntry:
    """A DeviceClass: what it means, or why that is not known."""

    name: str
    rule: ClassRule | str


def device_class_entry(raw: Raw) -> DeviceClassEntry:
    """Reduce a DeviceClass."""
    selectors = mappings(mapping(raw.get("spec")).get("selectors"))
    expressions = [text(mapping(selector.get("cel")).get("expression")) or "" for selector in selectors]
    return DeviceClassEntry(raw["metadata"]["name"], class_rule(expressions))


@dataclass(frozen=True, slots=True)
class ResourceClaimEntry:
    """A ResourceClaim: the devices that it has, and those that it is to get where it is one of ours."""

    key: OfferKey
    uid: str
    owner_uid: str
    """UID of the TrainingJob that it belongs to; empty where it belongs to somebody else."""
    offer_uid: str
    training_job: str
    policy: str | None
    lane: str | None
    node: str | None
    """The node that was decided for one of ours."""
    pinned: tuple[str, ...]
    allocated: tuple[str, ...]
    pods: tuple[str, ...]
    """UIDs of the pods that it is reserved for."""
    deleting: bool

    @property
    def job_key(self) -> OfferKey | None:
        """Where its TrainingJob is, if it is one of ours."""
        return OfferKey(self.key.namespace, self.training_job) if self.owner_uid and self.training_job else None


def resource_claim_entry(raw: Raw) -> ResourceClaimEntry:
    """Reduce a ResourceClaim. Devices that are looked at only (``adminAccess``) are nobody's."""
    metadata, status = raw["metadata"], mapping(raw.get("status"))
    labels, notes = mapping(metadata.get("labels")), mapping(metadata.get("annotations"))
    owners = mappings(metadata.get("ownerReferences"))
    owner: Raw = next((o for o in owners if o.get("controller") and o.get("kind") == "TrainingJob"), {})
    ours = bool(owner) and bool(text(labels.get(OFFER_UID_LABEL)))
    results = mappings(mapping(mapping(status.get("allocation")).get("devices")).get("results"))
    reserved = (text(r.get("uid")) for r in mappings(status.get("reservedFor")) if r.get("resource") == "pods")
    return ResourceClaimEntry(
        key=OfferKey(metadata.get("namespace", ""), metadata["name"]),
        uid=metadata["uid"],
        owner_uid=str(owner.get("uid", "")) if ours else "",
        offer_uid=str(labels[OFFER_UID_LABEL]) if ours else "",
        training_job=text(labels.get(JOB_LABEL)) or "",
        policy=text(labels.get(POLICY_LABEL)) if ours else None,
        lane=text(labels.get(LANE_LABEL)) if ours else None,
        node=text(notes.get(NODE_ANNOTATION)) if ours else None,
        pinned=tuple(key for key in (text(notes.get(DEVICES_ANNOTATION)) or "").split(",") if key) if ours else (),
        allocated=tuple(
            device_key(str(r.get("driver")), str(r.get("pool")), str(r.get("device")))
            for r in results
            if not r.get("adminAccess")
        ),
        pods=tuple(uid for uid in reserved if uid),
        deleting="deletionTimestamp" in metadata,
    )
