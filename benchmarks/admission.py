"""How many offers per second are decided, beside what the API server can take at all.

Creates N offers at full speed against a real API server and reports, in the same run:

* the raw limit: creates/s, status patches/s and both together that a bare async client reaches with the same bodies;
* the operator's decided offers/s (a mix of admitted, waiting and rejected ones), and the ratio to "both together";
* p50 and p99 from creation to decision by the client's clock, in the burst and at a paced rate, once with the mix of
  the burst and once with every offer admitted that can be;
* writes per offer by kind, and the operator's peak memory.

    python benchmarks/admission.py --offers 5000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bare_client import Watcher, at_once, cpu_of, offer, quantile, raw_limit, raw_pace, run_quietly
from cpu_shares import Sampler

from taskoffer import presets
from taskoffer.adapters.kube import OFFERS, POLICIES, Kube
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.install import install, operator_kubeconfig
from taskoffer_lab.local_provider import LocalProvider
from taskoffer_lab.spec import ClusterSpec

WARM = 10
"""Offers that are decided before anything is measured."""
PORT = 18099


async def decided(
    operator: Operator, kube: Kube, namespace: str, count: int, rate: float | None, *, mixed: bool = False
) -> tuple[Watcher, float]:
    """Create offers, at full speed or paced, and wait until each has a verdict. Return the seconds it took."""
    watcher = Watcher(expected=count)
    watching = asyncio.create_task(watcher.run(kube, namespace))
    await asyncio.sleep(0.3)

    async def create(i: int) -> None:
        name = f"o-{i}"
        watcher.sent[name] = time.perf_counter()
        await kube.create(OFFERS, namespace, offer(namespace, name, i % 10, mixed=mixed))

    started = time.perf_counter()
    if rate is None:
        await at_once([lambda i=i: create(i) for i in range(count)])
    else:
        for i in range(count):
            await asyncio.sleep(max(0.0, started + i / rate - time.perf_counter()))
            await create(i)
    async with asyncio.timeout(600):
        while not watcher.all_seen.is_set():
            operator.check()
            if watching.done():
                watching.result()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watcher.all_seen.wait(), 1)
    took = max(watcher.seen.values()) - started
    watching.cancel()
    return watcher, took


class Operator:
    """The operator as a process of its own under its ServiceAccount."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "taskoffer", "run", "--kubeconfig", str(kubeconfig), "--port", str(PORT)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def check(self) -> None:
        """Fail when it has ended."""
        if self.process.poll() is not None:
            sys.exit(f"the operator ended with {self.process.returncode}; its log is in {self._log.name}")

    def metrics(self) -> str:
        """Scrape it."""
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    async def leading(self) -> None:
        """Wait until it leads."""
        async with asyncio.timeout(60):
            while True:
                try:
                    if re.search(r"^taskoffer_leader 1", self.metrics(), re.M):
                        return
                except OSError:
                    pass
                await asyncio.sleep(0.1)

    def memory(self) -> tuple[float, float]:
        """Return resident memory and its peak, in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {k: int(v) / 1024 for k, v in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M)}
        return found["VmRSS"], found["VmHWM"]

    def stop(self) -> int:
        """End it with SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._log.close()
        return code


async def prepare(cluster: Cluster, kube: Kube, gpus: int, namespaces: Iterable[str]) -> None:
    """Make namespaces, nodes without a kubelet (a large one and one with a single GPU), and a policy for each."""
    for name in namespaces:
        cluster.kubectl("create", "namespace", name)
    for name in ("bench", "small"):
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"bench": name}}}
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(node))
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "made for the benchmark"}
    for name, count in (("bench", gpus), ("small", 1)):
        sizes = {"nvidia.com/gpu": str(count), "cpu": "1000", "memory": "9000Gi", "pods": "100000"}
        status = {"status": {"allocatable": sizes, "capacity": sizes, "conditions": [ready]}}
        cluster.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps(status))
    policy = presets.load("lab")
    policy["spec"]["filters"].pop("maxConcurrentJobs")
    policy["spec"]["nodeSelector"] = {"matchLabels": {"bench": "bench"}}
    await kube.create(POLICIES, None, policy)
    policy["metadata"] = {"name": "small"}
    policy["spec"]["nodeSelector"] = {"matchLabels": {"bench": "small"}}
    await kube.create(POLICIES, None, policy)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole benchmark once."""
    spec = ClusterSpec(name=f"bench-{os.getpid()}", node_monitor_grace_seconds=3600)
    with LocalProvider().up(spec) as cluster, tempfile.TemporaryDirectory() as scratch:
        kube = await Kube.connect(cluster.kubeconfig, timeout=60)
        install(cluster)
        count, paced = args.offers, round(args.rate * args.seconds)
        # A fifth of the burst can be admitted. Of the paced offers one fifth is in the one phase, four in the other.
        await prepare(
            cluster, kube, count // 5 + paced + WARM, ("raw-a", "raw-b", "raw-c", "warm", "mixed", "paced", "burst")
        )
        if not args.controllers:
            # Without them Jobs make no pods: the figures are the operator's and the API server's alone.
            cluster.process("kube-controller-manager").stop()
            cluster.process("kube-scheduler").stop()
        server = {name: cluster.process(name).pid for name in ("kube-apiserver", "etcd")}
        raw = [await raw_limit(kube, server, args.raw or count)]
        floor = await raw_pace(kube, paced, args.rate)
        operator = Operator(operator_kubeconfig(cluster, Path(scratch)), Path(args.log))
        sampler = None
        try:
            await operator.leading()
            quiet, _ = operator.memory()
            # The server compiles the rules of a kind when it first meets an object of it.
            await decided(operator, kube, "warm", WARM, args.rate, mixed=True)
            mix, _ = await decided(operator, kube, "mixed", paced, args.rate, mixed=True)
            slow, _ = await decided(operator, kube, "paced", paced, args.rate)
            pids = {"operator": operator.process.pid, **server}
            sampler = Sampler(operator.process.pid, args.stacks) if args.stacks else None
            before = cpu_of(pids)
            burst, took = await decided(operator, kube, "burst", count, None)
            cpu = {name: (seconds - before[name]) / count * 1000 for name, seconds in cpu_of(pids).items()}
            whose = sampler.stop() if sampler else {}
            await settle(operator, "TrainingJob", sum(n for r, n in burst.reasons.items() if r == "Admitted"))
            full, peak = operator.memory()
            metrics = operator.metrics()
        finally:
            if sampler is not None:
                sampler.kill()
            code = operator.stop()
        # Once more, because the speed of a shared machine drifts: the limit is the mean of before and after.
        raw.append(await raw_limit(kube, server, args.raw or count))
        await kube.close()
    return {
        "raw": raw,
        "floor": floor,
        "decided": count / took,
        "ratio": count / took / statistics.mean(r.both for r in raw),
        "burst": burst,
        "mixed": mix,
        "paced": slow,
        "cpu_ms": cpu,
        "whose": whose,
        "rss": (quiet, full, peak),
        "metrics": metrics,
        "exit": code,
    }


async def settle(operator: Operator, kind: str, wanted: int) -> None:
    """Wait until the operator has created this many objects of a kind."""
    async with asyncio.timeout(300):
        while writes(operator.metrics()).get(kind, 0) < wanted:  # noqa: ASYNC110 - another process counts
            await asyncio.sleep(0.5)


def writes(metrics: str) -> dict[str, int]:
    """Return the finished writes by kind."""
    found = re.findall(r'^taskoffer_api_writes_total\{kind="([^"]+)",outcome="done"\} ([\d.e+]+)', metrics, re.M)
    return {kind: int(float(value)) for kind, value in found}


def latency(run: dict[str, Any], *, phase: str, share: int) -> float:
    """Return a percentile of a phase, from creation to decision, in ms."""
    return quantile(run[phase].latencies(), share / 100)


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    """Write the table."""
    mid = sorted(runs, key=lambda r: r["ratio"])[len(runs) // 2]
    burst, paced = mid["burst"].latencies(), mid["paced"].latencies()
    total = args.offers + 2 * len(paced) + WARM
    kinds = writes(mid["metrics"])
    whose = ", ".join(f"{name} {share:.0%}" for name, share in mid["whose"].items())
    twice = sum(1 for n in mid["burst"].status_writes.values() if n > 1)

    def spread(pick: Callable[[dict[str, Any]], float], form: str = "{:.0f}") -> str:
        values = [pick(r) for r in runs]
        low_high = f" ({form.format(min(values))} – {form.format(max(values))})" if len(runs) > 1 else ""
        return form.format(statistics.median(values)) + low_high

    rows = [
        ("raw creates/s", spread(lambda r: statistics.mean(x.creates for x in r["raw"]))),
        ("raw status patches/s", spread(lambda r: statistics.mean(x.patches for x in r["raw"]))),
        ("raw both together, offers/s", spread(lambda r: statistics.mean(x.both for x in r["raw"]))),
        ("**decided offers/s**", spread(lambda r: r["decided"])),
        ("**ratio to the raw limit**", spread(lambda r: r["ratio"] * 100, "{:.0f} %")),
        ("burst: creation to decision p50 / p99, ms", f"{quantile(burst, 0.5):.0f} / {quantile(burst, 0.99):.0f}"),
        *(
            (
                f"{args.rate:g}/s, bare client, create and patch: p{share}, ms",
                spread(lambda r, share=share: quantile(r["floor"], share / 100), "{:.1f}"),
            )
            for share in (50, 99)
        ),
        *(
            (f"{args.rate:g}/s, {what}: p{share}, ms", spread(partial(latency, phase=phase, share=share), "{:.1f}"))
            for phase, what in (("mixed", "a fifth admitted"), ("paced", "four fifths admitted"))
            for share in (50, 99)
        ),
        ("status writes per decided offer", f"{kinds.get('TaskOffer.status', 0) / total:.3f}"),
        ("offers with more than one status write", str(twice)),
        (
            "other writes per offer",
            ", ".join(f"{k} {v / total:.2f}" for k, v in sorted(kinds.items()) if k != "TaskOffer.status"),
        ),
        ("CPU per offer in the burst, ms", ", ".join(f"{k} {v:.2f}" for k, v in mid["cpu_ms"].items())),
        ("CPU per offer of the raw limit, ms", ", ".join(f"{k} {v:.2f}" for k, v in mid["raw"][-1].cpu_ms.items())),
        *([("of the operator's CPU", whose)] if whose else []),
        ("operator memory at rest / after, MB", f"{mid['rss'][0]:.0f} / {mid['rss'][1]:.0f}"),
        ("operator peak memory, MB", spread(lambda r: r["rss"][2])),
        ("verdicts of the burst", ", ".join(f"{k} {v}" for k, v in sorted(mid["burst"].reasons.items()))),
    ]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    head = f"{args.offers} offers in the burst, {len(runs)} run(s), {machine}"
    lines = [head, "", "| figure | median (range) |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offers", type=int, default=5000, help="offers in the burst (default: %(default)s)")
    parser.add_argument("--raw", type=int, help="objects for each raw figure (default: as many as offers)")
    parser.add_argument("--rate", type=float, default=10, help="paced offers per second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the paced part (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="repeat on fresh clusters (default: %(default)s)")
    parser.add_argument("--controllers", action="store_true", help="leave controller-manager and scheduler running")
    parser.add_argument("--log", default=os.devnull, help="file for the operator's log")
    parser.add_argument("--stacks", type=Path, help="sample the operator in the burst with py-spy, into this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    runs = []
    for number in range(args.runs):
        print(f"run {number + 1} of {args.runs} …", file=sys.stderr, flush=True)
        runs.append(run_quietly(measure(args)))
    print(report(args, runs))
    if args.json:
        figures = [
            {"raw": [asdict(x) for x in r["raw"]], **{k: r[k] for k in ("decided", "ratio", "cpu_ms", "rss")}}
            for r in runs
        ]
        args.json.write_text(json.dumps(figures, indent=2))
    return 0 if all(r["exit"] == 0 for r in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
