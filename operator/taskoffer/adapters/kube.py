"""The API server, as far as taskoffer uses it: list, get, create, patch, delete, logs.

Credentials and connection come from the official client; requests carry plain dictionaries, because the objects are
parsed elsewhere. Errors say whether a write was definitely refused or may have been committed, since only a definite
refusal may forget a booking.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

Object = dict[str, Any]

MERGE = "application/merge-patch+json"
JSON = "application/json"

LIST_SECONDS = 60.0
"""A page of a list may take longer than a write; nothing waits for it but the next look at everything."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Where a kind lives in the API."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, sub: str | None = None) -> str:
        """Return the request path of the collection, of an object, or of its subresource."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        place = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        tail = "".join(f"/{part}" for part in (name, sub) if part)
        return f"{root}{place}/{self.plural}{tail}"


OFFERS = Resource("taskoffer.dev", "v1alpha1", "taskoffers")
JOBS_OF_TRAINING = Resource("taskoffer.dev", "v1alpha1", "trainingjobs")
POLICIES = Resource("taskoffer.dev", "v1alpha1", "capacitypolicies", namespaced=False)
BATCH_JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
NODES = Resource("", "v1", "nodes", namespaced=False)
CONFIG_MAPS = Resource("", "v1", "configmaps")
EVENTS = Resource("", "v1", "events")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
RESOURCE_SLICES = Resource("resource.k8s.io", "v1", "resourceslices", namespaced=False)
DEVICE_CLASSES = Resource("resource.k8s.io", "v1", "deviceclasses", namespaced=False)
RESOURCE_CLAIMS = Resource("resource.k8s.io", "v1", "resourceclaims")

WATCHED = {
    "Node": NODES,
    "Pod": PODS,
    "Job": BATCH_JOBS,
    "TrainingJob": JOBS_OF_TRAINING,
    "CapacityPolicy": POLICIES,
    "TaskOffer": OFFERS,
}
"""The kinds of which the cache holds every object that concerns us."""

WATCHED_DEVICES = {
    "ResourceSlice": RESOURCE_SLICES,
    "DeviceClass": DEVICE_CLASSES,
    "ResourceClaim": RESOURCE_CLAIMS,
}
"""Further ones, where the cluster serves them and the operator may read them."""


class ApiError(Exception):
    """The server refused a request for good (4xx): nothing was changed."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class NotFoundError(ApiError):
    """404: the object is not there."""


class ConflictError(ApiError):
    """409 on a write with a resourceVersion: the object has changed. On a create: the name is taken."""


class ThrottledError(Exception):
    """429: the server asks to come back later; nothing was changed."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the API server asks to come back in {retry_after:g} s")
        self.retry_after = retry_after


class UnknownOutcomeError(Exception):
    """No definite answer (timeout, broken connection, 5xx): a write may or may not have been committed."""


class Kube:
    """A connection to one API server. Close it when done."""

    def __init__(self, client: ApiClient, *, timeout: float = 4.0) -> None:
        self._client = client
        self._host = client.configuration.host
        self.timeout = timeout

    @classmethod
    async def connect(cls, kubeconfig: Path | None = None, *, timeout: float = 4.0) -> Kube:  # noqa: ASYNC109 - as for request
        """Connect with a kubeconfig, or inside a cluster with the pod's ServiceAccount when there is none."""
        configuration = Configuration()
        if kubeconfig is not None:
            await kube_config.load_kube_config(
                config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
            )
        else:
            kube_config.load_incluster_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = 100
        configuration.proxy = configuration.proxy or proxy_for(configuration.host)
        # Left to itself, the HTTP client would look for proxies and for a .netrc in a thread at every request.
        configuration.client_session_kwargs = {"trust_env": False, "cookie_jar": aiohttp.DummyCookieJar()}
        return cls(ApiClient(configuration=configuration), timeout=timeout)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = JSON,
        timeout: float | None = None,  # noqa: ASYNC109 - handed to the HTTP client, which enforces it
    ) -> bytes:
        """Send a request and return the answer's body.

        Raises:
            ApiError: on a definite refusal (4xx but 429); NotFoundError and ConflictError are kinds of it.
            ThrottledError: on 429.
            UnknownOutcomeError: on a timeout, a broken connection or 5xx.
        """
        headers = {"Content-Type": content_type, "Accept": JSON}
        auth = (await self._client.configuration.auth_settings()).get("BearerToken")
        if auth:
            headers["authorization"] = auth["value"]
        url = f"{self._host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            answer = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout or self.timeout
            )
            data: bytes = await answer.read()
        except (TimeoutError, aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            raise UnknownOutcomeError(f"{method} {path}: {type(error).__name__} {error}".strip()) from error
        if answer.status >= 400:
            _raise(answer.status, answer.headers.get("Retry-After"), data, f"{method} {path}")
        return data

    async def _object(self, method: str, path: str, body: Any = None, **options: Any) -> Object:
        made: Object = json.loads(await self.request(method, path, body, **options))
        return made

    async def list(
        self,
        resource: Resource,
        *,
        label_selector: str | None = None,
        on_page: Callable[[Sequence[Object]], None] | None = None,
    ) -> tuple[list[Object], str]:
        """Return all objects of a kind in all namespaces and the resourceVersion of the list.

        With ``on_page`` each page goes there as it comes, and none is kept: a whole list takes much memory.
        """
        items: list[Object] = []
        query = {"limit": "500"}
        if label_selector:
            query["labelSelector"] = label_selector
        while True:
            page = await self._object("GET", resource.path(), query=query, timeout=LIST_SECONDS)
            found = page.get("items") or []
            if on_page is None:
                items.extend(found)
            else:
                on_page(found)
            more = page["metadata"].get("continue")
            if not more:
                return items, page["metadata"]["resourceVersion"]
            query["continue"] = more

    async def probe(self, resource: Resource) -> None:
        """Ask for one object of a kind, whatever is there: the server answers only from a state that is up to date."""
        await self.request("GET", resource.path(), query={"limit": "1"})

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Read one object."""
        return await self._object("GET", resource.path(namespace, name))

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Create an object; ConflictError when the name is taken."""
        return await self._object("POST", resource.path(namespace), body)

    async def patch(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Merge a patch into an object; a resourceVersion in it makes the write conditional."""
        return await self._object("PATCH", resource.path(namespace, name), body, content_type=MERGE)

    async def patch_status(self, resource: Resource, namespace: str | None, name: str, body: Object) -> Object:
        """Merge a patch into an object's status; a resourceVersion in it makes the write conditional."""
        return await self._object("PATCH", resource.path(namespace, name, "status"), body, content_type=MERGE)

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, **options: Any
    ) -> Object:
        """Replace an object; the resourceVersion in it makes the write conditional."""
        return await self._object("PUT", resource.path(namespace, name), body, **options)

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """Delete an object in the background; with a UID only the very object that was meant."""
        body: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        await self.request("DELETE", resource.path(namespace, name), body)

    async def log_tail(self, namespace: str, pod: str, container: str, *, lines: int) -> str:
        """Return the last lines of a container's log."""
        query = {"container": container, "tailLines": str(lines), "limitBytes": "16384"}
        data = await self.request("GET", PODS.path(namespace, pod, "log"), query=query, timeout=5)
        return data.decode(errors="replace")


def proxy_for(host: str) -> str | None:
    """Return the proxy that the environment names for this server, or None; ``no_proxy`` lists hosts, not ranges."""
    address = urlsplit(host)
    if proxy_bypass(address.netloc):
        return None
    return getproxies().get(address.scheme)


def _raise(status: int, retry_after: str | None, data: bytes, what: str) -> None:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = {}
    if not isinstance(answer, dict):
        answer = {}
    reason = str(answer.get("reason") or status)
    message = str(answer.get("message") or data[:500].decode(errors="replace"))
    if status == 429:
        raise ThrottledError(float(retry_after) if retry_after and retry_after.isdigit() else 1.0)
    if status >= 500:
        raise UnknownOutcomeError(f"{what}: {status} {message}")
    kind = {404: NotFoundError, 409: ConflictError}.get(status, ApiError)
    raise kind(status, reason, message)
