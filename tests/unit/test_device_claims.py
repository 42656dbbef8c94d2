"""Pinned GPUs from the replica's side: what is watched, what is claimed, what is counted, and what is given back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from builders import make_admission, make_condition, make_node, make_policy, make_training_job, stored
from core_builders import NOW, TWO_GPUS
from device_builders import CLASS, DRIVER, allocated, make_device, make_device_class, make_resource_claim, make_slice
from fake_kube import FakeKube, refused
from fake_replica import Rig, end_pod, leading, make_replica, start_pod
from goldens import assert_golden
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    DEVICE_CLASSES,
    JOBS_OF_TRAINING,
    NODES,
    POLICIES,
    RESOURCE_CLAIMS,
    RESOURCE_SLICES,
    NotFoundError,
    Object,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.api.base import rfc3339
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.devices import PCI_BUS_ID, Device, device_key
from taskoffer.api.v1alpha1.trainingjob import Attempt, TrainingJob, TrainingJobStatus
from taskoffer.decision.attempts import needs_devices
from taskoffer.decision.ledger import NodeView, open_ledger
from taskoffer.reconcile import device_access
from taskoffer.reconcile.device_access import DevicesHaveComeError, find_access, until_devices_come
from taskoffer.reconcile.device_views import device_class_entry, resource_claim_entry, slice_entry
from taskoffer.reconcile.devices import Access, Devices
from taskoffer.reconcile.flow import Flow
from taskoffer.reconcile.world import World
from taskoffer.render.claims import selector
from taskoffer.render.job import attempt_job, resource_claim
from virtual_time import run_virtually, virtual_time

__all__ = ["virtual_time"]
pytestmark = pytest.mark.usefixtures("virtual_time")

ADMITTED, FULL = ("True", "Admitted"), ("False", "WaitingForCapacity")
JOB = "a-a-uid"
POOL = {"name": "nvidia.com/gpu", "counts": [1, 2, 4], "deviceClassName": CLASS}
FORBIDDEN = refused(403, "Forbidden")


def pinning(**fields: Any) -> Object:
    return make_policy(resources=[POOL], **fields)


def with_devices(devices: int = 8) -> FakeKube:
    """Return a server with one node of which a driver publishes the devices."""
    kube = FakeKube(refuses_devices=None)
    kube.put(NODES, make_node(gpus=0), uid="node-a-uid")
    kube.put(DEVICE_CLASSES, make_device_class())
    kube.put(RESOURCE_SLICES, make_slice(devices=devices))
    return kube


def chosen(rig: Rig, name: str = "a") -> list[str]:
    return [one["name"] for one in rig.read(name)["status"]["admission"]["assignments"][0]["devices"]]


def booked(rig: Rig) -> int:
    """Return how many GPUs the next cycle counts as booked on the node."""
    return open_ledger(rig.session.world.snapshot(NOW).claims).booked.get("node-a", 0)


def claims(rig: Rig) -> list[str]:
    return sorted(claim["metadata"]["name"] for claim in rig.kube.all(RESOURCE_CLAIMS))


async def job_of(rig: Rig, number: int = 1) -> Object:
    name = f"{JOB}-{number}"
    await rig.until(lambda: any(j["metadata"]["name"] == name for j in rig.kube.all(BATCH_JOBS)), seconds=600)
    return rig.kube.get_now(BATCH_JOBS, name)


# What is claimed


def device(name: str, value: str | None = None, attribute: str = f"{DRIVER}/uuid", driver: str = DRIVER) -> Device:
    return Device(driver=driver, pool="node-a", name=name, attribute=attribute, value=value or f"GPU-{name}")


def pinned_attempt(*devices: Device) -> Attempt:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": len(devices), "lane": "small"}
    place |= {"deviceClassName": CLASS, "devices": [one.to_wire() for one in devices]}
    wire = {"jobName": "offer-0123abcd-2", "assignments": [place], "createdAt": rfc3339(NOW)}
    return Attempt.model_validate(wire)


def test_the_claim_of_an_attempt_and_how_its_pod_refers_to_it() -> None:
    training = TrainingJob.model_validate(stored(make_training_job(gpus=2), uid="tj-uid"))
    attempt = pinned_attempt(device("gpu-0"), device("gpu-1"))
    made, job = resource_claim(training, attempt, 2), attempt_job(training, attempt, 2)
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    resources = container["resources"]
    assert_golden("device_claim", {"claim": made, "pod": spec["resourceClaims"], "container": resources})
    assert "nvidia.com/gpu" not in {**resources["requests"], **resources["limits"]}


def test_without_chosen_devices_there_is_no_claim() -> None:
    training = TrainingJob.model_validate(stored(make_training_job(gpus=1), uid="tj-uid"))
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}
    attempt = Attempt.model_validate({"jobName": "x-1", "assignments": [place], "createdAt": rfc3339(NOW)})
    assert resource_claim(training, attempt, 1) is None
    spec = attempt_job(training, attempt, 1)["spec"]["template"]["spec"]
    assert "resourceClaims" not in spec
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "claims" not in spec["containers"][0]["resources"]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (
            [device("a", "U1"), device("b", "U2")],
            f'(device.driver == "{DRIVER}" && has(device.attributes["{DRIVER}"].uuid) && '
            f'device.attributes["{DRIVER}"].uuid in ["U1", "U2"])',
        ),
        (
            [device("a", "0000:3b:00.0", PCI_BUS_ID)],
            f'(device.driver == "{DRIVER}" && has(device.attributes["resource.kubernetes.io"].pciBusID) && '
            'device.attributes["resource.kubernetes.io"].pciBusID in ["0000:3b:00.0"])',
        ),
        (
            [device("a", 'say "x" \\ ☃')],
            f'(device.driver == "{DRIVER}" && has(device.attributes["{DRIVER}"].uuid) && '
            f'device.attributes["{DRIVER}"].uuid in ["say \\"x\\" \\\\ ☃"])',
        ),
    ],
)
def test_a_selector_names_the_devices_and_looks_only_at_attributes_that_are_there(
    devices: list[Device], expected: str
) -> None:
    assert selector(devices) == expected


def test_devices_that_are_named_by_different_attributes_are_joined() -> None:
    found = selector([device("a", "U1"), device("b", "0000:3b:00.0", PCI_BUS_ID)])
    assert found.count(" || ") == 1
    assert '"U1"' in found
    assert '"0000:3b:00.0"' in found


# The objects of an attempt


def test_the_claim_is_created_before_the_job_and_both_name_the_chosen_devices() -> None:
    async def main() -> None:
        async with leading(with_devices(), policy=pinning()) as rig:
            rig.offer(parameters=TWO_GPUS)
            job = await job_of(rig)
            made = [r.kind for r in rig.kube.requests if r.verb == "create" and r.name == f"{JOB}-1"]
            assert made == ["ConfigMap", "ResourceClaim", "Job"]
            claim = rig.kube.get_now(RESOURCE_CLAIMS, f"{JOB}-1")
            training = rig.kube.get_now(JOBS_OF_TRAINING, JOB)
            assert claim["metadata"]["ownerReferences"][0]["uid"] == training["metadata"]["uid"]
            assert chosen(rig) == ["gpu-0", "gpu-1"]
            expression = claim["spec"]["devices"]["requests"][0]["exactly"]["selectors"][0]["cel"]["expression"]
            assert expression.endswith('.uuid in ["GPU-node-a-gpu-0", "GPU-node-a-gpu-1"])')
            assert job["spec"]["template"]["spec"]["resourceClaims"] == [
                {"name": "gpus", "resourceClaimName": f"{JOB}-1"}
            ]
            assert booked(rig) == 2

    run_virtually(main())


@pytest.mark.parametrize("committed", [True, False])
def test_a_claim_whose_create_had_an_unknown_outcome_is_created_once(committed: bool) -> None:
    async def main() -> None:
        async with leading(with_devices(), policy=pinning()) as rig:
            rig.kube.fail("create", RESOURCE_CLAIMS, UnknownOutcomeError("no answer"), committed=committed)
            rig.offer()
            await job_of(rig)
            assert claims(rig) == [f"{JOB}-1"]
            assert booked(rig) == 1

    run_virtually(main())


def test_a_claim_of_somebody_else_under_the_wanted_name_is_not_adopted() -> None:
    async def main() -> None:
        async with leading(with_devices(), policy=pinning()) as rig:
            theirs = rig.kube.put(RESOURCE_CLAIMS, make_resource_claim(f"{JOB}-1"))
            rig.offer()
            await rig.until(lambda: ("TrainingJob", JOB, "NameConflict") in rig.events())
            await rig.quiet(10)
            assert rig.kube.get_now(RESOURCE_CLAIMS, f"{JOB}-1")["spec"] == theirs["spec"]
            assert rig.kube.all(BATCH_JOBS) == []

    run_virtually(main())


def test_a_claim_that_the_server_refuses_is_told_like_a_job_that_it_refuses() -> None:
    async def main() -> None:
        async with leading(with_devices(), policy=pinning()) as rig:
            rig.kube.fail("create", RESOURCE_CLAIMS, refused(403, "Forbidden"), times=1)
            rig.offer()
            await rig.until(lambda: ("TrainingJob", JOB, "JobRefused") in rig.events())
            await job_of(rig)
            assert claims(rig) == [f"{JOB}-1"]

    run_virtually(main())


def test_a_finished_job_gives_its_claim_back_and_then_its_devices_are_handed_out_again() -> None:
    async def main() -> None:
        async with leading(with_devices(1), policy=pinning()) as rig:
            rig.offer()
            start_pod(rig.kube, await job_of(rig))
            # As Kubernetes does it: a claim that is in use stays until its pod has ended.
            rig.kube.change(RESOURCE_CLAIMS, f"{JOB}-1", {"metadata": {"finalizers": ["x"]}})
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == FULL)
            end_pod(rig.kube, f"{JOB}-1-pod", 0, json.dumps({"exitCode": 0, "reason": "Done"}))
            await rig.until(lambda: rig.finished() == "Succeeded")
            await rig.until(lambda: "deletionTimestamp" in rig.kube.get_now(RESOURCE_CLAIMS, f"{JOB}-1")["metadata"])
            await rig.quiet(5)
            assert rig.verdict("b") == FULL, "the claim is still there"
            assert rig.kube.count("delete", RESOURCE_CLAIMS) == 1
            rig.kube.remove(RESOURCE_CLAIMS, f"{JOB}-1")
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            assert chosen(rig, "b") == ["gpu-0"]

    run_virtually(main())


@pytest.mark.parametrize("error", [ThrottledError(3), UnknownOutcomeError("no answer"), refused(500, "x")])
def test_a_claim_that_could_not_be_deleted_is_deleted_later(error: Exception) -> None:
    async def main() -> None:
        async with leading(with_devices(1), policy=pinning()) as rig:
            rig.offer()
            start_pod(rig.kube, await job_of(rig))
            rig.kube.fail("delete", RESOURCE_CLAIMS, error, times=2)
            end_pod(rig.kube, f"{JOB}-1-pod", 0, json.dumps({"exitCode": 0, "reason": "Done"}))
            await rig.until(lambda: rig.finished() == "Succeeded")
            await rig.until(lambda: not claims(rig))
            await rig.until(lambda: booked(rig) == 0)

    run_virtually(main())


def test_a_claim_that_is_gone_already_is_forgotten() -> None:
    async def main() -> None:
        async with leading(with_devices(1), policy=pinning()) as rig:
            rig.offer()
            start_pod(rig.kube, await job_of(rig))
            rig.kube.watching = False
            rig.kube.remove(RESOURCE_CLAIMS, f"{JOB}-1")
            rig.kube.watching = True
            end_pod(rig.kube, f"{JOB}-1-pod", 0, json.dumps({"exitCode": 0, "reason": "Done"}))
            await rig.until(lambda: rig.finished() == "Succeeded")
            await rig.until(lambda: booked(rig) == 0)
            assert rig.kube.count("delete", RESOURCE_CLAIMS) == 1

    run_virtually(main())


def test_the_next_attempt_has_the_same_devices_and_a_claim_of_its_own() -> None:
    async def main() -> None:
        policy = pinning(attempts={"maxAttempts": 2, "backoffSeconds": 1})
        async with leading(with_devices(), policy=policy) as rig:
            rig.offer(parameters=TWO_GPUS)
            start_pod(rig.kube, await job_of(rig))
            rig.kube.logs[f"{JOB}-1-pod"] = "boom"
            end_pod(rig.kube, f"{JOB}-1-pod", 1)
            await job_of(rig, 2)
            await rig.until(lambda: claims(rig) == [f"{JOB}-2"])
            first, second = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["attempts"]
            assert first["assignments"] == second["assignments"]
            assert booked(rig) == 2

    run_virtually(main())


def test_an_attempt_whose_device_was_withdrawn_is_followed_by_one_on_another_device() -> None:
    async def main() -> None:
        policy = pinning(attempts={"maxAttempts": 2, "backoffSeconds": 1})
        async with leading(with_devices(2), policy=policy) as rig:
            rig.offer()
            start_pod(rig.kube, await job_of(rig))
            closed = [make_device("gpu-0", taint="NoExecute"), make_device("gpu-1")]
            rig.kube.put(RESOURCE_SLICES, make_slice(devices=closed, generation=2))
            rig.kube.logs[f"{JOB}-1-pod"] = "boom"
            end_pod(rig.kube, f"{JOB}-1-pod", 1)
            await job_of(rig, 2)
            last = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["attempts"][-1]
            assert [one["name"] for one in last["assignments"][0]["devices"]] == ["gpu-1"]

    run_virtually(main())


def test_a_pod_whose_device_somebody_else_got_first_is_given_up_and_tried_on_another_device() -> None:
    async def main() -> None:
        policy = pinning(attempts={"maxAttempts": 2, "backoffSeconds": 1, "startTimeoutSeconds": 60})
        async with leading(with_devices(2), policy=policy) as rig:
            rig.offer()
            await job_of(rig)
            rig.kube.put(RESOURCE_CLAIMS, allocated(make_resource_claim(), "gpu-0"))
            job = await job_of(rig, 2)
            assert claims(rig) == [f"{JOB}-2", "theirs"]
            attempts = rig.kube.get_now(JOBS_OF_TRAINING, JOB)["status"]["attempts"]
            devices = [[one["name"] for one in a["assignments"][0]["devices"]] for a in attempts]
            assert devices == [["gpu-0"], ["gpu-1"]]
            assert job["metadata"]["name"] == f"{JOB}-2"

    run_virtually(main())


def attempts(*outcomes: str | None) -> list[Object]:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}
    made = [{"jobName": f"j-{n}", "assignments": [place], "createdAt": rfc3339(NOW)} for n in range(1, 9)]
    return [one | ({"outcome": outcome} if outcome else {}) for one, outcome in zip(made, outcomes, strict=False)]


@pytest.mark.parametrize(
    ("status", "name", "needed"),
    [
        ({}, "j-1", True),
        ({"attempts": attempts(None)}, "j-1", True),
        ({"attempts": attempts("Failed")}, "j-1", False),
        ({"attempts": attempts("Failed", None)}, "j-1", False),
        ({"attempts": attempts("Failed", None)}, "j-2", True),
        ({"attempts": attempts(None), "conditions": [make_condition("Failed", True, "Cancelled")]}, "j-1", False),
        ({"attempts": attempts(None), "conditions": [make_condition("Complete", True, "Succeeded")]}, "j-1", False),
        ({"attempts": attempts(None), "conditions": [make_condition("Failed", False, "x")]}, "j-1", True),
    ],
)
def test_an_attempt_needs_its_devices_until_it_is_over(status: Object, name: str, needed: bool) -> None:
    assert needs_devices(TrainingJobStatus.model_validate(status), name) is needed


# What others have


def test_devices_of_foreign_claims_are_booked_while_they_are_allocated() -> None:
    async def main() -> None:
        async with leading(with_devices(2), policy=pinning()) as rig:
            rig.kube.put(RESOURCE_CLAIMS, allocated(make_resource_claim(), "gpu-0"))
            rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            assert chosen(rig) == ["gpu-1"]
            rig.offer("b")
            await rig.until(lambda: rig.verdict("b") == FULL)
            rig.kube.change(RESOURCE_CLAIMS, "theirs", {"status": {"allocation": None}})
            await rig.until(lambda: rig.verdict("b") == ADMITTED)
            assert chosen(rig, "b") == ["gpu-0"]

    run_virtually(main())


def test_a_late_write_that_gives_a_device_away_again_becomes_no_job() -> None:
    async def main() -> None:
        async with leading(with_devices(4), policy=pinning()) as rig:
            rig.offer("a")
            await job_of(rig)
            policy = rig.kube.get_now(POLICIES, "lab")["metadata"]
            admission = make_admission(job="late-late-uid", policy_uid=policy["uid"], node="node-a")
            admission["assignments"] = rig.read()["status"]["admission"]["assignments"]
            said = [make_condition("Admitted", True, "Admitted")]
            rig.offer("late", status={"admission": admission, "conditions": said, "observedGeneration": 1})
            await rig.until(lambda: ("TaskOffer", "late", "Overbooked") in rig.events())
            await rig.until(lambda: rig.verdict("late") == ADMITTED)
            await rig.until(lambda: len(rig.kube.all(BATCH_JOBS)) == 2)
            assert (chosen(rig), chosen(rig, "late")) == (["gpu-0"], ["gpu-1"])

    run_virtually(main())


def world(*raw: Object, access: Access = Access.WATCHED) -> Devices:
    """Return the devices of a cluster with these claims, and a driver that publishes two."""
    made = Devices()
    made.tell(access)
    made.classes.replace([stored(make_device_class(), uid="class")], "10")
    made.slices.replace([stored(make_slice(devices=2), uid="slice")], "10")
    made.claims.replace([stored(one, uid=f"claim-{n}") for n, one in enumerate(raw)], "10")
    return made


def ours(**over: Any) -> Object:
    training = TrainingJob.model_validate(stored(make_training_job(gpus=1, offer_uid="o-uid"), uid="tj-uid"))
    made = resource_claim(training, pinned_attempt(device("gpu-0")), 1)
    assert made is not None
    return {**made, **over}


def pool(name: str | None = CLASS) -> Any:
    spec = make_policy(resources=[{**POOL, "deviceClassName": name}])["spec"]
    return CapacityPolicySpec.model_validate(spec).resources[0]


FIRST = (device_key(DRIVER, "node-a", "gpu-0"),)
WATCH_ONLY = allocated(make_resource_claim(), "gpu-0")
WATCH_ONLY["status"]["allocation"]["devices"]["results"][0]["adminAccess"] = True
COUNTED: dict[str, tuple[Object, tuple[str, tuple[str, ...]] | None]] = {
    "an unallocated foreign claim": (make_resource_claim(), None),
    "a foreign claim": (allocated(make_resource_claim(), "gpu-0"), ("claim:claim-0", FIRST)),
    "a foreign claim of one pod": (allocated(make_resource_claim(), "gpu-0", pods=["p"]), ("pod:p", FIRST)),
    "a foreign claim of two pods": (
        allocated(make_resource_claim(), "gpu-0", pods=["p", "q"]),
        ("claim:claim-0", FIRST),
    ),
    "a claim that only looks at the device": (WATCH_ONLY, None),
    "a foreign claim on what is not offered": (allocated(make_resource_claim(), "gpu-7"), None),
    "ours, before it is allocated": (ours(), ("o-uid", FIRST)),
    "ours, once it is": (allocated(ours(), "gpu-0"), ("o-uid", FIRST)),
}


@pytest.mark.parametrize("case", COUNTED)
def test_what_a_claim_has_is_counted(case: str) -> None:
    raw, expected = COUNTED[case]
    found = [(claim.holder, claim.devices) for claim in world(raw).charges(pool())]
    assert found == ([expected] if expected else [])


def test_claims_of_others_do_not_count_for_a_policy_that_pins_nothing() -> None:
    assert list(world(allocated(make_resource_claim(), "gpu-0")).charges(pool(None))) == []
    assert [claim.holder for claim in world(ours()).charges(None)] == ["o-uid"]


@pytest.mark.parametrize("odd", [{}, {"spec": None, "status": None}, {"status": {"allocation": {"devices": 1}}}])
@pytest.mark.parametrize("reduce", [resource_claim_entry, slice_entry, device_class_entry])
def test_odd_objects_are_reduced_all_the_same(reduce: Any, odd: Object) -> None:
    assert reduce({"metadata": {"name": "x", "uid": "u", "labels": None, "ownerReferences": None}, **odd}) is not None


@pytest.mark.parametrize(
    "devices",
    [None, [{}], [{"name": 3, "attributes": {"uuid": None, "x": {}}}], [{"name": "²", "taints": [1, {"effect": 2}]}]],
)
def test_odd_devices_are_not_offered(devices: Any) -> None:
    made = world()
    raw = stored(make_slice(), uid="odd")
    raw["spec"]["devices"] = devices
    made.slices.replace([raw], "20")
    assert made.problem(pool()) is None
    seen = made.seen(NodeView("node-a", 0, True), pool())
    assert (seen.allocatable, seen.devices) == (0, ())


# Whether there are devices at all


PROBLEMS: dict[str, tuple[Access, str | None, str | None]] = {
    "all there": (Access.WATCHED, CLASS, None),
    "nothing asked for": (Access.NOT_SERVED, None, None),
    "not served": (Access.NOT_SERVED, CLASS, "does not serve resource.k8s.io/v1: remove deviceClassName"),
    "not allowed": (Access.NOT_ALLOWED, CLASS, "apply deploy/devices.yaml"),
    "no such class": (Access.WATCHED, "tpu", f"there is no such DeviceClass ({CLASS})"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_policy_learns_why_its_gpus_cannot_be_pinned(case: str) -> None:
    access, name, expected = PROBLEMS[case]
    found = world(access=access).problem(pool(name))
    assert (found is None) == (expected is None)
    assert expected is None or (expected in str(found) and str(found).startswith("resources[nvidia.com/gpu]."))


def test_a_class_that_is_not_understood_or_cannot_be_named_is_a_problem() -> None:
    made = world()
    made.classes.replace([stored(make_device_class(CLASS, "device.driver != 'x'"), uid="other")], "30")
    assert "is not understood" in str(made.problem(pool()))
    plain = {**make_device(), "attributes": {"type": {"string": "gpu"}}}
    other = world()
    other.slices.replace([stored(make_slice(devices=[plain]), uid="slice", resource_version="20")], "20")
    assert "none of its 1 devices has a uuid or a pciBusID" in str(other.problem(pool()))


def test_where_devices_are_not_served_nothing_is_asked_for_and_nothing_changes() -> None:
    async def main() -> None:
        async with leading() as rig:
            rig.offer()
            await rig.until(lambda: rig.verdict() == ADMITTED)
            asked = {request.kind for request in rig.kube.requests}
            assert not asked & {"ResourceSlice", "DeviceClass", "ResourceClaim"}
            assert rig.session.world.complete
            assert "ResourceClaim" not in rig.replica.kinds
            assert "devices" not in rig.read()["status"]["admission"]["assignments"][0]

    run_virtually(main())


def test_a_policy_that_pins_gpus_where_nobody_may_read_them_says_what_to_do() -> None:
    async def main() -> None:
        async with leading(FakeKube(refuses_devices=FORBIDDEN), nodes={"node-a": 8}, policy=pinning()) as rig:
            rig.offer()
            await rig.until(lambda: rig.verdict() == ("False", "PolicyNotReady"))
            await rig.until(lambda: ("CapacityPolicy", "lab", "DevicesNotAvailable") in rig.events())
            (ready,) = [c for c in rig.kube.get_now(POLICIES, "lab")["status"]["conditions"] if c["type"] == "Ready"]
            assert (ready["status"], ready["reason"]) == ("False", "DevicesNotAvailable")
            assert "apply deploy/devices.yaml" in ready["message"]

    run_virtually(main())


def test_a_driver_that_comes_later_makes_the_policy_ready_and_one_that_goes_keeps_its_last_spec() -> None:
    async def main() -> None:
        kube = with_devices()
        kube.remove(DEVICE_CLASSES, CLASS)
        async with leading(kube, policy=pinning()) as rig:
            rig.offer()
            await rig.until(lambda: rig.verdict() == ("False", "PolicyNotReady"))
            rig.kube.put(DEVICE_CLASSES, make_device_class(), uid="again")
            await rig.until(lambda: rig.verdict() == ADMITTED)
            await rig.until(lambda: ready(rig) == ("True", "Ready"))
            rig.kube.remove(DEVICE_CLASSES, CLASS)
            await rig.until(lambda: ready(rig) == ("False", "DevicesNotAvailable"))
            assert "activeSpec" in rig.kube.get_now(POLICIES, "lab")["status"]

    run_virtually(main())


def ready(rig: Rig) -> tuple[str, str]:
    conditions = rig.kube.get_now(POLICIES, "lab").get("status", {}).get("conditions", [])
    return next(((c["status"], c["reason"]) for c in conditions if c["type"] == "Ready"), ("", ""))


def test_policies_that_name_different_classes_do_not_mix() -> None:
    made = World()
    made.devices = world()
    made.policies.replace(
        [
            stored(pinning(name="old"), uid="old", created="2026-01-31T12:00:00Z"),
            stored(make_policy(name="new", default=False), uid="new", created="2026-01-31T13:00:00Z"),
        ],
        "10",
    )
    views = made.policy_views()
    assert views["old"].spec is not None
    assert views["new"].spec is None
    assert f"nvidia.com/gpu of DeviceClass {CLASS}" in views["new"].problem


def test_no_cycle_runs_before_the_devices_were_listed() -> None:
    made = World()
    made.devices.tell(Access.WATCHED)
    assert len(made.stores) == 9
    for store in made.stores:
        assert not made.complete
        store.replace([], "1")
    assert made.complete


@pytest.mark.parametrize(
    ("error", "access"),
    [
        (None, Access.WATCHED),
        (NotFoundError(404, "NotFound", "x"), Access.NOT_SERVED),
        (FORBIDDEN, Access.NOT_ALLOWED),
    ],
)
def test_a_replica_finds_out_whether_it_may_read_devices(error: Any, access: Access) -> None:
    async def main() -> None:
        assert await find_access(FakeKube(refuses_devices=error)) is access  # type: ignore[arg-type]

    run_virtually(main())


@pytest.mark.parametrize("error", [ThrottledError(1), UnknownOutcomeError("no answer"), refused(401, "Unauthorized")])
def test_an_unclear_answer_about_devices_is_asked_for_again(error: Any) -> None:
    class Hesitating(FakeKube):
        async def probe(self, resource: Any) -> None:
            self.version += 1
            if self.version < 105:
                raise error

    async def main() -> None:
        assert await find_access(Hesitating()) is Access.WATCHED  # type: ignore[arg-type]

    run_virtually(main())


@pytest.mark.parametrize("wanted", [True, False])
def test_a_replica_leaves_when_the_devices_come_that_a_policy_asks_for(wanted: bool) -> None:
    async def main() -> None:
        kube = FakeKube(refuses_devices=FORBIDDEN)
        replica = make_replica(kube)
        world = replica.session.world
        world.devices.tell(Access.NOT_SERVED)
        world.policies.replace([stored(pinning() if wanted else make_policy(), uid="lab")], "10")
        looking = asyncio.create_task(until_devices_come(replica.session))
        await asyncio.sleep(2.5 * device_access._LOOK_AGAIN_SECONDS)
        assert world.devices.access is (Access.NOT_ALLOWED if wanted else Access.NOT_SERVED)
        kube.refuses_devices = None
        await asyncio.sleep(2 * device_access._LOOK_AGAIN_SECONDS)
        assert looking.done() is wanted
        if wanted:
            with pytest.raises(DevicesHaveComeError):
                await looking
        else:
            looking.cancel()

    run_virtually(main())


def test_kinds_that_are_watched_later_count_from_then_on() -> None:
    now = [0.0]
    flow = Flow(["Pod"], 20, lambda: now[0])
    now[0] = 40
    flow.heard("Pod", event=False)
    flow.watch(["Pod", "ResourceClaim"])
    now[0] = 80
    flow.heard("Pod", event=False)
    assert flow.problem() is None
    now[0] = 90
    assert str(flow.problem()).startswith("the watch of ResourceClaim has been silent")
