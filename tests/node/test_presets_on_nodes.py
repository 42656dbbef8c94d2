"""Presets and changes of policy on a real node, whose kubelet runs the pods and hands out the GPUs.

The same sentences are tested with simulated nodes in `tests/apiserver`, and more of them. What only a real node can
show is shown here: that the containers run on, and that no two of them hold the same GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from fake_node import GPU
from node_bench import NodeBench
from operator_bench import GROUP
from operator_process import OperatorProcess
from pod_history import disturbed, overbooked
from stated_answers import FOLDERS, answers
from taskoffer import presets
from taskoffer_lab.local_provider import LocalCluster

BILLION = 10**9
TINY = 500_000
PRIORITY_CLASSES = "/apis/scheduling.k8s.io/v1/priorityclasses"

Object = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def priority_class(node_cluster: LocalCluster) -> Iterator[None]:
    """The class that a market example names; a policy without priorities of its own leaves it to the cluster."""
    body = {"metadata": {"name": "organic"}, "value": 1, "preemptionPolicy": "Never"}
    node_cluster.api.request("POST", PRIORITY_CLASSES, body)
    yield
    node_cluster.api.request("DELETE", f"{PRIORITY_CLASSES}/organic")


def offer(bench: NodeBench, name: str, parameters: int, hours: float = 6) -> None:
    """Create an offer that names no policy, of a Llama of this size."""
    spec = {"policyName": None}
    bench.create(bench.make_offer(name, model="x/llama", parameters=parameters, hours=hours, spec=spec))


def running(bench: NodeBench, name: str, gpus: int) -> Object:
    """Wait until an offer is admitted under the present policy with so many GPUs, and its pod runs; return the pod."""
    made = bench.decided(name, "Admitted")["status"]["admission"]
    policy = bench.get_policy()["metadata"]
    assert made["policyRef"] == {key: policy[key] for key in ("name", "uid", "generation")}
    assert [a["count"] for a in made["assignments"]] == [gpus]
    return bench.pod(bench.run(name))


def check_node(bench: NodeBench, pods: Iterable[Object]) -> None:
    """Check that pods run as they did when they were read, and that nothing was ever booked or handed out twice."""
    assert bench.audit.check() == []
    assert overbooked(bench.audit.events) == []
    assert disturbed(bench.audit.events, pods) == []
    held = {pod["metadata"]["name"]: bench.gpus(pod["metadata"]["name"]) for pod in pods}
    asked = {p["metadata"]["name"]: int(p["spec"]["containers"][0]["resources"]["limits"][GPU]) for p in pods}
    assert {name: len(uuids) for name, uuids in held.items()} == asked
    handed_out = [uuid for uuids in held.values() for uuid in uuids]
    assert len(set(handed_out)) == len(handed_out)


def end(bench: NodeBench, *names: str) -> None:
    """Let the containers of offers end well, and wait until the offers have."""
    for name in names:
        bench.end(bench.bound_pod(name))
    for name in names:
        bench.finished(name, "Succeeded")


@pytest.mark.parametrize("preset", presets.names())
def test_the_examples_get_the_answers_that_the_page_states_and_the_admitted_ones_run(
    bench: NodeBench, preset: str
) -> None:
    bench.preset(preset)
    for folder in FOLDERS:
        bench.empty()
        found = answers(bench, preset, folder)
        assert found.given == found.stated
        check_node(bench, [bench.pod(bench.run(offer["metadata"]["name"])) for offer in found.admitted])


TAKES = {
    "balanced-4": 2,
    "expected-value": 1,
    "lab": 1,
    "market-table": 1,
    "sound": 1,
    "strategy-8xh100": 2,
    "strategy-maximum-accuracy": None,
}
"""The GPUs that each preset gives to a tiny model, one after the other; for the four of the last is no room."""


def test_each_preset_replaces_the_one_before_it_under_the_same_name_while_that_ones_job_runs(bench: NodeBench) -> None:
    pods: dict[str, Object] = {}
    assert sorted(TAKES) == presets.names()
    for preset, gpus in TAKES.items():
        bench.apply_preset(preset)
        offer(bench, preset, TINY)
        if gpus is None:
            bench.decided(preset, "CapacityFull")
        else:
            pods[preset] = running(bench, preset, gpus)
    bench.booked(bench.node_name, sum(gpus or 0 for gpus in TAKES.values()))
    check_node(bench, pods.values())
    end(bench, *pods)
    bench.booked(bench.node_name, 0)


def test_jobs_run_on_while_their_policy_is_tightened_and_deleted_and_another_one_follows(
    bench: NodeBench, operator: OperatorProcess
) -> None:
    bench.apply_preset("market-table")
    pods = []
    for name, billions, gpus in (("four", 14, 4), ("two", 8, 2), ("one", 1, 1)):
        offer(bench, name, billions * BILLION)
        pods.append(running(bench, name, gpus))
    # One GPU is left, and neither of these can do with it.
    offer(bench, "long", 8 * BILLION, hours=30)
    offer(bench, "short", 8 * BILLION, hours=1)
    for name in ("long", "short"):
        bench.decided(name, "WaitingForCapacity")

    # What runs is forbidden in every way; who waits is decided anew.
    bench.patch_policy({"filters": {"minScore": "0.1", "maxTimeLimitSeconds": 7200, "maxConcurrentJobs": 1}})
    bench.decided("long", "TimeLimitTooLong")
    bench.decided("short", "WaitingForJobSlot")
    check_node(bench, pods)
    path = f"{GROUP}/capacitypolicies/{bench.policy_name}"
    bench.api.request("DELETE", path)
    bench.gone(path)
    bench.decided("short", "PolicyNotFound")
    check_node(bench, pods)

    # A restart finds the jobs of a policy that is no more, and books them all the same under the next one.
    with bench.audit.excused():
        assert operator.terminate() == 0
        operator.start()
    bench.apply_preset("strategy-8xh100")
    bench.booked(bench.node_name, 7)
    bench.decided("short", "WaitingForCapacity")
    check_node(bench, pods)
    end(bench, "one")
    pods[-1:] = [running(bench, "short", 2)]
    bench.booked(bench.node_name, 8)
    check_node(bench, pods)
    end(bench, "four", "two", "short")
    bench.booked(bench.node_name, 0)
