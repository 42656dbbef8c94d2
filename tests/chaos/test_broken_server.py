"""An API server that is away, slow or wrong: whatever it does to requests, every offer is decided once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from campaign import Campaign
from fault_proxy import FaultProxy
from fault_requests import OWN_WRITES, Match
from faults import GONE, GONE_IN_STREAM, Action, Answer, Delay, Drop, Hang, Hold, Storm, Swallow
from offer_runs import OfferRun
from operator_bench import GROUP, SECONDS, Bench
from operator_process import Caretaker, OperatorProcess, until_its_end
from taskoffer_lab.process_table import wait_until

KINDS = ("nodes", "pods", "jobs", "trainingjobs", "capacitypolicies", "taskoffers")
RESYNC = 5
STALL_SECONDS = 8
WHOLE_STALL_SECONDS = 30
LIST_SECONDS = 5.0


@pytest.fixture
def proxy(bench: Bench) -> Iterator[FaultProxy]:
    """A proxy between the replica and the API server."""
    with FaultProxy(bench.cluster.client_config) as made:
        yield made


@pytest.fixture
def replica(bench: Bench, proxy: FaultProxy, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A replica behind the proxy that is not started yet."""
    yield from until_its_end(OperatorProcess(bench.cluster, operator_directory, "--resync", str(RESYNC), through=proxy))


@pytest.fixture
def run(bench: Bench, replica: OperatorProcess, campaign: Campaign) -> Iterator[OfferRun]:
    """A run of offers under a leading replica that is started again when it leaves for want of its lease."""
    made = OfferRun(bench, campaign)
    with bench.audit.excused():
        replica.start()
    bench.policy()
    with Caretaker(replica) as caretaker:
        yield made
        # What is asked for while the test still runs may be judged by these, too.
    campaign.counts["processes replaced"] += len(caretaker.absences)


# The server and its store


def test_an_api_server_that_is_restarted_during_a_run_costs_no_offer(
    bench: Bench, run: OfferRun, replica: OperatorProcess, campaign: Campaign
) -> None:
    offers = campaign.size(30, 200)
    server = bench.cluster.process("kube-apiserver")
    moments = sorted(campaign.random.sample(range(3, offers - 3), 2))

    def restart(number: int) -> None:
        if number not in moments:
            return
        if campaign.random.random() < 0.5:
            server.stop()
        else:
            server.kill()
        server.start()
        campaign.counts["restarts"] += 1

    with bench.audit.excused():
        run.create(offers, before_each=restart)
        wait_until(bench.api.ready, "the API server answers", SECONDS)
        run.finish()
    run.check(replica)


def test_a_store_that_stalls_costs_no_offer(
    bench: Bench, run: OfferRun, replica: OperatorProcess, campaign: Campaign
) -> None:
    offers = campaign.size(20, 100)
    store = bench.cluster.process("etcd")
    seconds = campaign.size(STALL_SECONDS, WHOLE_STALL_SECONDS)
    moment = campaign.random.randrange(5, offers - 5)
    with bench.audit.excused():
        run.create(moment)
        store.pause()
        try:
            end = time.monotonic() + seconds
            wait_until(lambda: time.monotonic() >= end, "the end of the stall", seconds + 5.0)
        finally:
            store.resume()
        run.create(offers - moment)
        run.finish()
    campaign.counts["seconds of stall"] = seconds
    run.check(replica)


# Single requests


def test_a_storm_of_faults_costs_no_offer_and_no_second_answer(
    bench: Bench, run: OfferRun, proxy: FaultProxy, replica: OperatorProcess, campaign: Campaign
) -> None:
    offers = campaign.size(60, 500)
    rates: dict[Action, float] = {
        Drop(): 0.04,
        Drop(after_commit=True): 0.04,
        Answer(409): 0.03,
        Answer(429, retry_after=1): 0.03,
        Answer(500): 0.03,
        Answer(503): 0.03,
        **{Hold(campaign.random.uniform(1, 3)): 0.01 for _ in range(3)},
        Hold(5.0): 0.01,
    }
    storm = Storm(campaign.random, rates)
    with bench.audit.excused(), proxy.place(storm):
        run.create(offers)
        run.finish()
    for action, count in storm.counts.items():
        campaign.counts[action.partition("(seconds")[0]] += count
    assert storm.struck > offers, "several writes are made for each offer"
    run.check(replica, proxy)


def test_nothing_is_decided_before_the_last_kind_has_been_listed(
    bench: Bench, proxy: FaultProxy, replica: OperatorProcess, campaign: Campaign
) -> None:
    kinds = list(KINDS)
    campaign.random.shuffle(kinds)
    with bench.audit.excused():
        replica.start()
    for late in kinds[: campaign.size(1, len(kinds))]:
        pod = fill(bench)
        replica.kill(forget_lease=True)
        bench.offer("third", 4, model="microsoft/phi-4")
        before, since = len(proxy.requests), time.monotonic()
        with bench.audit.excused(), proxy.fault(Match(("list",), late), Delay(LIST_SECONDS)):
            replica.start()
            bench.decided("third", "WaitingForCapacity")
        seen = proxy.requests[before:]
        first = next(record for record in seen if OWN_WRITES.fits(record, None))
        assert first.at - since >= LIST_SECONDS, f"{first} was sent before {late} could be listed"
        for kind in KINDS:
            answered = [r.answered for r in seen if r.verb == "list" and r.plural == kind and r.query != "limit=1"]
            assert any(at is not None and at < first.at for at in answered), f"{first} came before the list of {kind}"
        bench.end(pod)
        bench.decided("second", "Admitted")
        assert [len(bench.status_writes(name)) for name in ("second", "third")] == [2, 1]
        campaign.counts[f"late {late}"] += 1
        bench.end(bench.run("second"))
        bench.finished("second", "Succeeded")
        clean(bench)


# Watches


def test_watches_that_are_cut_and_expire_again_and_again_cost_no_offer(
    bench: Bench, run: OfferRun, proxy: FaultProxy, replica: OperatorProcess, campaign: Campaign
) -> None:
    chance = campaign.random
    with ExitStack() as faults:

        def attack(_number: int) -> None:
            if chance.random() < 0.5:
                return
            kind = chance.choice(("", *KINDS))
            how = chance.choice(("cut", "cut, then 410", "cut, then 410 in the stream", "410 in the stream"))
            if "then" in how:
                answer = GONE_IN_STREAM if "stream" in how else GONE
                faults.enter_context(proxy.fault(Match(("watch",), kind), answer, times=1))
            proxy.cut_watches(kind, gone=how == "410 in the stream")
            campaign.counts[how] += 1

        run.create(campaign.size(40, 400), before_each=attack)
        run.finish()
    run.check(replica, proxy)


Deletion = Callable[[Bench], object]


def fill(bench: Bench) -> str:
    """Let one offer run on all GPUs and another one wait; return the pod of the first."""
    bench.node("a", gpus=4)
    bench.policy()
    bench.admitted("first", 4)
    pod = bench.run("first")
    bench.offer("second", 4)
    bench.decided("second", "WaitingForCapacity")
    return pod


def delete_offer(bench: Bench, pod: str) -> None:
    """Delete the running offer, and let its pod end."""
    bench.delete("first")
    bench.asked_to_stop(pod)
    bench.end(pod, 143)
    bench.gone(bench.path("pods", pod, api="/api/v1"))


def delete_foreign_pod(bench: Bench, pod: str) -> None:
    """Delete a pod of somebody else that has taken what became free."""
    bench.kubelet.release(bench.namespace, "foreign")
    bench.gone(bench.path("pods", "foreign", api="/api/v1"))


def delete_waiting_offer(bench: Bench, pod: str) -> None:
    """Delete the offer that waits, create it again with its name, and let the pod of the first end."""
    bench.delete("second")
    bench.offer("second", 2)
    bench.end(pod)


def delete_policy(bench: Bench, pod: str) -> None:
    """Delete the policy, let the first end, and create the policy again."""
    bench.api.request("DELETE", f"{GROUP}/capacitypolicies/{bench.policy_name}")
    bench.decided("second", "PolicyNotFound")
    bench.end(pod)
    bench.finished("first", "Succeeded")
    bench.policy()


def delete_node(bench: Bench, pod: str) -> None:
    """Replace the node by another one, with the pod that ran there."""
    bench.delete("first")
    bench.kubelet.remove_node(bench.nodes[0])
    bench.decided("second", "InventoryNotReady")
    bench.end(pod, 143)
    bench.node("b", gpus=4)


def delete_job(bench: Bench, pod: str) -> None:
    """Delete the Job of the running offer: another attempt has to run to its end before anything is free."""
    (job,) = bench.batch_jobs(bench.get("first"))
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
    bench.api.request("DELETE", bench.path("jobs", job["metadata"]["name"], api="/apis/batch/v1"), options)
    bench.asked_to_stop(pod)
    bench.end(pod, 143)
    # Whether this is another attempt depends on what of the first one was seen.
    again: list[str] = []

    def bound() -> bool:
        pods = [p for p in bench.pods(bench.get("first")) if p["spec"].get("nodeName")]
        again[:] = [p["metadata"]["name"] for p in pods if p["metadata"]["name"] != pod]
        return bool(again)

    wait_until(bound, "another pod of the first", SECONDS)
    bench.end(again[0])
    bench.finished("first", "Succeeded")


DELETIONS = (delete_offer, delete_foreign_pod, delete_waiting_offer, delete_policy, delete_node, delete_job)


@pytest.mark.parametrize("way", ["swallowed", "watches down, then 410"])
def test_deletions_that_no_watch_tells_are_found_by_the_next_full_list(
    bench: Bench, proxy: FaultProxy, replica: OperatorProcess, campaign: Campaign, way: str
) -> None:
    with bench.audit.excused():
        replica.start()
    deletions = list(DELETIONS)
    campaign.random.shuffle(deletions)
    for number, delete in enumerate(deletions[: campaign.size(2, len(deletions))]):
        with bench.audit.excused():
            found_out(bench, proxy, delete, way)
        campaign.counts[f"{delete.__name__}, {way}"] += 1
        assert not bench.audit.check(), number
        clean(bench)
    assert (replica.metric("taskoffer_cache_resync_differences_total") or 0) > 0


def found_out(bench: Bench, proxy: FaultProxy, delete: Callable[[Bench, str], None], way: str) -> None:
    """Delete something behind the replica's back; what waits for it is admitted all the same."""
    pod = fill(bench)
    if delete is delete_foreign_pod:
        # It has to be there, and known, before the watches are broken.
        bench.end(pod)
        bench.decided("second", "Admitted")
        return foreign_pod_found_out(bench, proxy, way)
    with ExitStack() as faults:
        break_watches(proxy, faults, way)
        delete(bench, pod)
        bench.decided("second", "Admitted")
    bench.end(bench.run("second"))
    bench.finished("second", "Succeeded")
    return None


def foreign_pod_found_out(bench: Bench, proxy: FaultProxy, way: str) -> None:
    """Somebody else's pod goes; what waits for its GPUs gets them."""
    bench.end(bench.run("second"))
    bench.finished("second", "Succeeded")
    bench.foreign_pod("foreign", bench.nodes[-1], 4)
    bench.booked(bench.nodes[-1], 4)
    bench.offer("third", 4)
    bench.decided("third", "WaitingForCapacity")
    with ExitStack() as faults:
        break_watches(proxy, faults, way)
        delete_foreign_pod(bench, "")
        bench.decided("third", "Admitted")
    bench.end(bench.run("third"))
    bench.finished("third", "Succeeded")


def break_watches(proxy: FaultProxy, faults: ExitStack, way: str) -> None:
    """Keep all deletions from the replica until the faults are removed."""
    if way == "swallowed":
        faults.enter_context(proxy.fault(Match(("watch",)), Swallow(lambda kind, _object: kind == "DELETED")))
        return
    # When they can be opened again, each of them finds its history gone.
    down = faults.enter_context(proxy.fault(Match(("watch",)), Hang()))
    faults.callback(lambda: proxy.fault(Match(("watch",)), GONE_IN_STREAM, times=len(KINDS)))
    proxy.cut_watches()
    down.wait_struck(SECONDS, len(KINDS))


def clean(bench: Bench) -> None:
    """Remove what a round has left, for the next one."""
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
    pods = bench.path("pods", api="/api/v1")
    bench.api.request("DELETE", bench.path("taskoffers"), options)
    for path in (bench.path("trainingjobs"), bench.path("jobs", api="/apis/batch/v1"), pods):
        wait_until(lambda path=path: emptied(bench, path, pods), f"{path} empty", SECONDS)  # type: ignore[misc]
    policy = f"{GROUP}/capacitypolicies/{bench.policy_name}"
    bench.api.request("DELETE", policy)
    bench.gone(policy)
    while bench.nodes:
        name = bench.nodes.pop()
        if name in bench.kubelet.nodes:
            bench.kubelet.remove_node(name)


def emptied(bench: Bench, path: str, pods: str) -> bool:
    """Tell whether nothing is there any more; pods that nobody will ever end are released."""
    for pod in bench.api.request("GET", pods)["items"]:
        if "deletionTimestamp" in pod["metadata"]:
            bench.kubelet.release(bench.namespace, pod["metadata"]["name"])
    return not bench.api.request("GET", path)["items"]
