"""Offers and TrainingJobs that are deleted while a pod takes its time to end: nothing is given away before it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from auditor_history import POD, in_order, job_is_over, labels, offer_uid_of, pod_is_over
from campaign import Campaign
from fake_node import STOPPED, Object
from operator_bench import SECONDS, UID_LABEL, Bench, condition
from proxied_fixtures import Proxied, proxied, proxied_module
from taskoffer_lab.process_table import wait_until

__all__ = ["proxied", "proxied_module"]

GRACE_SECONDS = 120
GPUS = 4
HOWS = ("Background", "Foreground", "Orphan")


@pytest.fixture
def full(bench: Bench, proxied: Proxied) -> Iterator[Bench]:
    """The bench with one node, and a policy that gives pods two minutes to end."""
    bench.node(gpus=GPUS)
    bench.policy(podTemplate={"terminationGraceSeconds": GRACE_SECONDS})
    yield bench
    for pod in bench.api.request("GET", bench.path("pods", api="/api/v1"))["items"]:
        bench.kubelet.release(bench.namespace, pod["metadata"]["name"])


def delete(bench: Bench, path: str, how: str) -> None:
    """Delete an object in one of the three ways."""
    bench.api.request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": how})


def running(bench: Bench, number: int, campaign: Campaign) -> tuple[Object, str, int]:
    """Let an offer run on all GPUs, and another one wait for them; return the first, its pod and its attempt."""
    name = f"first-{number}"
    offer = bench.admitted(name, GPUS)
    attempt = 1
    if campaign.random.random() < 0.3:
        bench.end(bench.run(name), 1)
        attempt = 2
    pod = bench.run(name, attempt)
    bench.offer(f"second-{number}", GPUS)
    bench.decided(f"second-{number}", "WaitingForCapacity")
    return offer, pod, attempt


def nothing_is_given_away(bench: Bench, number: int) -> None:
    """The GPUs stay booked, however often the operator looks again."""
    bench.booked(bench.nodes[0], GPUS)
    bench.offer(f"third-{number}", GPUS, model="microsoft/phi-4")
    bench.decided(f"third-{number}", "WaitingForCapacity")
    assert condition(bench.get(f"second-{number}"), "Admitted")["reason"] == "WaitingForCapacity"


def drained(bench: Bench, number: int) -> None:
    """What waited gets the GPUs, one after the other, and in the end all of them are free."""
    for name in (f"second-{number}", f"third-{number}"):
        bench.decided(name, "Admitted")
        bench.end(bench.run(name))
        bench.finished(name, "Succeeded")
    bench.booked(bench.nodes[0], 0)


def pods_at_once(bench: Bench, offer: Object) -> int:
    """Return how many pods of an offer were there at once, as the auditor's watch saw it."""
    alive: set[str] = set()
    most = 0
    for event in in_order(bench.audit.events):
        if event.kind != POD or offer_uid_of(POD, event.object) != offer["metadata"]["uid"]:
            continue
        if event.type == "DELETED" or pod_is_over(event.object):
            alive.discard(event.uid)
        else:
            alive.add(event.uid)
        most = max(most, len(alive))
    return most


def attempts_of(bench: Bench, offer: Object) -> list[str]:
    """Return the attempt of every pod that an offer ever had."""
    pods = {e.uid: e.object for e in bench.audit.events if e.kind == POD}
    mine = [pod for pod in pods.values() if labels(pod).get(UID_LABEL) == offer["metadata"]["uid"]]
    return sorted(labels(pod)["taskoffer.dev/attempt"] for pod in mine)


@pytest.mark.parametrize("how", HOWS)
def test_the_gpus_of_a_deleted_offer_stay_booked_until_its_pod_has_ended(
    full: Bench, proxied: Proxied, campaign: Campaign, how: str
) -> None:
    for number in range(campaign.size(1, 6)):
        offer, pod, attempt = running(full, number, campaign)
        path = full.path("taskoffers", f"first-{number}")
        perhaps_while_away(full, proxied, campaign, partial(delete, full, path, how))
        full.asked_to_stop(pod)
        nothing_is_given_away(full, number)
        full.end(pod, STOPPED)
        drained(full, number)
        full.gone(path)
        assert pods_at_once(full, offer) == 1
        assert attempts_of(full, offer) == [str(n + 1) for n in range(attempt)]
        if how == "Orphan":
            training = full.path("trainingjobs", offer["status"]["admission"]["jobName"])
            wait_until(partial(has_failed, full, training), "the end of what was kept", SECONDS)
        else:
            wait_until(lambda offer=offer: not full.batch_jobs(offer), "nothing is left", SECONDS)  # type: ignore[misc]
        campaign.counts[f"offers deleted, {how}"] += 1


@pytest.mark.parametrize("how", HOWS)
def test_a_deleted_training_job_is_made_again_and_its_offer_never_runs_twice_at_once(
    full: Bench, proxied: Proxied, campaign: Campaign, how: str
) -> None:
    for number in range(campaign.size(1, 6)):
        offer, pod, attempt = running(full, number, campaign)
        path = full.path("trainingjobs", offer["status"]["admission"]["jobName"])
        uid = full.api.request("GET", path)["metadata"]["uid"]
        if campaign.random.random() < 0.5:
            full.patch_policy({"filters": {"maxConcurrentJobs": 20 + number}})
            full.policy_condition("Ready", "Ready")
            campaign.counts["policy moved on"] += 1
        perhaps_while_away(full, proxied, campaign, partial(delete, full, path, how))
        made_again = partial(is_another, uid)
        full.training_job(offer["metadata"]["name"], made_again, "made again")
        if how != "Orphan":
            full.asked_to_stop(pod)
        nothing_is_given_away(full, number)
        play_to_the_end(full, offer)
        drained(full, number)
        assert pods_at_once(full, offer) == 1
        # What was left alone goes on; what was asked to stop is resumed by another attempt, and only once.
        assert len(attempts_of(full, offer)) <= attempt + 1
        assert how != "Orphan" or attempt > 1 or attempts_of(full, offer) == ["1"]
        delete(full, full.path("taskoffers", offer["metadata"]["name"]), "Background")
        wait_until(partial(nothing_runs, full, offer), "nothing runs for an offer that is gone", SECONDS)
        campaign.counts[f"TrainingJobs deleted, {how}"] += 1


def test_a_job_that_nobody_is_left_for_is_stopped(full: Bench, proxied: Proxied, campaign: Campaign) -> None:
    for number in range(campaign.size(1, 6)):
        offer, pod, _ = running(full, number, campaign)
        training = full.path("trainingjobs", offer["status"]["admission"]["jobName"])

        def both(training: str = training, number: int = number) -> None:
            delete(full, full.path("taskoffers", f"first-{number}"), "Orphan")
            delete(full, training, "Orphan")

        perhaps_while_away(full, proxied, campaign, both)
        full.asked_to_stop(pod)
        nothing_is_given_away(full, number)
        full.end(pod, STOPPED)
        drained(full, number)
        assert pods_at_once(full, offer) == 1
        campaign.counts["Jobs without anybody"] += 1


def perhaps_while_away(bench: Bench, proxied: Proxied, campaign: Campaign, action: Callable[[], None]) -> None:
    """Do something, now and then while no replica is there."""
    if campaign.random.random() < 0.7:
        action()
        return
    campaign.counts["while no replica was there"] += 1
    with bench.audit.excused():
        proxied.replica.kill(forget_lease=True)
        action()
        proxied.replica.start()


def is_another(uid: str, job: Object) -> bool:
    """Tell whether an object is not the one with this UID."""
    return str(job["metadata"]["uid"]) != uid


def play_to_the_end(bench: Bench, offer: Object) -> None:
    """Let the offer's pods end, well unless they were asked to stop, until it has succeeded."""
    name = offer["metadata"]["name"]

    def over() -> bool:
        for pod in bench.pods(offer):
            if pod["spec"].get("nodeName") and not pod_is_over(pod):
                bench.end(pod["metadata"]["name"], STOPPED if "deletionTimestamp" in pod["metadata"] else 0)
        return condition(bench.get(name), "Finished") != {}

    wait_until(over, f"end of {name}", SECONDS)
    bench.finished(name, "Succeeded")


def has_failed(bench: Bench, path: str) -> bool:
    """Tell whether a TrainingJob says that it was cancelled."""
    return condition(bench.api.request("GET", path), "Failed").get("reason") == "Cancelled"


def nothing_runs(bench: Bench, offer: Object) -> bool:
    """Tell whether no unfinished Job and no living pod is left of an offer."""
    return all(map(job_is_over, bench.batch_jobs(offer))) and all(map(pod_is_over, bench.pods(offer)))
