"""A plain HTTP client on the configmaps of one namespace, through the fault proxy and past it."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from fault_proxy import FaultProxy
from fault_requests import Object
from taskoffer_lab.api_client import ApiClient
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

SECONDS = 20.0
BROKEN = (ConnectionError, http.client.HTTPException)
"""What a client sees when its connection ends without an answer, however it ends."""


@dataclass
class Reply:
    """What a client was answered."""

    status: int
    headers: http.client.HTTPMessage
    content: Any


class Client:
    """Works on the configmaps of one namespace, through the proxy and past it."""

    def __init__(self, proxy: FaultProxy, direct: ApiClient, namespace: str) -> None:
        self.proxy = proxy
        self.path = f"/api/v1/namespaces/{namespace}/configmaps"
        self.namespace = namespace
        self.direct = direct
        self._host = proxy.address.removeprefix("http://")

    def send(self, method: str, path: str, body: Object | None = None, seconds: float = SECONDS) -> Reply:
        """Send one request through the proxy."""
        connection = http.client.HTTPConnection(self._host, timeout=seconds)
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": kind})
            response = connection.getresponse()
            return Reply(response.status, response.headers, json.loads(response.read()))
        finally:
            connection.close()

    def create(self, name: str, seconds: float = SECONDS) -> Reply:
        """Create an object through the proxy."""
        return self.send("POST", self.path, {"metadata": {"name": name}, "data": {"key": name}}, seconds)

    def stored(self, name: str) -> bool:
        """Tell, past the proxy, whether an object is there."""
        return self.direct.exists(f"{self.path}/{name}")

    def make(self, name: str, path: str = "") -> None:
        """Create an object past the proxy."""
        self.direct.request("POST", path or self.path, {"metadata": {"name": name}})

    def remove(self, name: str) -> None:
        """Delete an object past the proxy."""
        self.direct.request("DELETE", f"{self.path}/{name}")

    @contextmanager
    def watch(self, path: str = "", query: str = "") -> Iterator[Watch]:
        """Watch through the proxy, from now on."""
        revision = self.direct.request("GET", path or self.path)["metadata"]["resourceVersion"]
        connection = http.client.HTTPConnection(self._host, timeout=60)
        connection.request("GET", f"{path or self.path}?watch=true&resourceVersion={revision}&{query}")
        made = Watch(connection.getresponse())
        try:
            yield made
        finally:
            made.close(connection)


class Watch:
    """A watch that is read in a thread, so that a silent one can be told from one that has ended."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self._response = response
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while line := self._response.readline():
                self._lines.put(line)
        except (*BROKEN, OSError, ValueError):
            pass  # The end, like any other.
        self._lines.put(None)

    def next(self, seconds: float = SECONDS) -> tuple[str, str] | None:
        """Return type and name of the next event, None at the end; queue.Empty when there is silence."""
        line = self._lines.get(timeout=seconds)
        if line is None:
            return None
        event = json.loads(line)
        return event["type"], str(event["object"].get("code") or event["object"]["metadata"]["name"])

    def silent(self, seconds: float) -> bool:
        """Tell whether nothing comes for a while, not even the end."""
        try:
            self.next(seconds)
        except queue.Empty:
            return True
        return False

    def close(self, connection: http.client.HTTPConnection) -> None:
        """Hang up."""
        if connection.sock is not None:
            connection.sock.shutdown(2)
        self._thread.join(SECONDS)
        self._response.close()
        connection.close()


@pytest.fixture
def proxy(crds: LocalCluster) -> Iterator[FaultProxy]:
    """A proxy in front of the shared control plane that works as its administrator."""
    with FaultProxy(crds.client_config, as_user=True) as made:
        yield made


@pytest.fixture
def client(proxy: FaultProxy, crds: LocalCluster, namespace: str) -> Client:
    """A client in a namespace of its own, which has already got the configmap that every namespace gets."""
    made = Client(proxy, crds.api, namespace)
    wait_until(lambda: made.stored("kube-root-ca.crt"), "the authority's configmap", SECONDS)
    return made


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    """Do something in a thread, so that the test can act meanwhile."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit
