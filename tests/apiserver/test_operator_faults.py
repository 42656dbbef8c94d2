"""Faults: replicas that are killed, stopped, paused or interrupted; whatever happens, the ledger stays true."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from builders import make_admission
from fake_node import Object
from operator_bench import Bench, condition
from operator_process import LEASE, OperatorProcess, until_its_end
from taskoffer_lab.process_table import wait_until

TAKEOVER_SECONDS = 30.0
"""The lease's 9 s and a write timeout of 4 s, and time for a slow machine; `make chaos` holds it to 15."""
UNRELEASED_SECONDS = 13.0
"""What a lease costs whose holder has not given it up, on the quickest machine: those 9 s and 4 s."""


@pytest.fixture
def replica(bench: Bench, operator_directory: Path) -> Iterator[OperatorProcess]:
    """One replica that is not started yet; the test may end it as it likes."""
    yield from until_its_end(OperatorProcess(bench.cluster, operator_directory))


@contextmanager
def down(bench: Bench) -> Iterator[None]:
    """Mark a time in which nobody leads, so that nobody is late."""
    with bench.audit.excused():
        yield


def holder(bench: Bench) -> str:
    """Return who holds the lease."""
    return str(bench.api.request("GET", LEASE)["spec"].get("holderIdentity") or "")


def started(bench: Bench, replica: OperatorProcess) -> OperatorProcess:
    """Start a replica and wait until it leads."""
    with down(bench):
        return replica.start()


def interrupted_admission(bench: Bench, name: str, *, node: str, gpus: int = 1, **changes: Any) -> Object:
    """Leave an offer as a replica leaves it that dies right after it has admitted it."""
    offer = bench.offer(name, gpus)
    policy = bench.get_policy()
    made = make_admission(
        job=f"{name}-{offer['metadata']['uid'][:8]}",
        node=node,
        gpus=gpus,
        policy=bench.policy_name,
        policy_uid=policy["metadata"]["uid"],
        decided_at=changes.pop("decided_at", "2026-01-31T12:00:00Z"),
        generation=changes.pop("generation", policy["metadata"]["generation"]),
    )
    admitted = {"type": "Admitted", "status": "True", "reason": "Admitted", "message": "by another replica"}
    stamped = {**admitted, "lastTransitionTime": "2026-01-31T12:00:00Z", "observedGeneration": 1}
    bench.patch_status("taskoffers", name, {"observedGeneration": 1, "conditions": [stamped], "admission": made})
    return bench.get(name)


def test_a_replica_that_is_asked_to_stop_releases_its_lease_and_exits_with_0(
    bench: Bench, replica: OperatorProcess
) -> None:
    started(bench, replica)
    assert holder(bench) != ""
    assert replica.terminate() == 0
    assert holder(bench) == ""


def test_a_released_lease_is_taken_at_once(bench: Bench, replica: OperatorProcess) -> None:
    bench.node()
    started(bench, replica)
    bench.policy()
    with down(bench):
        assert replica.terminate() == 0
        replica.start(leading=False)
        wait_until(lambda: replica.metric("taskoffer_leader") is not None, "its port answers", 40)
        assert replica.wait_leading(40) < UNRELEASED_SECONDS
    bench.admitted("after")


def test_of_two_replicas_one_leads_and_the_other_takes_over_when_it_is_killed(
    bench: Bench, replica: OperatorProcess, operator_directory: Path
) -> None:
    bench.node("a", gpus=4)
    with OperatorProcess(bench.cluster, operator_directory) as leader:
        replica.start(leading=False)
        bench.policy()
        bench.admitted("before", 4)
        pod = bench.run("before")
        bench.offer("waits", 4)
        bench.decided("waits", "WaitingForCapacity")
        wait_until(lambda: replica.metric("taskoffer_leader") == 0, "the other one stands by", 40)
        assert not replica.metric("taskoffer_api_writes_total")
        with down(bench):
            leader.kill()
            assert replica.wait_leading() <= TAKEOVER_SECONDS
        bench.end(pod)
        bench.finished("before", "Succeeded")
        bench.decided("waits", "Admitted")
        bench.bound_pod("waits")


def test_a_leader_that_was_paused_for_too_long_leaves_without_a_word(
    bench: Bench, replica: OperatorProcess, operator_directory: Path
) -> None:
    bench.node("a", gpus=4)
    with OperatorProcess(bench.cluster, operator_directory) as leader:
        bench.policy()
        bench.admitted("before", 2)
        replica.start(leading=False)
        with down(bench):
            os.kill(leader.pid, signal.SIGSTOP)
            # It has something to decide as soon as it wakes up, as has the one that leads by then.
            bench.offer("meanwhile", 4)
            bench.offer("small", 2)
            replica.wait_leading()
            bench.decided("small", "Admitted")
            os.kill(leader.pid, signal.SIGCONT)
            assert leader.wait_ended(60) == 1
        assert "leadership lost" in leader.log()
        bench.decided("meanwhile", "WaitingForCapacity")
        assert len(bench.status_writes("small")) == 1
        assert len(bench.status_writes("meanwhile")) == 1
        bench.bound_pod("small")


def test_an_admission_whose_job_was_not_created_any_more_is_carried_out_after_a_restart(
    bench: Bench, replica: OperatorProcess
) -> None:
    node = bench.node()
    started(bench, replica)
    bench.policy()
    with down(bench):
        replica.kill(forget_lease=True)
        offer = interrupted_admission(bench, "half-done", node=node, gpus=4)
        replica.start()
    bench.run("half-done")
    assert bench.get("half-done")["status"]["admission"] == offer["status"]["admission"]
    assert len(bench.batch_jobs(offer)) == 1


def test_a_job_that_was_not_created_any_more_is_created_after_a_restart(bench: Bench, replica: OperatorProcess) -> None:
    bench.node()
    started(bench, replica)
    bench.policy()
    offer = bench.admitted("half-done")
    pod = bench.bound_pod("half-done")
    with down(bench):
        replica.kill(forget_lease=True)
        bench.api.request("DELETE", bench.path("jobs", bench.batch_jobs(offer)[0]["metadata"]["name"], api=BATCH), GONE)
        bench.asked_to_stop(pod)
        bench.kubelet.release(bench.namespace, pod)
        bench.gone(bench.path("pods", pod, api="/api/v1"))
        replica.start()
    bench.run("half-done")


BATCH = "/apis/batch/v1"
GONE = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}


def test_an_admission_under_a_policy_that_has_changed_is_taken_back_and_decided_again(
    bench: Bench, replica: OperatorProcess
) -> None:
    node = bench.node()
    started(bench, replica)
    bench.policy()
    with down(bench):
        replica.kill(forget_lease=True)
        interrupted_admission(bench, "outdated", node=node)
        bench.patch_policy({"filters": {"maxTimeLimitSeconds": 71_000}})
        replica.start()
    told = bench.event("outdated", "PolicyChanged")
    assert f"policy {bench.policy_name} is no longer at generation 1" in told["message"]
    offer = bench.until("outdated", lambda o: condition(o, "Evicted") != {} and "admission" in o["status"], "again")
    assert condition(offer, "Evicted")["status"] == "False", "it was evicted and is admitted again"
    assert offer["status"]["admission"]["policyRef"]["generation"] == 2
    bench.bound_pod("outdated")


def test_of_too_many_admissions_the_newest_that_has_not_started_is_taken_back(
    bench: Bench, replica: OperatorProcess
) -> None:
    node = bench.node(gpus=4)
    started(bench, replica)
    bench.policy()
    with down(bench):
        replica.kill(forget_lease=True)
        # As an old leader could leave it whose last write came in after the new one had decided.
        interrupted_admission(bench, "older", node=node, gpus=4, decided_at="2026-01-31T12:00:00Z")
        interrupted_admission(bench, "newer", node=node, gpus=4, decided_at="2026-01-31T12:00:01Z")
        replica.start()
    bench.bound_pod("older")
    offer = bench.decided("newer", "WaitingForCapacity")
    assert condition(offer, "Evicted")["reason"] == "Overbooked"
    assert "admission" not in offer["status"]


def test_a_deletion_that_nobody_saw_frees_the_gpus_after_a_restart(bench: Bench, replica: OperatorProcess) -> None:
    bench.node(gpus=4)
    started(bench, replica)
    bench.policy()
    bench.admitted("first", 4)
    pod = bench.run("first")
    bench.offer("second", 4)
    bench.decided("second", "WaitingForCapacity")
    with down(bench):
        replica.kill(forget_lease=True)
        bench.delete("first")
        bench.asked_to_stop(pod)
        bench.end(pod, 143)
        bench.gone(bench.path("pods", pod, api="/api/v1"))
        replica.start()
    bench.decided("second", "Admitted")


def test_a_restart_does_not_see_free_gpus_where_a_pod_still_runs(bench: Bench, replica: OperatorProcess) -> None:
    node = bench.node(gpus=4)
    started(bench, replica)
    bench.policy()
    bench.admitted("first", 4)
    pod = bench.run("first")
    with down(bench):
        replica.kill(forget_lease=True)
        bench.delete("first")
        bench.asked_to_stop(pod)
        bench.offer("second", 4)
        replica.start()
    bench.decided("second", "WaitingForCapacity")
    bench.booked(node, 4)
    bench.end(pod, 143)
    bench.decided("second", "Admitted")


def test_a_job_that_was_to_make_room_does_so_after_a_restart_and_the_offer_gets_its_gpus(
    bench: Bench, replica: OperatorProcess
) -> None:
    bench.node(gpus=4)
    started(bench, replica)
    rules = {"rules": [{"by": ["high"], "of": ["low"]}], "minRunSeconds": 0, "resumeSeconds": 1}
    predicting = {"gpuMemory": "80G", "duration": {"startSeconds": 1, "reserveSeconds": 0}}
    bench.policy(queue={"priorities": ["low", "high"]}, preemption=rules, estimation=predicting)
    bench.admitted("first", 4, seconds=36_000, rows=1000, priority_class="low")
    pod = bench.run("first")
    job = bench.get("first")["status"]["admission"]["jobName"]
    with down(bench):
        replica.kill(forget_lease=True)
        urgent = bench.offer("urgent", 4, seconds=600, rows=100, priority_class="high")
        # As a replica leaves it that dies right after it has written for whom the job is to stop.
        (attempt,) = bench.training_job("first")["status"]["attempts"]
        whom = {"namespace": bench.namespace, "name": "urgent", "uid": urgent["metadata"]["uid"]}
        asked = {**attempt, "preemptedFor": {**whom, "askedAt": attempt["startedAt"]}}
        bench.patch_status("trainingjobs", job, {"attempts": [asked]})
        replica.start()
    bench.asked_to_stop(pod)
    replica.kill(forget_lease=True)
    with down(bench):
        bench.end(pod, 143)
        bench.gone(bench.path("pods", pod, api="/api/v1"))
        replica.start()
    bench.end(bench.run("urgent"))
    bench.end(bench.run("first", 2))
    bench.finished("first", "Succeeded")
