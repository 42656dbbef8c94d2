"""A leading replica on virtual time over an API server in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

from builders import make_node, make_offer, make_policy
from core_builders import ONE_GPU
from fake_kube import FakeKube
from taskoffer.adapters.events import EventWriter
from taskoffer.adapters.kube import BATCH_JOBS, EVENTS, NODES, OFFERS, PODS, POLICIES, Kube, Object
from taskoffer.adapters.lease import Lease, LeaseTimes
from taskoffer.reconcile.replica import Replica
from taskoffer.reconcile.session import Session, Settings


@dataclass
class Rig:
    """A replica and its server."""

    kube: FakeKube
    replica: Replica
    task: asyncio.Task[None]

    @property
    def session(self) -> Session:
        return self.replica.session

    def offer(self, name: str = "a", **fields: Any) -> Object:
        """Have somebody create an offer."""
        return self.kube.put(OFFERS, make_offer(**{"name": name, "parameters": ONE_GPU, **fields}), uid=f"{name}-uid")

    def read(self, name: str = "a") -> Object:
        """Return an offer as it is stored."""
        return self.kube.get_now(OFFERS, name)

    def verdict(self, name: str = "a") -> tuple[str, str] | None:
        """Return status and reason of an offer's Admitted condition."""
        conditions = self.read(name).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == "Admitted"), None)

    def finished(self, name: str = "a") -> str | None:
        """Return the reason of an offer's Finished condition."""
        conditions = self.read(name).get("status", {}).get("conditions", [])
        return next((c["reason"] for c in conditions if c["type"] == "Finished" and c["status"] == "True"), None)

    def booked(self) -> dict[str, int]:
        """Return the GPUs that the replica counts as booked, by node."""
        from taskoffer.decision.ledger import open_ledger

        return open_ledger(self.session.world.claims("nvidia.com/gpu")).booked

    def events(self) -> list[tuple[str, str, str]]:
        """Return kind, name and reason of every event."""
        return [(e["involvedObject"]["kind"], e["involvedObject"]["name"], e["reason"]) for e in self.kube.all(EVENTS)]

    async def until(self, true: Callable[[], object], *, seconds: float = 60) -> None:
        """Let virtual time pass until something is true."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while (passed := loop.time() - started) <= seconds:
            if true():
                return
            if self.task.done():
                self.task.result()
            await asyncio.sleep(0.02 if passed < 2 else 0.2)
        asked = [f"{r.at:.2f} {r.verb} {r.kind} {r.name}" for r in self.kube.requests if r.kind != "Lease"]
        raise AssertionError(f"not within {seconds} s; the last requests were {asked[-12:]}")

    async def quiet(self, seconds: float = 1.0) -> None:
        """Let virtual time pass."""
        await asyncio.sleep(seconds)
        if self.task.done():
            self.task.result()


def make_replica(kube: FakeKube, identity: str = "one", **settings: Any) -> Replica:
    """Return a replica that does not run yet; the server's watch feeds it."""
    lease = Lease(cast(Kube, kube), "system", "taskoffer", identity, LeaseTimes())
    session = Session(
        cast(Kube, kube), lease, EventWriter(cast(Kube, kube)), Settings(lease_namespace="system", **settings)
    )
    return Replica(session)


@contextlib.asynccontextmanager
async def leading(
    kube: FakeKube | None = None,
    *,
    nodes: dict[str, int] | None = None,
    policy: Object | None = None,
    identity: str = "one",
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Run a replica until it leads, over a server with these nodes and a default policy."""
    kube = kube or FakeKube()
    if nodes is not None or not kube.all(NODES):
        for name, gpus in ({"node-a": 8} if nodes is None else nodes).items():
            kube.put(NODES, make_node(name, gpus=gpus), uid=f"{name}-uid")
    if not kube.all(POLICIES):
        kube.put(POLICIES, policy or make_policy(), uid="lab-uid")
    replica = make_replica(kube, identity, **settings)
    kube.observer = replica.observe
    task = asyncio.create_task(replica.run())
    rig = Rig(kube, replica, task)
    try:
        await rig.until(lambda: replica.leading)
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def start_pod(kube: FakeKube, job: Object, *, phase: str = "Running", **status: Any) -> Object:
    """Play Job controller, scheduler and kubelet: a pod of a Job, bound to its node."""
    template = job["spec"]["template"]
    affinity = template["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    node = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
    state = {"running": {"startedAt": "2026-01-31T12:00:00Z"}} if phase == "Running" else {}
    return kube.put(
        PODS,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{job['metadata']['name']}-pod",
                "namespace": job["metadata"]["namespace"],
                "labels": template["metadata"]["labels"],
                "ownerReferences": [{"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}],
            },
            "spec": {**template["spec"], "nodeName": node},
            "status": {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}], **status},
        },
    )


def end_pod(kube: FakeKube, name: str, code: int, message: str = "") -> Object:
    """Play kubelet and Job controller: the container of a pod has ended, and with it its Job."""
    ended = {
        "exitCode": code,
        "message": message,
        "startedAt": "2026-01-31T12:00:00Z",
        "finishedAt": "2026-01-31T12:01:00Z",
    }
    status = {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}],
    }
    ending = {"type": "Failed" if code else "Complete", "status": "True"}
    made = kube.change(PODS, name, {"status": status})
    for owner in made["metadata"]["ownerReferences"]:
        kube.change(BATCH_JOBS, owner["name"], {"status": {"conditions": [ending]}})
    return made
