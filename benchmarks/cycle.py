"""The pure cycle: what deciding costs, without an API server, for long queues and many nodes.

A world is built from raw objects as the API server would hand them out: N offers for nodes of 8 GPUs each, under one
policy. Then the CPU time of this process is taken for gathering the snapshot and planning, one core, no IO:

* **list**, **read**: reducing the listed objects, and validating their specs (both come before a cycle);
* **cold**: offers have been read, nothing has been evaluated, and all GPUs are free;
* **settled**: the answers to all of them have been written and are taken in, so that they are put aside;
* **warm**: nothing has changed since;
* **1 % changed**: one offer in a hundred was replaced by a new one: taking that in, reading and deciding the new
  ones, writing their answers, and the cycle that puts them aside;
* **freed**: one running offer has ended, as small as the smallest that wait: as a rule one GPU.

Each size runs in a process of its own. What is compared between sizes is compared within one run.

    python benchmarks/cycle.py --offers 1000 10000 100000 --runs 3
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

from taskoffer import presets
from taskoffer.api.base import rfc3339
from taskoffer.decision.cycle import Decision, Plan, plan
from taskoffer.decision.verdict import Verdict
from taskoffer.reconcile.views import OfferState
from taskoffer.reconcile.world import World
from taskoffer.render.offers import decision_patch

Object = dict[str, Any]

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
GPUS_PER_NODE = 8
PRIORITIES = ["batch", "normal", "urgent"]
NAMESPACES = ["research", "support", "search", "ads", "interns"]
MODELS: list[tuple[str, int, int]] = [
    # Name, parameters, how often it is asked for.
    ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 6),
    ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, 6),
    ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 8),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, 8),
    ("google/gemma-2-2b-it", 2_614_341_888, 4),
    ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 8),
    ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552, 4),
    ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, 12),
    ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, 10),
    ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 14),
    ("codellama/CodeLlama-13b-hf", 13_015_864_320, 4),
    ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664, 6),
    ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352, 3),
    ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, 3),
    ("bigscience/bloom-560m", 559_214_592, 2),
]
"""Two cannot be taken: bloom is of no family of the policy, and 70 billion parameters fit no GPU whole."""
ESTIMATION: Object = {"gpuMemory": "80G", "memoryFraction": "0.90", "duration": {}}
LANES: list[Object] = [
    {
        "name": "small",
        "gpus": 300,
        "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}],
        "borrowFrom": ["medium"],
    },
    {
        "name": "medium",
        "gpus": 300,
        "rules": [{"sizeClasses": ["Medium"], "gpusPerTask": 2}],
        "borrowFrom": ["large"],
    },
    {"name": "large", "gpus": 200, "rules": [{"gpusPerTask": 4}]},
]
QUEUE: Object = {"priorities": PRIORITIES, "defaultPriority": "normal", "raiseAfterSeconds": 3600}
PREDICTING: Object = {"estimation": ESTIMATION, "queue": QUEUE, "gpuChoice": "FewestGpuHours"}
VARIANTS: dict[str, Object] = {
    "plain": {},
    "predicting": PREDICTING,
    "lanes": {**PREDICTING, "lanes": LANES, "namespaces": [{"name": "interns", "gpus": 16}]},
    "reserving": {**PREDICTING, "queue": {**QUEUE, "reserveFromGpus": 8}},
    "earliest-end": {**PREDICTING, "gpuChoice": "EarliestEnd"},
    "expected-value": {**PREDICTING, "gpuChoice": "MostValue", "scoring": {"expectedValue": {}}},
    "hurried": {**PREDICTING, "gpuChoice": "EarliestEnd"},
}
"""What the policy switches on, laid over the preset of the first strategy document without its lanes. ``hurried`` has
other offers as well: see :func:`hurry`."""


def policy_of(variant: str) -> Object:
    """Return a policy, as stored."""
    spec = dict(presets.load("strategy-8xh100")["spec"])
    for left_out in ("lanes", "estimation", "queue", "gpuChoice", "namespaces"):
        spec.pop(left_out, None)
    spec["nodeSelector"] = {}
    spec["resources"] = [{"name": "nvidia.com/gpu", "counts": [1, 2, 4, 8]}]
    gpus = {"Small": 1, "Medium": 2, "Large": 4, "XLarge": 8}
    spec["sizeClasses"] = [{**size, "gpus": gpus[size["name"]]} for size in spec["sizeClasses"]]
    spec["filters"] = {"maxTimeLimitSeconds": 72000, "onFull": "Wait"}
    spec |= VARIANTS[variant]
    metadata = {**_stored("bench", "policy"), "annotations": {"taskoffer.dev/is-default-policy": "true"}}
    return {"apiVersion": "taskoffer.dev/v1alpha1", "kind": "CapacityPolicy", "metadata": metadata, "spec": spec}


def node_of(name: str) -> Object:
    """Return a Ready node, as stored."""
    return {
        "metadata": {**_stored(name, name), "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {
            "allocatable": {"nvidia.com/gpu": str(GPUS_PER_NODE), "cpu": "128"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def offer_of(number: int) -> Object:
    """Return the offer of a number, as stored: always the same one, and no two alike."""
    chance = random.Random(number)  # noqa: S311 - not for secrets
    name = f"o-{number}"
    (base, parameters, _) = chance.choices(MODELS, weights=[often for *_, often in MODELS])[0]
    # A third of the tasks go on training what somebody has made of the base model.
    model = base if chance.random() < 0.67 else f"user{chance.randrange(5000)}/{base.split('/')[1]}-v{number % 7}"
    spec: Object = {
        "taskID": name if chance.random() > 0.01 else f"again-{chance.randrange(50)}",
        "taskType": "InstructText",
        "model": {"name": model, "source": {"persistentVolumeClaim": {"claimName": "models", "path": "base"}}},
        "dataset": {
            "type": "Instruct",
            "instruct": {"fieldInstruction": "instruction", "fieldOutput": "output"},
            "source": {"persistentVolumeClaim": {"claimName": "data", "path": f"{name}.jsonl"}},
        },
        "output": {"persistentVolumeClaim": {"claimName": "outputs"}},
        "timeLimitSeconds": chance.choice([1, 2, 4, 6, 8, 12, 18, 24]) * 3600 + chance.randrange(600),
    }
    if chance.random() < 0.5:
        spec["model"]["parameters"] = parameters
    if chance.random() < 0.5:
        spec["dataset"]["rows"] = int(chance.lognormvariate(9.5, 1.2)) + 1
    if chance.random() < 0.7:
        spec["priorityClassName"] = chance.choice(PRIORITIES)
    if chance.random() < 0.3:
        spec["deadline"] = rfc3339(NOW + timedelta(hours=chance.randrange(12, 96)))
    if chance.random() < 0.2:
        spec["gpuCount"] = chance.choice([1, 1, 2, 4, 8])
    if chance.random() < 0.02:
        spec["expiresAt"] = rfc3339(NOW + timedelta(hours=chance.randrange(1, 48)))
    if chance.random() < 0.01:
        spec["active"] = False
    created = NOW - timedelta(seconds=chance.randrange(7200))
    namespace = chance.choice(NAMESPACES)
    return {"metadata": {**_stored(name, f"uid-{number:07}", created), "namespace": namespace}, "spec": spec}


def hurry(raw: Object, number: int) -> Object:
    """Return an offer with a deadline that it misses on one GPU, as every other one does, and meets on more.

    One GPU of each node is free for them: what is free is too slow for all, and each could choose among the rest.
    """
    chance, spec = random.Random(number), raw["spec"]  # noqa: S311 - not for secrets
    for left_out in ("gpuCount", "expiresAt", "active"):
        spec.pop(left_out, None)
    (name, parameters) = next((name, size) for name, size, _ in MODELS if name.endswith("Llama-3.1-8B-Instruct"))
    spec |= {"taskID": f"o-{number}", "timeLimitSeconds": 71_000}
    spec["deadline"] = rfc3339(NOW + timedelta(hours=3, seconds=chance.randrange(3600)))
    spec["model"] = {**spec["model"], "name": name, "parameters": parameters}
    spec["dataset"]["rows"] = 200_000 + chance.randrange(100_000)
    return raw


def pod_of(node: str) -> Object:
    """Return somebody else's pod that leaves one GPU of a node free, as stored."""
    limits = {"nvidia.com/gpu": str(GPUS_PER_NODE - 1)}
    container = {"name": "other", "image": "other", "resources": {"limits": limits, "requests": limits}}
    return {
        "metadata": {**_stored(f"on-{node}", f"on-{node}"), "namespace": "others"},
        "spec": {"nodeName": node, "containers": [container]},
        "status": {"phase": "Running"},
    }


def _stored(name: str, uid: str, created: datetime = NOW) -> Object:
    return {
        "name": name,
        "uid": uid,
        "resourceVersion": "1",
        "generation": 1,
        "creationTimestamp": rfc3339(created),
    }


@dataclass
class Cluster:
    """A world, and the part of the API server that takes the answers."""

    variant: str
    nodes: int
    world: World = field(default_factory=World)
    version: int = 1
    now: datetime = NOW
    status: dict[str, Object] = field(default_factory=dict)

    def list_all(self, count: int) -> None:
        """Take in a list of every kind."""
        world = self.world
        names = [f"node-{number:03}" for number in range(self.nodes)]
        world.nodes.replace([node_of(name) for name in names], "1")
        world.pods.replace([pod_of(name) for name in names] if self.variant == "hurried" else [], "1")
        for empty in (world.batch_jobs, world.jobs):
            empty.replace([], "1")
        world.policies.replace([policy_of(self.variant)], "1")
        world.offers.replace((self.offer(number) for number in range(count)), "1")

    def offer(self, number: int) -> Object:
        """Return the offer of a number, as created."""
        return hurry(offer_of(number), number) if self.variant == "hurried" else offer_of(number)

    def read(self) -> None:
        """Read every offer."""
        for entry in self.world.undecided.values():
            entry.read_view()

    def cycle(self) -> Plan:
        """Decide."""
        return plan(self.world.snapshot(self.now))

    def write(self, decisions: tuple[Decision, ...]) -> list[Object]:
        """Send the answers. Return the objects with them, as the watch will report them."""
        objects = []
        for decision in decisions:
            self.world.send(decision.offer.uid, decision.answer.admission)
        for decision in decisions:
            number = int(decision.offer.key.name.removeprefix("o-"))
            self.status[decision.offer.uid] = decision_patch(decision, self.now)["status"]
            objects.append(self.stored(number))
        return objects

    def take_in(self, objects: list[Object]) -> None:
        """Take in what the watch reports of answers that were sent."""
        for raw in objects:
            self.world.offers.observe("MODIFIED", raw)
            self.world.in_flight.discard(raw["metadata"]["uid"])

    def stored(self, number: int) -> Object:
        """Return an offer at a new version."""
        self.version += 1
        raw = self.offer(number)
        raw["metadata"]["resourceVersion"] = str(self.version)
        return {**raw, "status": self.status.get(raw["metadata"]["uid"], {})}

    def settle(self) -> float:
        """Write all answers until nothing changes any more; return the time of the first cycle after the most."""
        made, first = self.cycle(), 0.0
        while made.decisions:
            self.take_in(self.write(made.decisions))
            seconds, made = timed(self.cycle)
            first = first or seconds
        return first


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of some work and its result."""
    started = time.process_time()
    made = work()
    return time.process_time() - started, made


def measure(variant: str, count: int, nodes: int, times: int) -> Iterator[tuple[str, float]]:
    """Yield each figure of one size, times in seconds and memory in MB."""
    # As the operator does it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(3_000, 5, 1_000)
    cluster = Cluster(variant, nodes)
    yield "list", timed(lambda: cluster.list_all(count))[0] - timed(lambda: [cluster.offer(n) for n in range(count)])[0]
    yield "read", timed(cluster.read)[0]
    seconds, made = timed(cluster.cycle)
    yield "cold", seconds
    verdicts = [decision.answer.verdict for decision in made.decisions]
    yield "admitted", verdicts.count(Verdict.ADMIT)
    yield "refused", verdicts.count(Verdict.REJECT)
    del made, verdicts
    yield "settled", cluster.settle()
    yield "groups", len(cluster.world.standing.groups)
    yield "rss", _resident()
    yield "warm", median(timed(cluster.cycle)[0] for _ in range(times))
    yield "changed", median(_changed(cluster, count, turn) for turn in range(times))
    # Nobody runs where nobody is in time.
    running = bool(cluster.world.by_state[OfferState.HOLDING])
    yield "freed", median(_freed(cluster) for _ in range(times)) if running else math.nan
    yield "peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _changed(cluster: Cluster, count: int, turn: int) -> float:
    """Replace one offer in a hundred and let the new ones be answered; return the time of it all."""
    share, world = max(1, count // 100), cluster.world
    pending = sorted(int(e.key.name.removeprefix("o-")) for e in world.by_state[OfferState.PENDING].values())
    gone = [cluster.stored(n) for n in random.Random(turn).sample(pending, share)]  # noqa: S311 - not for secrets
    new = [cluster.stored(count + turn * share + n) for n in range(share)]

    def decide() -> Plan:
        for raw in gone:
            world.offers.observe("DELETED", raw)
        for raw in new:
            world.offers.observe("ADDED", raw)
        return cluster.cycle()

    seconds, made = timed(decide)
    while made.decisions:
        answered = cluster.write(made.decisions)
        taken, _ = timed(lambda answered=answered: cluster.take_in(answered))
        again, made = timed(cluster.cycle)
        seconds += taken + again
    return seconds


def _freed(cluster: Cluster) -> float:
    """Let an offer end that holds as many GPUs as the smallest wait for; return the time until they are given away."""
    world = cluster.world
    least = min(shape.gpus for shape in world.standing.groups)
    holding = (e for e in world.by_state[OfferState.HOLDING].values() if e.booked[0].count == least)
    number = int(next(holding).key.name.removeprefix("o-"))
    raw = cluster.stored(number)
    moment = rfc3339(cluster.now)
    ended = {"type": "Finished", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": moment}
    raw["status"] = {**raw["status"], "conditions": [*raw["status"]["conditions"], ended]}

    def decide() -> Plan:
        world.offers.observe("MODIFIED", raw)
        return cluster.cycle()

    seconds, made = timed(decide)
    assert any(decision.answer.verdict is Verdict.ADMIT for decision in made.decisions), made
    cluster.take_in(cluster.write(made.decisions))
    cluster.settle()
    return seconds


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


# Many processes, one table

TIMES = ("list", "read", "cold", "settled", "warm", "changed", "freed")


def in_process(variant: str, count: int, nodes: int, times: int) -> dict[str, float]:
    """Measure one size in a process of its own."""
    command = [sys.executable, __file__, "--one", variant, "--offers", str(count), "--nodes", str(nodes)]
    done = subprocess.run([*command, "--times", str(times)], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def growth(runs: list[dict[int, dict[str, float]]], name: str, count: int, first: int) -> float:
    """Return by what factor a time grew more than n log n from the smallest size on: the median of the runs."""
    expected = count * math.log(count) / (first * math.log(first))
    return median(run[count][name] / run[first][name] / expected for run in runs)


def table(variant: str, sizes: list[int], runs: list[dict[int, dict[str, float]]]) -> Iterator[str]:
    """Yield the lines of a variant's table."""
    yield f"| {variant} | " + " | ".join(f"{count:,} offers" for count in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for name in TIMES:
        cells = []
        for count in sizes:
            milliseconds = median(run[count][name] for run in runs) * 1000
            more = f" ({growth(runs, name, count, sizes[0]):.2f})" if count != sizes[0] else ""
            cells.append(f"{milliseconds:,.1f}{more}" if milliseconds < 100 else f"{milliseconds:,.0f}{more}")
        yield f"| {name}, ms | " + " | ".join(cells) + " |"
    for name in ("admitted", "refused", "groups", "rss", "peak"):
        found = [f"{median(run[count][name] for run in runs):,.0f}" for count in sizes]
        yield f"| {name}{', MB' if name in ('rss', 'peak') else ''} | " + " | ".join(found) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offers", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="sizes of the queue")
    parser.add_argument("--nodes", type=int, default=100, help="nodes of 8 GPUs")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="policies")
    parser.add_argument("--runs", type=int, default=3, help="how often each size is measured, in new processes")
    parser.add_argument("--times", type=int, default=5, help="how often each small change is made within a run")
    parser.add_argument("--one", choices=list(VARIANTS), help="measure one size in this process and print JSON")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(dict(measure(options.one, options.offers[0], options.nodes, options.times))))
        return
    for variant in options.variants:
        runs = [
            {count: in_process(variant, count, options.nodes, options.times) for count in options.offers}
            for _ in range(options.runs)
        ]
        print("\n".join(table(variant, options.offers, runs)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
