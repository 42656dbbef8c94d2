"""Nodes without machines: objects in the API whose kubelet is played from here.

    with FakeKubelet(cluster) as kubelet:
        kubelet.add_node("n1", gpus=8, labels={"rack": "1"})
        kubelet.start("default", "pod-1")                 # by hand ...
        kubelet.end("default", "pod-1", exit_code=1, message="out of data")
        kubelet.automate("n1", Script(run_seconds=0.3))   # ... or by itself

A pod that was asked to go (it has a deletionTimestamp) stays until its containers have ended, as with a real
kubelet: `end` removes it then. Leases are renewed all the time, so that only the test decides when a node is lost.
"""

from __future__ import annotations

import http.client
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from patient_client import PatientClient
from taskoffer_lab.api_client import MERGE_PATCH, ApiError
from taskoffer_lab.cluster import Cluster

Object = dict[str, Any]

GPU = "nvidia.com/gpu"
STOPPED = 143
"""Exit code of a trainer that was stopped and has written a checkpoint."""

_WATCH_TRIES = 600
"""Failed tries in a row, 0.2 s apart, after which the watch is given up: a test may stop the server for a minute."""
_HEARTBEAT_SECONDS = 5.0
_WATCH_SECONDS = 300
_MICRO = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class Script:
    """What happens by itself to every pod that is bound to a node.

    Attributes:
        run_seconds: How long a container runs.
        exit_code: How it ends, given its pod.
        stop_seconds: How long it takes to end once it was asked to stop.
    """

    run_seconds: float = 0.3
    exit_code: Callable[[Object], int] = lambda _pod: 0
    stop_seconds: float = 0.1


class FakeKubelet:
    """The kubelets of all fake nodes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._api = PatientClient(cluster.client_config)
        self._nodes: set[str] = set()
        self._scripts: dict[str, Script] = {}
        self._stopping = threading.Event()
        self._inbox: queue.PriorityQueue[tuple[float, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._known: set[tuple[str, str]] = set()
        self._threads = [
            threading.Thread(target=self._act, name="fake-kubelet", daemon=True),
            threading.Thread(target=self._watch, name="fake-kubelet-watch", daemon=True),
        ]
        self._connection: http.client.HTTPSConnection | None = None
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self._later(_HEARTBEAT_SECONDS, self._beat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._later(0, lambda: None)
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        for thread in self._threads:
            thread.join(10)
        try:
            for name in list(self._nodes):
                self.remove_node(name)
        finally:
            self._api.close()
        assert not self.failures, f"the fake kubelet failed: {self.failures}"

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes that are there."""
        return list(self._nodes)

    # Nodes

    def add_node(self, name: str, gpus: int = 8, labels: dict[str, str] | None = None) -> str:
        """Create a Ready node with GPUs, and return its name."""
        self._nodes.add(name)
        meta = {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}}
        self._api.request("POST", "/api/v1/nodes", {"metadata": meta})
        lease = {"metadata": {"name": name}, "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}}
        self._api.request("POST", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease)
        self._renew(name)
        self._node_status(name, {"allocatable": _offers(gpus), "capacity": _offers(gpus), **_ready(True)})
        return name

    def remove_node(self, name: str) -> None:
        """Delete a node, as when its machine was returned. Its pods are nobody's from then on."""
        self._nodes.remove(name)
        self._scripts.pop(name, None)
        for path in (f"/api/v1/nodes/{name}", _lease(name)):
            self.ignoring_absence("DELETE", path)

    def set_gpus(self, name: str, gpus: int) -> None:
        """Let a node offer another number of GPUs."""
        self._node_status(name, {"allocatable": _offers(gpus), "capacity": _offers(gpus)})

    def set_ready(self, name: str, ready: bool) -> None:
        """Let a node say that it is Ready or not."""
        self._node_status(name, _ready(ready))

    def cordon(self, name: str, cordoned: bool = True) -> None:
        """Close a node to new pods, or open it again."""
        self._api.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"unschedulable": cordoned or None}}, MERGE_PATCH)

    def automate(self, name: str, script: Script | None) -> None:
        """Have a script play every pod that is bound to a node from now on; None ends that."""
        if script is None:
            self._scripts.pop(name, None)
        else:
            self._scripts[name] = script

    # Pods

    def start(self, namespace: str, name: str) -> None:
        """Let a pod's container run from now on."""
        self._pod_status(namespace, name, "Running", {"running": {"startedAt": _now()}})

    def end(self, namespace: str, name: str, exit_code: int = 0, message: str = "") -> None:
        """Let a pod's container end; a pod that was asked to go is removed."""
        pod = self._api.request("GET", _pod(namespace, name))
        statuses: list[Object] = pod.get("status", {}).get("containerStatuses") or []
        before = statuses[0].get("state") or {} if statuses else {}
        started = (before.get("running") or {}).get("startedAt") or _now()
        ended = {"exitCode": exit_code, "startedAt": started, "finishedAt": _now(), "message": message}
        reason = "Completed" if exit_code == 0 else "Error"
        phase = "Succeeded" if exit_code == 0 else "Failed"
        self._pod_status(namespace, name, phase, {"terminated": {**ended, "reason": reason}})
        if "deletionTimestamp" in pod["metadata"]:
            self.release(namespace, name)

    def release(self, namespace: str, name: str) -> None:
        """Remove a pod object without grace, as the kubelet does once the containers have ended."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
        self.ignoring_absence("DELETE", _pod(namespace, name), options)

    # The threads

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._inbox.put((time.monotonic() + seconds, next(self._numbers), action))

    def _act(self) -> None:
        """Do what is due, in order of time."""
        while not self._stopping.is_set():
            due, number, action = self._inbox.get()
            early = due - time.monotonic()
            if early > 0:
                # Something sooner may come in meanwhile, so wait a little and look again.
                self._inbox.put((due, number, action))
                self._stopping.wait(min(early, 0.02))
                continue
            try:
                action()
            except ApiError as error:
                if error.status not in (404, 409):
                    self.failures.append(str(error))
            except Exception as error:  # noqa: BLE001
                # Whatever it is, the other pods and the heartbeats go on, and the test fails with it at its end.
                self.failures.append(repr(error))

    def _beat(self) -> None:
        for name in list(self._nodes):
            self._renew(name)
        self._later(_HEARTBEAT_SECONDS, self._beat)

    def _renew(self, name: str) -> None:
        renewed = {"spec": {"renewTime": datetime.now(UTC).strftime(_MICRO)}}
        self.ignoring_absence("PATCH", _lease(name), renewed, MERGE_PATCH)

    def _watch(self) -> None:
        """Follow all pods of the cluster and hand those of scripted nodes to the actor."""
        broken = 0
        while not self._stopping.is_set():
            try:
                self._follow()
                broken = 0
            except (OSError, http.client.HTTPException, ValueError) as error:
                # A connection may break; a watch starts with all pods again. One that never holds is a failure.
                broken += 1
                if broken > _WATCH_TRIES and not self._stopping.is_set():
                    self.failures.append(f"watch: {error!r}")
                    return
                self._stopping.wait(0.2)

    def _follow(self) -> None:
        config = self._api.config
        parts = urlsplit(config.server)
        assert parts.hostname is not None
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=_WATCH_SECONDS + 30, context=config.ssl_context()
        )
        self._connection = connection
        try:
            connection.request("GET", f"/api/v1/pods?watch=1&timeoutSeconds={_WATCH_SECONDS}", None, config.headers)
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"answered with {response.status}")
            while line := response.readline():
                event = json.loads(line)
                if event["type"] in ("ADDED", "MODIFIED"):
                    self._take(event["object"])
        finally:
            connection.close()

    def _take(self, pod: Object) -> None:
        script = self._scripts.get(pod["spec"].get("nodeName", ""))
        if script is None:
            return
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        over = pod["status"].get("phase") in ("Succeeded", "Failed")
        if "deletionTimestamp" in pod["metadata"]:
            if over:
                self._later(0, lambda: self.release(namespace, name))
            elif self._once(pod, "stop"):
                self._later(script.stop_seconds, lambda: self.end(namespace, name, STOPPED))
        elif not over and self._once(pod, "run"):
            self._later(0, lambda: self.start(namespace, name))
            self._later(script.run_seconds, lambda: self._finish(pod, script))

    def _finish(self, pod: Object, script: Script) -> None:
        """End a pod by itself, unless it was asked to stop meanwhile: then its stop time counts."""
        if (pod["metadata"]["uid"], "stop") not in self._known:
            self.end(pod["metadata"]["namespace"], pod["metadata"]["name"], script.exit_code(pod))

    def _once(self, pod: Object, what: str) -> bool:
        key = (pod["metadata"]["uid"], what)
        known = key in self._known
        self._known.add(key)
        return not known

    # Writing

    def ignoring_absence(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> None:
        """Send a request about an object that may be gone already."""
        try:
            self._api.request(method, path, body, kind)
        except ApiError as error:
            if error.status != 404:
                raise

    def _node_status(self, name: str, status: Object) -> None:
        self._api.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, MERGE_PATCH)

    def _pod_status(self, namespace: str, name: str, phase: str, state: Object) -> None:
        running = phase == "Running"
        container = {
            "name": "trainer",
            "image": "fake",
            "imageID": "fake",
            "ready": running,
            "restartCount": 0,
            "state": state,
        }
        status = {"phase": phase, "containerStatuses": [container], "startTime": _now()}
        self._api.request("PATCH", f"{_pod(namespace, name)}/status", {"status": status}, MERGE_PATCH)


def _pod(namespace: str, name: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods/{name}"


def _lease(node: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node}"


def _offers(gpus: int) -> Object:
    """Return what a node offers. With 8 GPUs all of them can be used with what the presets ask for beside each."""
    return {GPU: str(gpus), "cpu": "128", "memory": "1000Gi", "ephemeral-storage": "500Gi", "pods": "500"}


def _ready(ready: bool) -> Object:
    said = {"status": "True", "reason": "KubeletReady"} if ready else {"status": "False", "reason": "KubeletNotReady"}
    times = {"lastHeartbeatTime": _now(), "lastTransitionTime": _now()}
    return {"conditions": [{"type": "Ready", "message": "said by the test", **said, **times}]}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
