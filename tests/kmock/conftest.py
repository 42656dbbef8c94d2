"""kmock's emulator, taught what the operator relies on: versions, conflicts, status, lists with a version, 410."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

import kmock as mock
from kmock import KubernetesError, KubernetesObjectNotFoundError
from taskoffer.adapters.kube import Kube

Object = dict[str, Any]
Place = tuple[Any, str | None, str]

KINDS = {
    "v1/namespaces": ("Namespace", False),  # kopf does not watch before it knows this kind.
    "v1/nodes": ("Node", False),
    "v1/pods": ("Pod", True),
    "v1/configmaps": ("ConfigMap", True),
    "v1/events": ("Event", True),
    "batch/v1/jobs": ("Job", True),
    "coordination.k8s.io/v1/leases": ("Lease", True),
    "taskoffer.dev/v1alpha1/taskoffers": ("TaskOffer", True),
    "taskoffer.dev/v1alpha1/trainingjobs": ("TrainingJob", True),
    "taskoffer.dev/v1alpha1/capacitypolicies": ("CapacityPolicy", False),
}


class VersionedEmulator(mock.KubernetesEmulator):  # type: ignore[misc]
    """The emulator with resource versions. Reactions of a test (``kmock[...] << 503``) come before it, as ever."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.fallback["put", re.compile(r"/apis/.*")] << self._serve_replace
        self.version = 100
        self.stored: dict[Place, Object] = {}
        self.history: list[tuple[int, Any, str, Object]] = []
        self.oldest = 0
        self.generation_of_watches = 0
        self.changed = asyncio.Event()
        for name, (kind, namespaced) in KINDS.items():
            self.resources[name] = {
                "kind": kind,
                "namespaced": namespaced,
                "verbs": {"list", "watch", "get", "create", "patch", "update", "delete"},
            }

    async def _handle(self, request: Any) -> Any:
        # The parent stores what is sent before any check, so its parent serves the request instead.
        return await mock.RawHandler._handle(self, request)

    # What tests do

    def put(self, resource: str, made: Object, **metadata: Any) -> Object:
        """Store an object as if somebody had created it."""
        raw = copy.deepcopy({**made, "metadata": {**made["metadata"], **metadata}})
        return self._create(mock.resource(resource), raw["metadata"].get("namespace"), raw)

    def change(self, resource: str, namespace: str | None, name: str, patch: Object) -> Object:
        """Change an object as if somebody had patched it."""
        place = (mock.resource(resource), namespace, name)
        return self._store(place, _merge(self.stored[place], patch), "MODIFIED")

    def remove(self, resource: str, namespace: str | None, name: str) -> None:
        """Delete an object."""
        self._remove((mock.resource(resource), namespace, name))

    def read(self, resource: str, namespace: str | None, name: str) -> Object:
        """Return an object as it is stored."""
        return copy.deepcopy(self.stored[mock.resource(resource), namespace, name])

    def cut_watches(self) -> None:
        """End every watch, and answer 410 to whoever wants to go on from before."""
        self.oldest = self.version + 1
        self.version += 1
        self.generation_of_watches += 1
        self.changed.set()

    # The server

    async def _serve_list(self, request: Any) -> Any:
        wanted = dict(pair.split("=", 1) for pair in request.params.get("labelSelector", "").split(",") if pair)
        items = [
            copy.deepcopy(raw)
            for (resource, namespace, _), raw in self.stored.items()
            if resource == request.resource
            and request.namespace in (None, namespace)
            and wanted.items() <= (raw["metadata"].get("labels") or {}).items()
        ]
        return {"metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def _serve_watch(self, request: Any) -> AsyncIterator[Any]:
        since, mine = int(request.params.get("resourceVersion") or self.version), self.generation_of_watches
        yield b""
        if since < self.oldest:
            yield {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": "gone"}}
            return
        seen = 0
        while mine == self.generation_of_watches:
            changed = self.changed
            for version, resource, event, raw in self.history[seen:]:
                if resource == request.resource and version > since:
                    yield {"type": event, "object": raw}
            seen = len(self.history)
            await changed.wait()

    async def _serve_fetch(self, request: Any) -> Any:
        return copy.deepcopy(self._find(self._place(request)))

    async def _serve_create(self, request: Any) -> Any:
        raw = copy.deepcopy(request.data)
        if request.resource.plural in ("taskoffers", "trainingjobs", "capacitypolicies"):
            raw.pop("status", None)
        return self._create(request.resource, request.namespace, raw)

    async def _serve_update(self, request: Any) -> Any:
        place = self._place(request)
        self._check(place, request.data)
        parts = {k: v for k, v in request.data.items() if k != "metadata"}
        if request.subresource == "status":
            parts = {"status": parts["status"]}
        return self._store(place, _merge(self._find(place), parts), "MODIFIED")

    async def _serve_replace(self, request: Any) -> Any:
        place = self._place(request)
        self._check(place, request.data)
        return self._store(place, copy.deepcopy(request.data), "MODIFIED")

    async def _serve_delete(self, request: Any) -> Any:
        place = self._place(request)
        wanted = (request.data or {}).get("preconditions", {}).get("uid")
        if wanted not in (None, self._find(place)["metadata"]["uid"]):
            raise KubernetesError(409, "Conflict", "the UID in the precondition does not match")
        return self._remove(place)

    def _place(self, request: Any) -> Place:
        return (request.resource, request.namespace, request.name)

    def _find(self, place: Place) -> Object:
        if place not in self.stored:
            raise KubernetesObjectNotFoundError
        return self.stored[place]

    def _check(self, place: Place, body: Object) -> None:
        wanted = (body.get("metadata") or {}).get("resourceVersion")
        if wanted not in (None, self._find(place)["metadata"]["resourceVersion"]):
            raise KubernetesError(409, "Conflict", "the object has been modified")

    def _create(self, resource: Any, namespace: str | None, raw: Object) -> Object:
        metadata = raw["metadata"]
        place = (resource, namespace, metadata["name"])
        if place in self.stored:
            raise KubernetesError(409, "AlreadyExists", f"{metadata['name']} already exists")
        metadata.setdefault("uid", f"{metadata['name']}-uid")
        metadata.setdefault("creationTimestamp", "2026-01-31T12:00:00Z")
        metadata["generation"] = 1
        return self._store(place, raw, "ADDED")

    def _store(self, place: Place, raw: Object, event: str) -> Object:
        self.version += 1
        raw["metadata"]["resourceVersion"] = str(self.version)
        self.stored[place] = raw
        self._tell(place, event, raw)
        return copy.deepcopy(raw)

    def _remove(self, place: Place) -> Object:
        raw = self._find(place)
        del self.stored[place]
        self.version += 1
        raw["metadata"]["resourceVersion"] = str(self.version)
        self._tell(place, "DELETED", raw)
        return raw

    def _tell(self, place: Place, event: str, raw: Object) -> None:
        self.history.append((self.version, place[0], event, copy.deepcopy(raw)))
        self.changed.set()
        self.changed = asyncio.Event()


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


@pytest.fixture
def kmock_options() -> dict[str, Any]:
    """Serve every test of this rung with the versioned emulator."""
    return {"cls": VersionedEmulator}


@pytest.fixture
async def kube(kmock: VersionedEmulator) -> AsyncIterator[Kube]:
    """A connection to the emulator with a timeout of a few seconds."""
    configuration = Configuration()
    configuration.host = str(kmock.url).rstrip("/")
    made = Kube(ApiClient(configuration=configuration), timeout=3)
    yield made
    await made.close()


@pytest.fixture
def kubeconfig(kmock: VersionedEmulator, tmp_path: Path) -> Path:
    """A kubeconfig of the emulator."""
    path = tmp_path / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": str(kmock.url).rstrip("/")}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
