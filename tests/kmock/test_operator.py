"""kopf, replica and lease together over HTTP: what they send, and what they make of a server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kopf
import pytest

from builders import make_node, make_offer, make_pod, make_policy
from core_builders import ONE_GPU, TWO_GPUS
from taskoffer.adapters.events import EventWriter
from taskoffer.adapters.kube import WATCHED, Kube
from taskoffer.adapters.lease import Lease, LeaseTimes
from taskoffer.handlers.watches import registry_for
from taskoffer.reconcile.flow import Flow
from taskoffer.reconcile.replica import Replica
from taskoffer.reconcile.session import Session, Settings

OFFERS = "taskoffer.dev/v1alpha1/taskoffers"
JOBS = "taskoffer.dev/v1alpha1/trainingjobs"
STATUS = "patch /apis/taskoffer.dev/v1alpha1/namespaces/default/taskoffers/a/status"
ADMITTED, FULL = ("True", "Admitted"), ("False", "WaitingForCapacity")


class Operator:
    """A replica with kopf over the emulator, in this process."""

    def __init__(self, kmock: Any, replica: Replica) -> None:
        self.kmock, self.replica = kmock, replica

    def offer(self, name: str = "a", **fields: Any) -> dict[str, Any]:
        made = make_offer(**{"name": name, "parameters": ONE_GPU, **fields})
        stored: dict[str, Any] = self.kmock.put(OFFERS, made, namespace="default")
        return stored

    def verdict(self, name: str = "a") -> tuple[str, str] | None:
        conditions = self.kmock.read(OFFERS, "default", name).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == "Admitted"), None)

    def asked(self) -> list[str]:
        """Return the last requests but those for the lease."""
        return [f"{r.method.value} {r.url}" for r in self.kmock if "leases" not in str(r.url)][-20:]

    async def until(self, true: Callable[[], object], seconds: float = 8) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not true():
            assert asyncio.get_running_loop().time() < deadline, "\n".join(self.asked())
            await asyncio.sleep(0.01)


@pytest.fixture
async def operator(
    kmock: Any, kube: Kube, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Operator]:
    """A leading replica: one node with two GPUs, the lab policy, and kopf's watches."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    kmock.put("v1/nodes", make_node(gpus=2))
    kmock.put("taskoffer.dev/v1alpha1/capacitypolicies", make_policy())
    lease = Lease(kube, "system", "taskoffer", "me", LeaseTimes())
    replica = Replica(Session(kube, lease, EventWriter(kube), Settings(lease_namespace="system", write_timeout=0.5)))
    # kopf's own runner ends by cancelling every task that is younger than itself, this fixture's and the test's too.
    flow = Flow(WATCHED, 20, time.monotonic)
    watches = await kopf.spawn_tasks(
        registry=registry_for(replica, flow, kubeconfig), standalone=True, clusterwide=True
    )
    leading = asyncio.create_task(replica.run())
    made = Operator(kmock, replica)
    try:
        await made.until(lambda: replica.leading)
        yield made
    finally:
        tasks = [*watches, leading]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                task.result()


def writes(kmock: Any, offer: str = "a") -> list[Any]:
    path = f"/apis/taskoffer.dev/v1alpha1/namespaces/default/taskoffers/{offer}"
    return [r for r in kmock["patch"] if str(r.url.path).startswith(path)]


async def test_an_offer_costs_one_status_write_and_no_bookkeeping(operator: Operator) -> None:
    made = operator.offer()
    await operator.until(lambda: operator.verdict() == ADMITTED)
    await operator.until(lambda: any(p[0].plural == "jobs" for p in operator.kmock.stored))
    await asyncio.sleep(0.2)
    (write,) = writes(operator.kmock)
    assert str(write.url.path).endswith("/a/status")
    assert write.data["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    metadata = operator.kmock.read(OFFERS, "default", "a")["metadata"]
    assert not {"annotations", "finalizers"} & metadata.keys()
    others = {str(r.url.path) for r in operator.kmock["patch"]} - {str(write.url.path)}
    assert all(path.endswith("/status") for path in others), others


async def test_an_edit_in_between_is_a_conflict_and_the_offer_is_decided_again(operator: Operator) -> None:
    def edit(_: Any) -> Any:
        operator.kmock.change(OFFERS, "default", "a", {"spec": {"active": False}, "metadata": {"generation": 2}})
        raise NotImplementedError  # The emulator goes on and finds the version stale.

    operator.kmock[STATUS][:1] << edit
    operator.offer()
    await operator.until(lambda: operator.verdict() == ("False", "Suspended"))
    assert len(writes(operator.kmock)) == 2
    assert "admission" not in operator.kmock.read(OFFERS, "default", "a")["status"]


@pytest.mark.parametrize("failure", [503, 429])
async def test_a_server_in_trouble_gets_the_same_write_again(operator: Operator, failure: int) -> None:
    operator.kmock[STATUS][:2] << failure
    operator.offer()
    await operator.until(lambda: operator.verdict() == ADMITTED)
    bodies = [w.data for w in writes(operator.kmock)]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


async def test_a_refused_answer_is_held_back_and_the_others_are_decided(operator: Operator) -> None:
    operator.kmock[STATUS] << 422 << {"reason": "Invalid", "message": "no"}
    operator.offer("a")
    await operator.until(lambda: writes(operator.kmock))
    operator.offer("b")
    await operator.until(lambda: operator.verdict("b") == ADMITTED)
    await asyncio.sleep(0.1)
    assert len(writes(operator.kmock)) == 1


async def test_pods_free_their_gpus_through_the_watch(operator: Operator) -> None:
    operator.kmock.put("v1/pods", make_pod("foreign"), namespace="default")
    operator.offer(parameters=TWO_GPUS)
    await operator.until(lambda: operator.verdict() == FULL)
    operator.kmock.change("v1/pods", "default", "foreign", {"status": {"phase": "Succeeded"}})
    await operator.until(lambda: operator.verdict() == ADMITTED)


async def test_what_is_deleted_during_a_watch_gap_is_a_ghost_until_the_next_list(operator: Operator) -> None:
    """After 410 kopf lists anew and never tells of the deletion; the replica's own list corrects it."""
    operator.kmock.put("v1/pods", make_pod("ghost", gpus=2), namespace="default")
    operator.offer()
    await operator.until(lambda: operator.verdict() == FULL)
    await operator.until(lambda: any(p.view.name == "ghost" for p in operator.replica.session.world.pods))
    place = next(p for p in operator.kmock.stored if p[2] == "ghost")
    del operator.kmock.stored[place]
    operator.kmock.cut_watches()
    operator.offer("b")
    await operator.until(lambda: operator.verdict("b") == FULL)
    await operator.replica.resync()
    operator.replica.session.cycle_wanted.set()
    await operator.until(lambda: ADMITTED in (operator.verdict("a"), operator.verdict("b")))


async def test_watches_go_on_after_they_were_cut(operator: Operator) -> None:
    for round_ in range(3):
        operator.kmock.cut_watches()
        operator.offer(f"o{round_}", seconds=100)
        await operator.until(lambda name=f"o{round_}": operator.verdict(name))  # type: ignore[misc]


async def test_a_training_job_of_another_owner_is_not_adopted(operator: Operator) -> None:
    operator.kmock[f"post /apis/{JOBS.rsplit('/', 1)[0]}/namespaces/default/trainingjobs"] << 409
    foreign = {"metadata": {"name": "a-a-uid", "uid": "x", "ownerReferences": [{"uid": "y", "controller": True}]}}
    operator.kmock["get /apis/taskoffer.dev/v1alpha1/namespaces/default/trainingjobs/a-a-uid"] << foreign
    operator.offer()
    path = "/api/v1/namespaces/default/events"
    await operator.until(
        lambda: any(r.data["reason"] == "NameConflict" for r in operator.kmock["post"] if str(r.url.path) == path)
    )
    assert not any(p[0].plural == "jobs" for p in operator.kmock.stored)
    assert operator.verdict() == ADMITTED


async def test_a_stolen_lease_stops_every_write(operator: Operator) -> None:
    operator.kmock.change("coordination.k8s.io/v1/leases", "system", "taskoffer", {"spec": {"holderIdentity": "thief"}})
    await operator.until(lambda: not operator.replica.session.lease.held)
    operator.offer()
    await asyncio.sleep(0.3)
    assert writes(operator.kmock) == []


async def test_an_odd_object_in_a_watch_does_not_stop_the_others(operator: Operator) -> None:
    operator.kmock.put(OFFERS, {"metadata": {"name": "odd"}, "spec": {"taskID": 7}}, namespace="default")
    operator.offer()
    await operator.until(lambda: operator.verdict() == ADMITTED)
    await operator.until(lambda: operator.verdict("odd") == ("False", "InvalidOffer"))
