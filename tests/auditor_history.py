"""What the auditor saw: events in the order of the cluster's revision counter, and the world they add up to.

Every kind lives in one etcd, whose revision is the ``resourceVersion`` of all of them. Sorting the events of
several watches by it therefore gives the true order of things, however late a watch delivered. A DELETED
event carries the revision of the deletion.

The auditor shares no code with the operator on purpose: it reads objects as plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

Object = dict[str, Any]

OFFER, TRAINING_JOB, JOB, POD, NODE = "TaskOffer", "TrainingJob", "Job", "Pod", "Node"
UID_LABEL = "taskoffer.dev/offer-uid"
JOB_LABEL = "taskoffer.dev/job"
STEP_LABEL = "taskoffer.dev/step"
HOST_LABEL = "kubernetes.io/hostname"


@dataclass(frozen=True)
class Event:
    """One event of a watch.

    Attributes:
        kind: Kind of the object.
        type: ADDED, MODIFIED, DELETED, or LISTED for a state whose making was not watched.
        object: The object after the event, or as it was last for DELETED.
        at: When the event arrived, in seconds of a monotonic clock.
        revision: Place in the order of things: the object's resourceVersion, but 0 for what was there before the
            audit began, and the last revision that was watched for what a new list brought.
    """

    kind: str
    type: str
    object: Object
    at: float
    revision: int

    @property
    def uid(self) -> str:
        """UID of the object."""
        return str(self.object["metadata"]["uid"])


def offer_uid_of(kind: str, obj: Object) -> str | None:
    """Return the UID of the offer that an object belongs to; None for nodes and for what is foreign."""
    if kind == OFFER:
        return str(obj["metadata"]["uid"])
    if kind == TRAINING_JOB:
        return str(obj["spec"]["offerRef"]["uid"])
    label = labels(obj).get(UID_LABEL)
    return None if label is None else str(label)


def labels(obj: Object) -> dict[str, str]:
    """Return an object's labels."""
    return obj["metadata"].get("labels") or {}


def name_of(obj: Object) -> str:
    """Return ``namespace/name``, or the name alone where there is no namespace."""
    meta = obj["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else str(meta["name"])


def condition(obj: Object, kind: str) -> Object:
    """Return the condition of a type, empty when it is absent."""
    found: Iterable[Object] = obj.get("status", {}).get("conditions") or ()
    return next((entry for entry in found if entry["type"] == kind), {})


def is_true(obj: Object, kind: str) -> bool:
    """Tell whether a condition is True."""
    return condition(obj, kind).get("status") == "True"


def admission(offer: Object) -> Object | None:
    """Return ``status.admission``."""
    found: Object | None = offer.get("status", {}).get("admission")
    return found


def wants_to_run(offer: Object | None) -> bool:
    """Tell whether an offer lives, is active and has not finished."""
    return (
        offer is not None
        and "deletionTimestamp" not in offer["metadata"]
        and offer["spec"].get("active") is not False
        and not is_true(offer, "Finished")
    )


def job_is_over(job: Object) -> bool:
    """Tell whether a batch/v1 Job is complete or failed for good."""
    return is_true(job, "Complete") or is_true(job, "Failed")


def has_spent_its_pod(job: Object, pods: Iterable[Object]) -> bool:
    """Tell whether a Job that makes one pod only has had it; its own status says so a second or more later."""
    spec = job["spec"]
    if spec.get("completions") != 1 or spec.get("backoffLimit") != 0 or spec.get("podFailurePolicy"):
        return False
    uid = job["metadata"]["uid"]
    return any(
        pod_is_over(pod) and any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences") or ())
        for pod in pods
    )


def pod_is_over(pod: Object) -> bool:
    """Tell whether all containers of a pod have ended."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def gpus_of_pod_spec(spec: Object, resource: str) -> int:
    """Return the units that the scheduler books for a pod: its containers, or a larger init container."""

    def asked(container: Object) -> int:
        resources = container.get("resources", {})
        return int(resources.get("requests", {}).get(resource, resources.get("limits", {}).get(resource, 0)))

    inits = spec.get("initContainers") or ()
    sidecars = sum(asked(one) for one in inits if one.get("restartPolicy") == "Always")
    main = sum(asked(one) for one in spec["containers"]) + sidecars
    return max([main, *(asked(one) for one in inits)])


def gpus_of_job(job: Object, resource: str) -> int:
    """Return the units that all pods of a Job ask for together; a suspended Job makes none."""
    if job["spec"].get("suspend"):
        return 0
    parallelism = int(job["spec"].get("parallelism", 1))
    return gpus_of_pod_spec(job["spec"]["template"]["spec"], resource) * parallelism


def pinned_nodes(job: Object) -> set[str]:
    """Return the nodes that the pod template's required affinity names, by name or by host name label."""
    required = (
        job["spec"]["template"]["spec"]
        .get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    found: set[str] = set()
    for term in required.get("nodeSelectorTerms") or ():
        for key, part in (("metadata.name", "matchFields"), (HOST_LABEL, "matchExpressions")):
            for entry in term.get(part) or ():
                if entry["key"] == key and entry["operator"] == "In":
                    found |= set(entry["values"])
    return found


def allocatable(node: Object, resource: str) -> int:
    """Return what the node offers of a resource."""
    return int(Decimal(node.get("status", {}).get("allocatable", {}).get(resource, "0")))


@dataclass
class World:
    """The objects that exist at one revision, by kind and UID, as far as they were seen."""

    objects: dict[str, dict[str, Object]] = field(
        default_factory=lambda: {kind: {} for kind in (OFFER, TRAINING_JOB, JOB, POD, NODE)}
    )
    _by_offer: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def apply(self, event: Event) -> None:
        """Take an event in."""
        owner = offer_uid_of(event.kind, event.object)
        members = self._by_offer.setdefault((event.kind, owner), set()) if owner else set()
        if event.type == "DELETED":
            self.objects[event.kind].pop(event.uid, None)
            members.discard(event.uid)
        else:
            self.objects[event.kind][event.uid] = event.object
            members.add(event.uid)

    def of_offer(self, kind: str, offer_uid: str) -> list[Object]:
        """Return the objects of a kind that belong to an offer."""
        return [self.objects[kind][uid] for uid in self._by_offer.get((kind, offer_uid), ())]

    def node(self, name: str) -> Object | None:
        """Return a node by its name."""
        return next((n for n in self.objects[NODE].values() if n["metadata"]["name"] == name), None)


def in_order(events: Iterable[Event]) -> Iterator[Event]:
    """Yield events by revision, without the repetitions that a new list after a lost watch brings."""
    seen: set[tuple[str, str, int, bool]] = set()
    for event in sorted(events, key=lambda e: (e.revision, e.at)):
        version = int(event.object["metadata"].get("resourceVersion", event.revision))
        key = (event.kind, event.uid, version, event.type == "DELETED")
        if key not in seen:
            seen.add(key)
            yield event
