"""Running jobs save, stop and go on later for offers of a higher priority, on a real API server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from operator_bench import Bench, condition

pytestmark = pytest.mark.usefixtures("operator")

PRIORITIES = ["benchmark", "tournament", "organic"]
QUEUE = {"priorities": PRIORITIES, "defaultPriority": "tournament"}
PREEMPTION = {
    "rules": [{"by": ["organic", "tournament"], "of": ["benchmark"]}],
    "minRunSeconds": 0,
    "resumeSeconds": 1,
}
# Without a prediction a job counts as taking all of its time, so that it could not be stopped without being late.
PREDICTING = {"gpuMemory": "80G", "duration": {"startSeconds": 1, "reserveSeconds": 0}}


def preempting(bench: Bench, gpus: int = 4, **fields: Any) -> str:
    """Give the bench a node and a policy under which benchmarks make room."""
    node = bench.node(gpus=gpus)
    bench.policy(queue=QUEUE, preemption={**PREEMPTION, **fields}, estimation=PREDICTING)
    return node


def stop_for(bench: Bench, name: str, gpus: int) -> str:
    """Have a benchmark that fills the node run, and an organic offer take it; return the benchmark's pod."""
    bench.admitted("bench", gpus, priority_class="benchmark", seconds=36_000, rows=1000)
    pod = bench.run("bench")
    bench.offer(name, gpus, priority_class="organic", seconds=600, rows=100)
    bench.decided(name, "WaitingForPreemption")
    bench.asked_to_stop(pod)
    return pod


def test_a_benchmark_stops_for_an_organic_offer_and_goes_on_after_it(bench: Bench) -> None:
    node = preempting(bench)
    pod = stop_for(bench, "urgent", 4)
    assert "bench (4) on " + node in condition(bench.get("urgent"), "Admitted")["message"]
    assert "urgent" in bench.event(bench.get("bench")["status"]["admission"]["jobName"], "Preempted")["message"]
    bench.end(pod, 143)
    bench.decided("urgent", "Admitted")
    job = bench.job_condition("bench", "Running", "Preempted")
    (first,) = job["status"]["attempts"]
    assert (first["outcome"], first["exitCode"]) == ("Preempted", 143)
    assert first["preemptedFor"]["name"] == "urgent"
    assert condition(bench.get("bench"), "Admitted")["reason"] == "Admitted"
    bench.booked(node, 4)
    bench.end(bench.run("urgent"))
    bench.finished("urgent", "Succeeded")
    bench.end(bench.run("bench", 2))
    bench.finished("bench", "Succeeded")
    assert [w["conditions"][0]["reason"] for w in bench.status_writes("urgent")][:2] == [
        "WaitingForPreemption",
        "Admitted",
    ]


def test_a_job_that_ends_by_itself_while_it_is_to_stop_has_succeeded(bench: Bench) -> None:
    preempting(bench)
    pod = stop_for(bench, "urgent", 4)
    bench.end(pod, 0)
    bench.finished("bench", "Succeeded")
    bench.decided("urgent", "Admitted")
    bench.bound_pod("urgent")


def test_a_stopped_job_goes_on_when_the_offer_that_it_stopped_for_is_gone(bench: Bench) -> None:
    preempting(bench)
    pod = stop_for(bench, "urgent", 4)
    bench.delete("urgent")
    bench.end(pod, 143)
    bench.end(bench.run("bench", 2))
    bench.finished("bench", "Succeeded")


def test_a_stopped_job_that_is_cancelled_ends(bench: Bench) -> None:
    preempting(bench)
    pod = stop_for(bench, "urgent", 4)
    bench.end(pod, 143)
    bench.decided("urgent", "Admitted")
    bench.job_condition("bench", "Running", "Preempted")
    bench.patch("bench", {"active": False})
    bench.finished("bench", "Cancelled")
    bench.bound_pod("urgent")


def test_only_as_many_jobs_stop_as_are_needed_and_none_more_often_than_the_policy_lets(bench: Bench) -> None:
    preempting(bench, maxPreemptions=1)
    for name in ("one", "two"):
        bench.admitted(name, 2, priority_class="benchmark", seconds=36_000, rows=1000)
    pods = {name: bench.run(name) for name in ("one", "two")}
    bench.offer("urgent", 2, priority_class="organic", seconds=600, rows=100)
    bench.decided("urgent", "WaitingForPreemption")
    message = condition(bench.get("urgent"), "Admitted")["message"]
    stops = "one" if "/one (2)" in message else "two"
    stays = "two" if stops == "one" else "one"
    bench.asked_to_stop(pods[stops])
    bench.end(pods[stops], 143)
    bench.end(bench.run("urgent"))
    bench.run(stops, 2)
    bench.offer("second", 2, priority_class="organic", seconds=600, rows=100)
    bench.decided("second", "WaitingForPreemption")
    assert f"/{stays} (2)" in condition(bench.get("second"), "Admitted")["message"]
    bench.asked_to_stop(pods[stays])
    bench.end(pods[stays], 143)
    bench.run("second")
    bench.offer("third", 2, priority_class="organic", seconds=600, rows=100)
    bench.decided("third", "WaitingForCapacity")


def test_by_value_a_job_stops_for_an_offer_that_would_be_gone_and_is_worth_more(bench: Bench) -> None:
    bench.node(gpus=4, labels={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"})
    bench.policy(preset="expected-value", preemption={"gainFactor": "1", "minRunSeconds": 0, "resumeSeconds": 60})
    task: dict[str, Any] = {"parameters": 8_030_000_000, "model": "meta-llama/Llama-3.1-8B", "hours": 10}
    bench.offer("cheap", **task, rows=300_000, spec={"gpuCount": 4, "value": "3"})
    bench.decided("cheap", "Admitted")
    pod = bench.run("cheap")
    soon = (datetime.now(UTC) + timedelta(minutes=40)).strftime("%Y-%m-%dT%H:%M:%SZ")
    bench.offer("dear", **task, rows=100_000, spec={"gpuCount": 4, "value": "50"}, expires_at=soon)
    bench.decided("dear", "WaitingForPreemption")
    bench.asked_to_stop(pod)
    # Something happens while it waits: the answer stays.
    bench.offer("beside", **task, rows=100_000, spec={"gpuCount": 1, "value": "1"})
    bench.decided("beside", "WaitingForCapacity")
    bench.end(pod, 143)
    bench.run("dear")
    told = [w["conditions"][0]["reason"] for w in bench.status_writes("dear")]
    assert told == ["WaitingForPreemption", "Admitted"]
    bench.job_condition("cheap", "Running", "Preempted")
