"""What a bare client reaches: the offers of the benchmark, the measuring watch, and the raw limit of an API server."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from taskoffer.adapters.kube import OFFERS, Kube

Object = dict[str, Any]

CONCURRENCY = 24


def offer(namespace: str, name: str, kind: int, *, mixed: bool = False) -> Object:
    """Return an offer: of ten, two are refused (too long, foreign family), the others can be admitted.

    In a mix, six of those eight ask for the node that is too small for them, and wait.
    """
    waits = {"policyName": "small", "gpuCount": 2} if mixed and kind >= 4 else {}
    model = "bigscience/bloom-560m" if kind == 0 else "meta-llama/Llama-3.2-1B"
    return {
        "apiVersion": "taskoffer.dev/v1alpha1",
        "kind": "TaskOffer",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "taskID": name,
            "taskType": "InstructText",
            "model": {
                "name": model,
                "parameters": 1_000_000,
                "source": {"persistentVolumeClaim": {"claimName": "models", "path": "llama"}},
            },
            "dataset": {
                "type": "Instruct",
                "instruct": {"fieldInstruction": "instruction", "fieldOutput": "output"},
                "rows": 10_000,
                "source": {"persistentVolumeClaim": {"claimName": "data", "path": "rows.jsonl"}},
            },
            "output": {"persistentVolumeClaim": {"claimName": "outputs"}},
            "timeLimitSeconds": 200_000 if kind == 1 else 3600,
            "gpuCount": 1,
            **waits,
        },
    }


STATUS: Object = {
    "observedGeneration": 1,
    "score": "0.7250",
    "explanation": [
        {"type": "Term", "name": f"Term{i}", "value": "0.1225", "message": "0.35 x 0.35"} for i in range(7)
    ],
    "conditions": [
        {
            "type": "Admitted",
            "status": "False",
            "reason": "WaitingForCapacity",
            "message": "needs 1 x nvidia.com/gpu on one node; bench has the most free, 0 of 1000",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": 1,
        }
    ],
}
"""A status of the size that the operator writes."""


def run_quietly(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run a measurement. What is measured with is not to be measured: no garbage collector's pauses, a quick loop."""
    gc.freeze()
    gc.disable()
    return uvloop.run(work)


async def at_once(jobs: Iterable[Callable[[], Awaitable[Any]]], limit: int = CONCURRENCY) -> float:
    """Run jobs with bounded concurrency; return the seconds they took together."""
    source = iter(jobs)

    async def work() -> None:
        for job in source:
            await job()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(limit)))
    return time.perf_counter() - started


@dataclass
class Watcher:
    """When each offer was sent and when its verdict was seen, by this process's clock."""

    sent: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    status_writes: dict[str, int] = field(default_factory=dict)
    all_seen: asyncio.Event = field(default_factory=asyncio.Event)
    expected: int = 0

    async def run(self, kube: Kube, namespace: str) -> None:
        """Watch a namespace's offers, and go on where a watch was cut: the server does that to slow readers."""
        client, version = kube._client.rest_client, "0"
        while True:
            url = f"{kube._host}{OFFERS.path(namespace)}?watch=true&resourceVersion={version}"
            answer = await client.request("GET", url, headers={"Accept": "application/json"}, _request_timeout=3600)
            async for line in answer.response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise RuntimeError(f"the watch of the measuring client failed: {event['object']}")
                version = event["object"]["metadata"]["resourceVersion"]
                self._take(event["object"])

    def _take(self, seen: Object) -> None:
        name, status = seen["metadata"]["name"], seen.get("status") or {}
        if not status.get("conditions"):
            return
        self.status_writes[name] = self.status_writes.get(name, 0) + 1
        if name in self.seen:
            return
        self.seen[name] = time.perf_counter()
        reason = next(c["reason"] for c in status["conditions"] if c["type"] == "Admitted")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.seen) >= self.expected:
            self.all_seen.set()

    def latencies(self) -> list[float]:
        """Return milliseconds from creation to verdict."""
        return sorted((self.seen[n] - self.sent[n]) * 1000 for n in self.seen)


@dataclass(frozen=True)
class Raw:
    """What a bare client reaches, per second, and the CPU that both writes together cost, ms per offer."""

    creates: float
    patches: float
    both: float
    cpu_ms: dict[str, float]


async def raw_pace(kube: Kube, count: int, rate: float) -> list[float]:
    """Measure the floor of the paced figures: from a creation to the answer of the status patch right after it, ms.

    It is what an operator would need that decides in no time and whose watch delivers in no time.
    """
    taken, started = [], time.perf_counter()
    for i in range(count):
        await asyncio.sleep(max(0.0, started + i / rate - time.perf_counter()))
        before = time.perf_counter()
        await kube.create(OFFERS, "raw-c", offer("raw-c", f"r-{i}", 5))
        await kube.patch_status(OFFERS, "raw-c", f"r-{i}", {"status": STATUS})
        taken.append((time.perf_counter() - before) * 1000)
    await kube.request("DELETE", OFFERS.path("raw-c"), timeout=300)
    return sorted(taken)


async def raw_limit(kube: Kube, pids: Mapping[str, int | None], count: int) -> Raw:
    """Measure what the server takes from a bare client: creates, status patches, both one after another.

    The measuring watch is open here as well, since it costs the server something for every write.
    """

    async def create(ns: str, i: int) -> None:
        await kube.create(OFFERS, ns, offer(ns, f"r-{i}", 5))

    async def patch(ns: str, i: int) -> None:
        await kube.patch_status(OFFERS, ns, f"r-{i}", {"status": STATUS})

    async def both(ns: str, i: int) -> None:
        await create(ns, i)
        await patch(ns, i)

    watching = [asyncio.create_task(Watcher().run(kube, ns)) for ns in ("raw-a", "raw-b")]
    await asyncio.sleep(0.3)
    creates = await at_once([lambda i=i: create("raw-a", i) for i in range(count)])
    patches = await at_once([lambda i=i: patch("raw-a", i) for i in range(count)])
    before = cpu_of(pids)
    together = await at_once([lambda i=i: both("raw-b", i) for i in range(count)])
    cpu = {name: (seconds - before[name]) / count * 1000 for name, seconds in cpu_of(pids).items()}
    for task in watching:
        task.cancel()
    for ns in ("raw-a", "raw-b"):
        await kube.request("DELETE", OFFERS.path(ns), timeout=300)
    return Raw(count / creates, count / patches, count / together, cpu)


def cpu_of(pids: Mapping[str, int | None]) -> dict[str, float]:
    """Return the CPU time so far of each process, and of this one as the client."""
    return {**{name: cpu_seconds(pid) for name, pid in pids.items()}, "client": time.process_time()}


def cpu_seconds(pid: int | None) -> float:
    """Return the CPU time of a process so far."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of sorted values by nearest rank: the smallest that this share of them does not exceed."""
    # A product like 0.99 * 100 may come out a little above the whole number that it is.
    return values[max(0, math.ceil(share * len(values) - 1e-9) - 1)] if values else float("nan")
