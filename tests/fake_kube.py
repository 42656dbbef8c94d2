"""An API server in memory with the adapter's methods, and faults that a test injects.

It keeps what the operator relies on: rising resource versions, 409 on a stale one and on a name that is taken,
``status`` as a subresource, merge patches, UID preconditions, cascading deletion of what an owner owns (pods stay
until a test ends them, as they do in their grace period).
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from taskoffer.adapters.kube import (
    BATCH_JOBS,
    CONFIG_MAPS,
    DEVICE_CLASSES,
    EVENTS,
    JOBS_OF_TRAINING,
    LEASES,
    NODES,
    OFFERS,
    PODS,
    POLICIES,
    RESOURCE_CLAIMS,
    RESOURCE_SLICES,
    WATCHED_DEVICES,
    ApiError,
    ConflictError,
    NotFoundError,
    Object,
    Resource,
)
from virtual_time import Clock

KINDS = {
    OFFERS: "TaskOffer",
    JOBS_OF_TRAINING: "TrainingJob",
    POLICIES: "CapacityPolicy",
    BATCH_JOBS: "Job",
    PODS: "Pod",
    NODES: "Node",
    CONFIG_MAPS: "ConfigMap",
    EVENTS: "Event",
    LEASES: "Lease",
    RESOURCE_SLICES: "ResourceSlice",
    DEVICE_CLASSES: "DeviceClass",
    RESOURCE_CLAIMS: "ResourceClaim",
}
WITH_STATUS = {OFFERS, JOBS_OF_TRAINING, POLICIES}


@dataclass
class Fault:
    """What happens to the next matching request: it may be committed or not, be slow, and end in an error."""

    verb: str
    resource: Resource
    error: Exception | None
    name: str = ""
    committed: bool = False
    delay: float = 0.0
    times: int = 1
    before: Callable[[], object] | None = None
    """Runs when the request arrives, for example to change the object under it."""


@dataclass
class Request:
    """A request as it arrived."""

    at: float
    verb: str
    kind: str
    name: str
    body: Object | None = None


@dataclass
class FakeKube:
    """The server. ``observer`` is called with every change, like a watch, while ``watching``."""

    observer: Callable[[str, str, Object], None] | None = None
    watching: bool = True
    latency: float = 0.002
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    objects: dict[tuple[Resource, str, str], Object] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    version: int = 100
    timeout: float = 4.0
    refuses_devices: ApiError | None = field(default_factory=lambda: NotFoundError(404, "NotFound", "no such API"))
    """What it says to those who ask for devices; None serves them."""

    # What tests do

    def put(self, resource: Resource, made: Object, **metadata: Any) -> Object:
        """Store an object as if somebody had created it."""
        return self._create(resource, {**made, "metadata": {**made["metadata"], **metadata}}, with_status=True)

    def change(self, resource: Resource, name: str, patch: Object, namespace: str = "default") -> Object:
        """Change an object as if somebody had patched it, status and all."""
        place = self._place(resource, namespace, name)
        return self._store(resource, place, _merge(self.objects[place], patch), bump="spec" in patch)

    def remove(self, resource: Resource, name: str, namespace: str = "default") -> None:
        """Delete an object and what it owns."""
        self._remove(resource, self._place(resource, namespace, name))

    def get_now(self, resource: Resource, name: str, namespace: str = "default") -> Object:
        """Return an object as it is stored."""
        return copy.deepcopy(self.objects[self._place(resource, namespace, name)])

    def all(self, resource: Resource) -> list[Object]:
        """Return all objects of a kind."""
        return [copy.deepcopy(o) for (r, _, _), o in self.objects.items() if r == resource]

    def fail(self, verb: str, resource: Resource, error: Exception | None, **fields: Any) -> Fault:
        """Let the next request of this kind fail."""
        made = Fault(verb, resource, error, **fields)
        self.faults.append(made)
        return made

    def count(self, verb: str, resource: Resource, name: str = "") -> int:
        """Return how often a request was made."""
        return len(self.asked(verb, resource, name))

    def asked(self, verb: str, resource: Resource, name: str = "") -> list[Request]:
        """Return the requests of a kind."""
        return [r for r in self.requests if r.verb == verb and r.kind == KINDS[resource] and name in ("", r.name)]

    # The adapter's methods

    async def list(
        self,
        resource: Resource,
        *,
        label_selector: str | None = None,
        on_page: Callable[[Sequence[Object]], None] | None = None,
    ) -> tuple[list[Object], str]:
        found, version = await self._call("list", resource, "", None, lambda: (self.all(resource), str(self.version)))
        if on_page is None:
            return found, version
        for start in range(0, len(found), 2):
            on_page(found[start : start + 2])
        return [], version

    async def probe(self, resource: Resource) -> None:
        if resource in WATCHED_DEVICES.values() and self.refuses_devices is not None:
            raise self.refuses_devices

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        return await self._call("get", resource, name, None, lambda: self.get_now(resource, name, namespace or ""))

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        body = {**body, "metadata": {**body["metadata"], **({"namespace": namespace} if namespace else {})}}
        return await self._call(
            "create", resource, body["metadata"]["name"], body, lambda: self._create(resource, body)
        )

    async def patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        rest = {k: v for k, v in body.items() if k != "status" or resource not in WITH_STATUS}
        return await self._call("patch", resource, name, body, lambda: self._patch(resource, namespace, name, rest))

    async def patch_status(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        rest = {k: v for k, v in body.items() if k in ("metadata", "status")}
        return await self._call("status", resource, name, body, lambda: self._patch(resource, namespace, name, rest))

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, **options: Any
    ) -> Object:
        def work() -> Object:
            place = self._place(resource, namespace, name)
            self._check_version(place, body)
            return self._store(resource, place, copy.deepcopy(body))

        return await self._call("replace", resource, name, body, work)

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        def work() -> None:
            place = self._place(resource, namespace, name)
            if uid is not None and self._found(place)["metadata"]["uid"] != uid:
                raise ConflictError(409, "Conflict", "the UID in the precondition does not match")
            if self._found(place)["metadata"].get("finalizers"):
                asked = {"metadata": {"deletionTimestamp": Clock.utcnow().strftime("%Y-%m-%dT%H:%M:%SZ")}}
                self._store(resource, place, _merge(self._found(place), asked))
            else:
                self._remove(resource, place)

        await self._call("delete", resource, name, None, work)

    async def log_tail(self, namespace: str, pod: str, container: str, *, lines: int) -> str:
        return await self._call("log", PODS, pod, None, lambda: self.logs[pod])

    # The inside

    async def _call(
        self, verb: str, resource: Resource, name: str, body: Object | None, work: Callable[[], Any]
    ) -> Any:
        self.requests.append(Request(Clock.monotonic(), verb, KINDS[resource], name, copy.deepcopy(body)))
        await asyncio.sleep(self.latency)
        fault = self._next_fault(verb, resource, name) or Fault(verb, resource, None)
        if fault.before is not None:
            fault.before()
        try:
            made = work() if fault.committed or fault.error is None else None
        except KeyError:
            raise NotFoundError(404, "NotFound", f"{KINDS[resource]} {name} not found") from None
        await asyncio.sleep(fault.delay)
        if fault.error is not None:
            raise fault.error
        return made

    def _next_fault(self, verb: str, resource: Resource, name: str) -> Fault | None:
        for fault in self.faults:
            if (fault.verb, fault.resource) == (verb, resource) and fault.name in ("", name):
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    def _place(self, resource: Resource, namespace: str | None, name: str) -> tuple[Resource, str, str]:
        return (resource, (namespace or "") if resource.namespaced else "", name)

    def _found(self, place: tuple[Resource, str, str]) -> Object:
        return self.objects[place]

    def _check_version(self, place: tuple[Resource, str, str], body: Object) -> None:
        wanted = (body.get("metadata") or {}).get("resourceVersion")
        if wanted is not None and wanted != self._found(place)["metadata"]["resourceVersion"]:
            raise ConflictError(409, "Conflict", "the object has been modified")

    def _create(self, resource: Resource, body: Object, *, with_status: bool = False) -> Object:
        made = copy.deepcopy(body)
        metadata = made["metadata"]
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        place = self._place(resource, metadata.get("namespace"), metadata["name"])
        if place in self.objects:
            raise ConflictError(409, "AlreadyExists", f"{KINDS[resource]} {metadata['name']} already exists")
        metadata.setdefault("uid", f"{metadata['name']}-uid-{self.version}")
        metadata.setdefault("creationTimestamp", Clock.utcnow().strftime("%Y-%m-%dT%H:%M:%SZ"))
        metadata["generation"] = 1
        if resource in WITH_STATUS and not with_status:
            made.pop("status", None)
        return self._store(resource, place, made, event="ADDED")

    def _patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        place = self._place(resource, namespace, name)
        self._check_version(place, body)
        body = {k: v for k, v in body.items() if k != "metadata"}
        return self._store(resource, place, _merge(self._found(place), body), bump="spec" in body)

    def _store(
        self,
        resource: Resource,
        place: tuple[Resource, str, str],
        made: Object,
        *,
        event: str = "MODIFIED",
        bump: bool = False,
    ) -> Object:
        before = self.objects.get(place)
        if before is not None and before == made:
            return copy.deepcopy(before)
        self.version += 1
        made["metadata"]["resourceVersion"] = str(self.version)
        if bump:
            made["metadata"]["generation"] = made["metadata"].get("generation", 0) + 1
        self.objects[place] = made
        self._tell(resource, event, made)
        return copy.deepcopy(made)

    def _remove(self, resource: Resource, place: tuple[Resource, str, str]) -> None:
        gone = self.objects.pop(place)
        self.version += 1
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._tell(resource, "DELETED", gone)
        for other in list(self.objects):
            owners = self.objects.get(other, {}).get("metadata", {}).get("ownerReferences") or ()
            if other[0] != PODS and any(o["uid"] == gone["metadata"]["uid"] for o in owners):
                self._remove(other[0], other)

    def _tell(self, resource: Resource, event: str, raw: Object) -> None:
        devices = WATCHED_DEVICES.values() if self.refuses_devices is None else ()
        watched = (NODES, PODS, BATCH_JOBS, JOBS_OF_TRAINING, POLICIES, OFFERS, *devices)
        if self.observer is not None and self.watching and resource in watched:
            self.observer(KINDS[resource], event, copy.deepcopy(raw))


def refused(status: int = 422, reason: str = "Invalid") -> ApiError:
    """Return a definite refusal."""
    return ApiError(status, reason, "refused by a test")


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    made = copy.deepcopy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _merge(made.get(key), value)
    return made
