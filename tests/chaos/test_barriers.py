"""Changes at the worst moment: a write is stopped on its way, the world changes, and then the write goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from auditor import Auditor
from auditor_history import JOB, offer_uid_of
from auditor_judgement import Limits
from campaign import Campaign
from fake_node import Object, Script
from fault_requests import Match
from faults import Barrier, Fault
from operator_bench import GROUP, SECONDS, UID_LABEL, Bench, condition
from proxied_fixtures import Proxied, proxied, proxied_module
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

__all__ = ["proxied", "proxied_module"]

ANSWER, TRAINING, BATCH = "answer", "TrainingJob", "Job"
BARRIERS = (ANSWER, TRAINING, BATCH)
_STOPPED = {
    ANSWER: (("patch",), "taskoffers", "status"),
    TRAINING: (("create",), "trainingjobs", ""),
    BATCH: (("create",), "jobs", ""),
}
GPUS = 8
WRITE_TIMEOUT = 4.0
"""Seconds after which the operator takes a write to be of unknown outcome and sends it again."""
LAG = 15.0


@dataclass
class Scene:
    """An offer whose write stands at a barrier.

    Attributes:
        bench: Where it is.
        proxied: The replica and its proxy.
        campaign: Its randomness.
        barrier: Which write is stopped.
        name: The offer's name.
        offer: The offer as it was when its write was stopped.
        fault: The barrier.
        gone: UIDs of offers that no longer exist.
    """

    bench: Bench
    proxied: Proxied
    campaign: Campaign
    barrier: str
    name: str
    offer: Object
    fault: Fault
    gone: set[str] = field(default_factory=set)

    @property
    def admitted_before(self) -> bool:
        """Whether the offer was admitted before its write was stopped."""
        return self.barrier != ANSWER

    def chance(self) -> bool:
        """Toss a coin."""
        return self.campaign.random.random() < 0.5


@pytest.fixture
def auditor(crds: LocalCluster, request: pytest.FixtureRequest) -> Iterator[Auditor]:
    """The auditor; where a test lets writes come late by themselves, what follows from that is not the operator's."""
    with Auditor(crds.kubeconfig, getattr(request, "param", None)) as audit:
        yield audit


@pytest.fixture
def ready(bench: Bench, proxied: Proxied) -> Bench:
    """The bench with one node on which every pod ends well by itself, and a policy in force."""
    bench.kubelet.automate(bench.node(gpus=GPUS), Script(run_seconds=0.2))
    bench.policy()
    return bench


def stopped(bench: Bench, proxied: Proxied, campaign: Campaign, barrier: str, number: int) -> Scene:
    """Create an offer and wait until its write stands at the barrier."""
    verbs, plural, subresource = _STOPPED[barrier]
    name = f"offer-{number}"
    on = Match(verbs, plural, subresource, bench.namespace, name=rf"{name}(-[0-9a-f]{{8}}(-\d+)?)?")
    # Either one try is held while the ones after it pass, or all of them stand there together.
    times = campaign.random.choice((1, None))
    fault = proxied.proxy.fault(on, Barrier(), times=times, name=f"{barrier} of {name}")
    bench.offer(name, campaign.random.choice((1, 2, 4)))
    fault.reached(SECONDS)
    return Scene(bench, proxied, campaign, barrier, name, bench.get(name), fault)


# What happens to the offer while its write is held. Each returns what to wait for after the release.

Outcome = Callable[[], object]


def recreated(scene: Scene) -> Outcome:
    """Somebody deletes the offer and creates another one of its name."""
    bench, name = scene.bench, scene.name
    gpus = scene.campaign.random.choice((1, 2, 4))
    bench.delete(name)
    bench.gone(bench.path("taskoffers", name))
    scene.gone.add(scene.offer["metadata"]["uid"])
    there = bench.offer(name, gpus)

    def outcome() -> None:
        last = bench.finished(name, "Succeeded")
        assert last["metadata"]["uid"] == there["metadata"]["uid"]
        assert last["status"]["admission"]["assignments"][0]["count"] == gpus, "decided for the offer that is there"
        assert last["status"]["admission"]["jobName"].endswith(there["metadata"]["uid"][:8])

    return outcome


def cancelled(scene: Scene) -> Outcome:
    """Somebody makes the offer inactive."""
    bench, name = scene.bench, scene.name
    bench.patch(name, {"active": False})
    if scene.admitted_before:
        return lambda: bench.finished(name, "Cancelled")

    def outcome() -> None:
        bench.decided(name, "Suspended")
        assert "admission" not in bench.get(name)["status"]
        if scene.chance():
            bench.patch(name, {"active": True})
            bench.finished(name, "Succeeded")

    return outcome


def expiring(scene: Scene) -> Outcome:
    """Somebody changes when the offer expires; the server refuses it once the offer is admitted."""
    bench, name, soon = scene.bench, scene.name, scene.chance()
    if scene.admitted_before:
        with pytest.raises(ApiError, match="422"):
            bench.patch(name, {"expiresAt": "2099-01-01T00:00:00Z"})
        return lambda: bench.finished(name, "Succeeded")
    bench.patch(name, {"expiresAt": "2020-01-01T00:00:00Z" if soon else "2099-01-01T00:00:00Z"})

    def outcome() -> None:
        ended = bench.finished(name, "Rejected" if soon else "Succeeded")
        assert not soon or condition(ended, "Admitted")["reason"] == "Expired"

    return outcome


def deleted(scene: Scene) -> Outcome:
    """Somebody deletes the offer for good."""
    bench, name = scene.bench, scene.name
    bench.delete(name)
    scene.gone.add(scene.offer["metadata"]["uid"])
    return lambda: bench.gone(bench.path("taskoffers", name))


def switched(scene: Scene) -> Outcome:
    """Somebody changes the policy: other GPU counts, another image, or a filter that refuses the offer."""
    bench, name = scene.bench, scene.name
    spec = bench.get_policy()["spec"]
    classes = [{**one, "gpus": {1: 2, 2: 4, 4: 1}[one["gpus"]]} for one in spec["sizeClasses"]]
    refused = {"filters": {"maxTimeLimitSeconds": 60}}
    variants = ({"sizeClasses": classes}, {"podTemplate": {"image": "another:1"}}, refused)
    change = scene.campaign.random.choice(variants)
    bench.patch_policy(change)
    generation = bench.policy_condition("Ready", "Ready")["metadata"]["generation"]

    def outcome() -> None:
        if change is refused and not scene.admitted_before:
            ended = bench.finished(name, "Rejected")
            assert condition(ended, "Admitted")["reason"] == "TimeLimitTooLong"
            return
        ended = bench.finished(name, "Succeeded")
        kept = ended["status"]["admission"]["policyRef"]["generation"]
        assert kept == (generation - 1 if scene.admitted_before else generation)

    return outcome


def broken_policy(scene: Scene) -> Outcome:
    """Somebody breaks the policy: what was good last stays in force."""
    bench, name = scene.bench, scene.name
    before = bench.get_policy()
    break_policy(bench)

    def outcome() -> None:
        ended = bench.finished(name, "Succeeded")
        assert ended["status"]["admission"]["policyRef"]["generation"] == before["status"]["activeGeneration"]

    return outcome


def break_policy(bench: Bench) -> None:
    """Let a size class begin inside the one before it, which the schema cannot see."""
    classes = bench.get_policy()["spec"]["sizeClasses"]
    bench.patch_policy({"sizeClasses": [{**classes[0], "maxParameters": 2_000_000}, *classes[1:]]})
    bench.policy_condition("Ready", "InvalidPolicy")


def broken_policy_and_restart(scene: Scene) -> Outcome:
    """Somebody breaks the policy, and the replica is killed: the next one only has what is stored."""
    outcome = broken_policy(scene)
    replica = scene.proxied.replica
    with scene.bench.audit.excused():
        if scene.chance():
            replica.kill(forget_lease=True)
        else:
            assert replica.terminate() == 0
        # The write of the one that is gone comes before the next one leads, or after that.
        early = scene.chance()
        if early:
            scene.fault.remove()
        replica.start()
    return outcome


def deleted_policy(scene: Scene) -> Outcome:
    """Somebody deletes the policy, and creates it again later."""
    bench, name = scene.bench, scene.name
    bench.api.request("DELETE", f"{GROUP}/capacitypolicies/{bench.policy_name}")
    bench.gone(f"{GROUP}/capacitypolicies/{bench.policy_name}")
    if not scene.admitted_before:
        # Another offer tells when the replica knows.
        probe = f"{name}-probe"
        bench.offer(probe)
        bench.decided(probe, "PolicyNotFound")
        bench.delete(probe)

    def outcome() -> None:
        if scene.admitted_before:
            bench.finished(name, "Succeeded")
        else:
            waiting = bench.decided(name, "PolicyNotFound")
            assert "admission" not in waiting["status"]
        made = bench.policy()
        ended = bench.finished(name, "Succeeded")
        under = ended["status"]["admission"]["policyRef"]["uid"]
        assert (under == made["metadata"]["uid"]) is not scene.admitted_before

    return outcome


CHANGES: tuple[Callable[[Scene], Outcome], ...] = (
    recreated,
    cancelled,
    expiring,
    deleted,
    switched,
    broken_policy,
    broken_policy_and_restart,
    deleted_policy,
)
_OF_POLICY = (switched, broken_policy, broken_policy_and_restart, deleted_policy)


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_at_a_barrier_the_world_is_right(
    ready: Bench, proxied: Proxied, campaign: Campaign, change: Callable[[Scene], Outcome]
) -> None:
    barriers = list(BARRIERS) * campaign.size(1, 5)
    campaign.random.shuffle(barriers)
    for number, barrier in enumerate(barriers[: campaign.size(1 if change in _OF_POLICY else 2, len(barriers))]):
        scene = stopped(ready, proxied, campaign, barrier, number)
        with scene.fault:
            outcome = change(scene)
        outcome()
        if change in _OF_POLICY:
            new_policy(ready)
        the_world_is_right(scene)
        campaign.counts[f"at the {barrier}"] += 1


@pytest.mark.parametrize("auditor", [Limits(lag=LAG)], indirect=True, ids=["lag"])
def test_after_a_write_that_comes_when_its_sender_has_given_it_up_the_world_is_right(
    ready: Bench, proxied: Proxied, campaign: Campaign
) -> None:
    cases = [(change, barrier) for change in (recreated, deleted, switched, cancelled) for barrier in BARRIERS]
    campaign.random.shuffle(cases)
    for number, (change, barrier) in enumerate(cases[: campaign.size(2, len(cases))]):
        scene = stopped(ready, proxied, campaign, barrier, number)
        with scene.fault:
            outcome = change(scene)
            held_for(scene, WRITE_TIMEOUT + campaign.random.uniform(0.5, 4.0))
        outcome()
        if change in _OF_POLICY:
            new_policy(ready)
        the_world_is_right(scene)
        campaign.counts[f"{change.__name__}, late {barrier}"] += 1


def held_for(scene: Scene, seconds: float) -> None:
    """Wait until the write has been held for so long."""
    first = scene.fault.reached(SECONDS)
    wait_until(lambda: time.monotonic() >= first.at + seconds, f"{seconds:.1f} s at the barrier", seconds + 5)


def new_policy(bench: Bench) -> None:
    """Replace the bench's policy by a fresh one."""
    path = f"{GROUP}/capacitypolicies/{bench.policy_name}"
    if bench.api.exists(path):
        bench.api.request("DELETE", path)
        bench.gone(path)
    bench.policy()


def the_world_is_right(scene: Scene) -> None:
    """Nothing is left of offers that are gone, no GPU is lost, and nothing was made twice."""
    bench = scene.bench
    for uid in scene.gone:
        wait_until(lambda uid=uid: not left_of(bench, uid), f"nothing is left of offer {uid}", SECONDS)  # type: ignore[misc]
    for node in bench.nodes:
        bench.booked(node, 0)
    assert not bench.audit.check()
    for job in bench.api.request("GET", bench.path("trainingjobs"))["items"]:
        offer = bench.get(job["spec"]["offerRef"]["name"])
        if offer["metadata"]["uid"] == job["spec"]["offerRef"]["uid"]:
            admission, run = offer["status"]["admission"], job["spec"]["run"]
            assert run["policyRef"] == admission["policyRef"], "made for the admission that stands"
            assert run["gpus"] == admission["assignments"][0]["count"]
    # One Job per offer, for no pod had failed.
    jobs: dict[str, set[str]] = {}
    for event in bench.audit.events:
        if event.kind == JOB and event.object["metadata"]["namespace"] == bench.namespace:
            jobs.setdefault(str(offer_uid_of(JOB, event.object)), set()).add(event.uid)
    assert all(len(made) == 1 for made in jobs.values()), jobs


def left_of(bench: Bench, uid: str) -> list[str]:
    """Return what there is of an offer with this UID."""
    paths = (
        bench.path("trainingjobs"),
        bench.path("jobs", api="/apis/batch/v1"),
        bench.path("pods", api="/api/v1"),
        bench.path("configmaps", api="/api/v1"),
    )
    return [
        f"{path}/{found['metadata']['name']}"
        for path in paths
        for found in bench.api.request("GET", f"{path}?labelSelector={UID_LABEL}={uid}")["items"]
    ]
