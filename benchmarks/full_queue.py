"""A full node and a long queue: how soon a freed GPU is given away again, what the queue costs, how a restart goes.

Against a real control plane with its controllers, and nodes without a kubelet. In one run:

* N offers wait for a node that is full; the operator's memory with them, and after they are gone;
* again and again the pod of a running job ends, and the time from there to the next offer's admission is taken; beside
  it the time that the writes take which have to come between (the job's end, the offer's end, the admission), made by a
  bare client one after another;
* the operator is stopped and started again with all of it stored: the time until it leads, and until it answers.

    python benchmarks/full_queue.py --offers 10000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from admission import Operator
from bare_client import Object, Watcher, at_once, offer, quantile, run_quietly

from taskoffer import presets
from taskoffer.adapters.kube import JOBS_OF_TRAINING, OFFERS, PODS, POLICIES, Kube
from taskoffer.render.names import CONTAINER
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.install import install, operator_kubeconfig
from taskoffer_lab.local_provider import LocalProvider
from taskoffer_lab.spec import ClusterSpec

NAMESPACE = "queue"
PATIENCE = 120.0


def prepare(cluster: Cluster, gpus: int) -> None:
    """Make the namespace, its claims, and one node without a kubelet."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    objects: list[Object] = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "bench"}}]
    both: Object = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    size: Object = {"storage": "1Gi"}
    for name in ("models", "data", "outputs"):
        holder = {"namespace": NAMESPACE, "name": name}
        volume = {**both, "capacity": size, "hostPath": {"path": "/nonexistent"}, "claimRef": holder}
        objects.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume})
        claim = {**both, "resources": {"requests": size}, "volumeName": name}
        objects.append({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": holder, "spec": claim})
    for made in objects:
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(made))
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "made for the benchmark"}
    sizes = {"nvidia.com/gpu": str(gpus), "cpu": "1000", "memory": "9000Gi", "pods": "100000"}
    status = {"status": {"allocatable": sizes, "capacity": sizes, "conditions": [ready]}}
    cluster.kubectl("patch", "node", "bench", "--subresource=status", "--type=merge", "-p", json.dumps(status))
    cluster.kubectl("taint", "node", "bench", "node.kubernetes.io/not-ready-", check=False)


class Queue:
    """The offers, the operator, and the measuring client."""

    def __init__(self, kube: Kube, operator: Operator) -> None:
        self.kube = kube
        self.operator = operator
        self.admitted: asyncio.Queue[tuple[float, str]] = asyncio.Queue()
        self.running: list[Object] = []
        self._watch: asyncio.Task[None] | None = None

    async def fill(self, count: int) -> float:
        """Create the offers and wait until each has its answer; return the seconds it took."""
        watcher = Watcher(expected=count)
        watching = asyncio.create_task(watcher.run(self.kube, NAMESPACE))
        await asyncio.sleep(0.3)
        started = time.perf_counter()

        async def create(i: int) -> None:
            await self.kube.create(OFFERS, NAMESPACE, offer(NAMESPACE, f"o-{i}", 5))

        await at_once([lambda i=i: create(i) for i in range(count)])
        async with asyncio.timeout(900):
            while not watcher.all_seen.is_set():
                self.operator.check()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(watcher.all_seen.wait(), 1)
        watching.cancel()
        return time.perf_counter() - started

    async def follow(self) -> None:
        """Note each admission from now on, by this process's clock."""
        _, version = await self.kube.list(OFFERS)

        async def watch() -> None:
            client, since = self.kube._client.rest_client, version
            while True:
                url = f"{self.kube._host}{OFFERS.path(NAMESPACE)}?watch=true&resourceVersion={since}"
                answer = await client.request("GET", url, headers={"Accept": "application/json"}, _request_timeout=3600)
                async for line in answer.response.content:
                    seen = json.loads(line)["object"]
                    since = seen["metadata"]["resourceVersion"]
                    status = seen.get("status") or {}
                    finished = any(c["type"] == "Finished" for c in status.get("conditions") or ())
                    if status.get("admission") and not finished:
                        self.admitted.put_nowait((time.perf_counter(), seen["metadata"]["uid"]))

        self._watch = asyncio.create_task(watch())

    async def run_pods(self, count: int) -> None:
        """Wait until so many more pods are bound, and let them run."""
        async with asyncio.timeout(PATIENCE):
            while True:
                pods, _ = await self.kube.list(PODS)
                bound = [p for p in pods if p["spec"].get("nodeName") and p["status"].get("phase") == "Pending"]
                if len(bound) >= count:
                    break
                await asyncio.sleep(0.2)
        for pod in bound:
            await self._set(pod, "Running", {"running": {"startedAt": _now()}})
        self.running += bound

    async def give_away(self) -> float:
        """Let one job end and wait until another offer is admitted; return the milliseconds between."""
        await self._jobs_run()
        while not self.admitted.empty():
            self.admitted.get_nowait()
        pod = self.running.pop(0)
        holder = pod["metadata"]["labels"]["taskoffer.dev/offer-uid"]
        ended = {"exitCode": 0, "reason": "Completed", "startedAt": _now(), "finishedAt": _now(), "message": ""}
        started = time.perf_counter()
        await self._set(pod, "Succeeded", {"terminated": ended})
        async with asyncio.timeout(PATIENCE):
            while True:
                at, uid = await self.admitted.get()
                if uid != holder:
                    break
        await self.run_pods(1)
        return (at - started) * 1000

    async def _jobs_run(self) -> None:
        """Wait until nothing is on its way: every job that has a bound pod says that it runs."""
        async with asyncio.timeout(PATIENCE):
            while True:
                jobs, _ = await self.kube.list(JOBS_OF_TRAINING)
                states = [_condition(job, "Running") for job in jobs if not _condition(job, "Complete")]
                if states and all(state == "True" for state in states):
                    return
                await asyncio.sleep(0.1)

    async def _set(self, pod: Object, phase: str, state: Object) -> None:
        running = phase == "Running"
        container = {"name": CONTAINER, "image": "x", "imageID": "x", "ready": running, "restartCount": 0}
        status = {"phase": phase, "startTime": _now(), "containerStatuses": [{**container, "state": state}]}
        await self.kube.patch_status(PODS, NAMESPACE, pod["metadata"]["name"], {"status": status})

    async def floor(self, rounds: int) -> list[float]:
        """Measure the writes of a hand-over alone: three status patches of offers, one after another, ms."""
        taken = []
        for number in range(rounds):
            before = time.perf_counter()
            for part in range(3):
                note = {"status": {"conditions": [_note(number, part)]}}
                await self.kube.patch_status(OFFERS, "floor", f"f-{part}", note)
            taken.append((time.perf_counter() - before) * 1000)
        return sorted(taken)

    def close(self) -> None:
        """End the measuring watch."""
        if self._watch is not None:
            self._watch.cancel()


def _note(number: int, part: int) -> Object:
    said = {"type": "Admitted", "status": "False", "reason": "WaitingForCapacity", "message": f"{number} {part}"}
    return {**said, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def _condition(obj: Object, kind: str) -> str | None:
    found = (obj.get("status") or {}).get("conditions") or ()
    return next((c["status"] for c in found if c["type"] == kind), None)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def restarted(make: Any, kube: Kube) -> tuple[Operator, float, float]:
    """Start an operator; return it, and the seconds until it led and until it had answered a new offer."""
    watcher = Watcher(expected=1)
    watching = asyncio.create_task(watcher.run(kube, "floor"))
    started = time.perf_counter()
    operator: Operator = make()
    await operator.leading()
    leads = time.perf_counter() - started
    await kube.create(OFFERS, "floor", {**offer("floor", "after", 0)})
    async with asyncio.timeout(PATIENCE):
        while "after" not in watcher.seen:  # noqa: ASYNC110 - the watch of another task fills it
            await asyncio.sleep(0.01)
    watching.cancel()
    return operator, leads, watcher.seen["after"] - started


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark once."""
    spec = ClusterSpec(name=f"queue-{os.getpid()}", node_monitor_grace_seconds=36000)
    with LocalProvider().up(spec) as cluster, tempfile.TemporaryDirectory() as scratch:
        kube = await Kube.connect(cluster.kubeconfig, timeout=60)
        install(cluster)
        prepare(cluster, args.gpus)
        cluster.kubectl("create", "namespace", "floor")
        config = operator_kubeconfig(cluster, Path(scratch))

        def start() -> Operator:
            return Operator(config, Path(args.log))

        operator = start()
        codes: list[int] = []
        try:
            await operator.leading()
            policy = presets.load("lab")
            policy["spec"]["filters"].pop("maxConcurrentJobs")
            await kube.create(POLICIES, None, policy)
            for part in range(3):
                await kube.create(OFFERS, "floor", offer("floor", f"f-{part}", 0))
            rest, _ = operator.memory()
            queue = Queue(kube, operator)
            filled = await queue.fill(args.offers)
            full, peak = operator.memory()
            say(f"{args.offers} offers answered in {filled:.0f} s, operator at {full:.0f} MB")
            await queue.follow()
            await queue.run_pods(args.gpus)
            given = []
            for number in range(args.rounds):
                given.append(await queue.give_away())
                if number % 25 == 24:
                    say(f"{number + 1} GPUs given away again, the last after {given[-1]:.0f} ms")
            floor = await queue.floor(args.rounds)
            metrics = operator.metrics()
            queue.close()
            stored = len((await kube.list(OFFERS))[0]) + len((await kube.list(JOBS_OF_TRAINING))[0])
            codes.append(operator.stop())
            operator, leads, answers = await restarted(start, kube)
            again, _ = operator.memory()
            say(f"restarted with {stored} objects: led after {leads:.1f} s")
            await kube.request("DELETE", OFFERS.path(NAMESPACE), timeout=300)
            async with asyncio.timeout(600):
                while len((await kube.list(OFFERS))[0]) > 4:  # noqa: ASYNC110 - the garbage collector's work
                    await asyncio.sleep(1)
            await asyncio.sleep(args.settle)
            gone, _ = operator.memory()
        finally:
            codes.append(operator.stop())
        await kube.close()
    cycles = [line for line in metrics.splitlines() if line.startswith("taskoffer_cycle_duration_seconds_")]
    return {
        "given": sorted(given),
        "floor": floor,
        "filled": args.offers / filled,
        "memory": {"rest": rest, "full": full, "peak": peak, "restarted": again, "gone": gone},
        "restart": {"objects": stored, "leads": leads, "answers": answers},
        "cycles": cycles,
        "codes": codes,
    }


def say(text: str) -> None:
    """Show how far it is."""
    print(text, file=sys.stderr, flush=True)


def report(args: argparse.Namespace, run: dict[str, Any]) -> str:
    """Write the table."""
    memory, restart, given, floor = run["memory"], run["restart"], run["given"], run["floor"]
    rows = [
        ("offers answered per second while the queue filled", f"{run['filled']:.0f}"),
        (
            f"freed GPU given away again, {len(given)} times: p50 / p99 / most, ms",
            f"{quantile(given, 0.5):.0f} / {quantile(given, 0.99):.0f} / {given[-1]:.0f}",
        ),
        (
            "three such writes by a bare client: p50 / p99, ms",
            f"{quantile(floor, 0.5):.0f} / {quantile(floor, 0.99):.0f}",
        ),
        (
            "operator memory at rest / with the queue / at its peak, MB",
            "{rest:.0f} / {full:.0f} / {peak:.0f}".format(**memory),
        ),
        ("after a restart / after all offers were deleted, MB", "{restarted:.0f} / {gone:.0f}".format(**memory)),
        (
            f"restart with {restart['objects']} objects: leads / has answered a new offer after, s",
            f"{restart['leads']:.1f} / {restart['answers']:.1f}",
        ),
    ]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    head = f"{args.offers} offers for {args.gpus} GPUs, {machine}"
    return "\n".join([head, "", "| figure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offers", type=int, default=10_000, help="offers in the queue (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that are all booked (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="GPUs that are freed (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=10, help="seconds before memory is read (default: %(default)s)")
    parser.add_argument("--log", default=os.devnull, help="file for the operator's log")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    run = run_quietly(measure(args))
    print(report(args, run))
    if args.json:
        args.json.write_text(json.dumps(run, indent=2))
    return 0 if set(run["codes"]) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
