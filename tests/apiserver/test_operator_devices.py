"""Pinned GPUs on a real API server with the real scheduler: the chosen devices are allocated, and no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device_bench import (
    GPU,
    RIGHTS,
    a_driver,
    allocation,
    chosen,
    claims,
    device_node,
    foreign_pod,
    pinning,
    publish,
    until_allocated,
    until_no_claims,
)
from device_builders import API, CLASS, DRIVER, make_device, make_device_class, make_resource_claim, make_slice
from operator_bench import SECONDS, Bench, condition
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until


@pytest.fixture(scope="module", autouse=True)
def devices_allowed(operator_home: LocalCluster) -> Iterator[None]:
    """The rights that ship for pinning, before the operator starts, and a driver's DeviceClass."""
    operator_home.kubectl("apply", "--server-side", "-f", RIGHTS)
    with a_driver(operator_home):
        yield
    operator_home.kubectl("delete", "-f", RIGHTS)


@pytest.fixture
def pinned(bench: Bench, operator: object) -> Bench:
    """A bench whose policy pins GPUs."""
    return bench


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_scheduler_allocates_exactly_the_devices_that_were_chosen(pinned: Bench, gpus: int) -> None:
    bench, node = pinned, device_node(pinned)
    pinning(bench)
    offer = bench.admitted("train", gpus)
    bench.bound_pod("train")
    (pod,), (claim,) = bench.pods(offer), claims(bench)
    assert pod["spec"]["nodeName"] == node
    assert allocation(claim) == chosen(offer) == [f"gpu-{n}" for n in range(gpus)]
    assert [user["uid"] for user in claim["status"]["reservedFor"]] == [pod["metadata"]["uid"]]
    (container,) = pod["spec"]["containers"]
    assert GPU not in container["resources"]["limits"]
    assert container["resources"]["claims"] == [{"name": "gpus"}]
    training = bench.training_job("train")
    (owner,) = claim["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("TrainingJob", training["metadata"]["uid"])
    assert claim["metadata"]["name"] == f"{training['metadata']['name']}-1"
    bench.booked(node, gpus)


def test_no_device_is_given_to_two_offers_and_each_pod_gets_its_own(pinned: Bench) -> None:
    bench = pinned
    device_node(bench, "a", 4)
    device_node(bench, "b", 4)
    pinning(bench)
    names = [f"t{n}" for n in range(4)]
    for name in names:
        bench.offer(name, 2)
    offers = [bench.decided(name, "Admitted") for name in names]
    bench.offer("late", 1)
    bench.decided("late", "WaitingForCapacity")
    for name in names:
        bench.bound_pod(name)
    used = [
        (offer["status"]["admission"]["assignments"][0]["nodeName"], device)
        for offer in offers
        for device in chosen(offer)
    ]
    assert len(set(used)) == len(used) == 8
    by_job = {claim["metadata"]["labels"]["taskoffer.dev/job"]: allocation(claim) for claim in claims(bench)}
    assert by_job == {offer["status"]["admission"]["jobName"]: chosen(offer) for offer in offers}


def test_a_device_of_somebody_elses_claim_is_never_taken(pinned: Bench) -> None:
    bench, node = pinned, device_node(pinned, "a", 4)
    third = f'device.attributes["{DRIVER}"].uuid == "GPU-{node}-gpu-0"'
    bench.api.request(
        "POST", bench.path("resourceclaims", api=API), make_resource_claim("theirs", bench.namespace, selector=third)
    )
    foreign_pod(bench, "foreign", node, "theirs")
    assert until_allocated(bench, "theirs") == ["gpu-0"]
    pinning(bench)
    bench.booked(node, 1)
    offer = bench.admitted("mine", 2)
    assert chosen(offer) == ["gpu-2", "gpu-3"]
    bench.bound_pod("mine")
    bench.offer("more", 2)
    bench.decided("more", "WaitingForCapacity")
    single = bench.admitted("single", 1)
    assert chosen(single) == ["gpu-1"]
    bench.bound_pod("single")
    bench.kubelet.release(bench.namespace, "foreign")
    bench.booked(node, 3)


def test_the_claim_is_gone_after_the_job_and_its_devices_are_handed_out_again(pinned: Bench) -> None:
    bench, node = pinned, device_node(pinned, "a", 2)
    pinning(bench)
    first = bench.admitted("first", 2)
    bench.offer("second", 2)
    bench.decided("second", "WaitingForCapacity")
    bench.end(bench.run("first"))
    bench.finished("first", "Succeeded")
    second = bench.decided("second", "Admitted")
    assert chosen(second) == chosen(first)
    bench.end(bench.run("second"))
    bench.finished("second", "Succeeded")
    until_no_claims(bench)
    bench.booked(node, 0)


def test_another_attempt_has_a_claim_of_its_own_on_the_same_devices(pinned: Bench) -> None:
    bench = pinned
    device_node(bench, "a", 4)
    pinning(bench)
    offer = bench.admitted("flaky", 2)
    bench.end(bench.run("flaky"), 1, "boom")
    bench.run("flaky", attempt=2)
    name = offer["status"]["admission"]["jobName"]
    wait_until(lambda: [c["metadata"]["name"] for c in claims(bench)] == [f"{name}-2"], "the first is gone", SECONDS)
    (claim,) = claims(bench)
    assert allocation(claim) == chosen(offer)


def test_devices_of_a_deleted_offer_stay_taken_until_its_pod_has_ended(pinned: Bench) -> None:
    bench, node = pinned, device_node(pinned, "a", 2)
    pinning(bench)
    bench.admitted("first", 2)
    pod = bench.run("first")
    bench.offer("second", 2)
    bench.decided("second", "WaitingForCapacity")
    bench.delete("first")
    bench.asked_to_stop(pod)
    bench.booked(node, 2)
    bench.offer("third", 2, model="microsoft/phi-4")
    bench.decided("third", "WaitingForCapacity")
    assert condition(bench.get("second"), "Admitted")["reason"] == "WaitingForCapacity"
    bench.end(pod, 143)
    bench.decided("second", "Admitted")
    bench.bound_pod("second")


def test_an_attempt_whose_device_was_withdrawn_goes_on_with_others(pinned: Bench) -> None:
    bench, node = pinned, device_node(pinned, "a", 2)
    pinning(bench)
    offer = bench.admitted("moved", 1)
    assert chosen(offer) == ["gpu-0"]
    pod = bench.run("moved")
    newer = make_slice(node, 2, generation=2)
    newer["spec"]["devices"][0]["taints"] = [{"key": "gpu.nvidia.com/gpu-lost", "effect": "NoSchedule"}]
    publish(bench, newer)
    bench.policy_until(
        lambda p: any(n["allocatable"] == 1 for n in p["status"]["capacity"]["nodes"]), "one device is left"
    )
    bench.end(pod, 1, "lost its GPU")
    bench.bound_pod("moved", attempt=2)
    last = bench.training_job("moved")["status"]["attempts"][-1]
    assert [device["name"] for device in last["assignments"][0]["devices"]] == ["gpu-1"]


def test_a_policy_without_its_device_class_is_not_ready_until_that_comes(pinned: Bench) -> None:
    bench = pinned
    device_node(bench, "a", 2)
    name = f"{bench.namespace}.example.com"
    pool = {"name": GPU, "counts": [1, 2, 4], "deviceClassName": name}
    bench.api.request("POST", "/apis/taskoffer.dev/v1alpha1/capacitypolicies", bench.make_policy(resources=[pool]))
    policy = bench.policy_condition("Ready", "DevicesNotAvailable")
    message = condition(policy, "Ready")["message"]
    assert "there is no such DeviceClass" in message
    assert CLASS in message
    bench.offer("waits", 1)
    bench.decided("waits", "PolicyNotReady")
    bench.api.request("POST", f"{API}/deviceclasses", make_device_class(name, f"device.driver == '{DRIVER}'"))
    bench.clean_up(f"{API}/deviceclasses/{name}")
    bench.policy_condition("Ready", "Ready")
    bench.decided("waits", "Admitted")
    bench.bound_pod("waits")


def test_devices_that_are_named_by_different_attributes_are_allocated_together(pinned: Bench) -> None:
    bench = pinned
    node = bench.node("a", gpus=0)
    plain, other = make_device("gpu-0", node), make_device("gpu-1", node)
    del other["attributes"]["uuid"]
    other["attributes"]["resource.kubernetes.io/pciBusID"] = {"string": "0000:3b:00.0"}
    stranger = {"name": "nic-0", "attributes": {"speed": {"int": 400}}}
    publish(bench, make_slice(node, [plain, other, stranger]))
    pinning(bench)
    offer = bench.admitted("mixed", 2)
    bench.bound_pod("mixed")
    (claim,) = claims(bench)
    assert allocation(claim) == chosen(offer) == ["gpu-0", "gpu-1"]


def test_a_foreign_pod_whose_request_becomes_a_claim_is_charged_once(pinned: Bench) -> None:
    bench, node = pinned, device_node(pinned, "a", 4)
    bridge = make_device_class(f"{bench.namespace}.bridge")
    bridge["spec"]["extendedResourceName"] = GPU
    bench.api.request("POST", f"{API}/deviceclasses", bridge)
    bench.clean_up(f"{API}/deviceclasses/{bench.namespace}.bridge")
    pinning(bench)
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    container = {"name": "trainer", "image": "foreign.invalid/x", "resources": {"limits": {GPU: "2"}}}
    spec = {"affinity": {"nodeAffinity": required}, "containers": [container]}
    bench.api.request("POST", bench.path("pods", api="/api/v1"), {"metadata": {"name": "bridged"}, "spec": spec})
    wait_until(lambda: any(allocation(claim) for claim in claims(bench)), "the request became a claim", SECONDS)
    bench.booked(node, 2)
    (theirs,) = claims(bench)
    offer = bench.admitted("mine", 2)
    bench.bound_pod("mine")
    assert set(allocation(theirs)) | set(chosen(offer)) == {f"gpu-{n}" for n in range(4)}
    bench.booked(node, 4)


def test_a_policy_cannot_both_pin_gpus_and_share_them_out(pinned: Bench) -> None:
    pool = {"name": GPU, "counts": [1], "deviceClassName": CLASS, "unitsPerGpu": 2}
    sizes = [{**size, "gpus": 1} for size in pinned.make_policy()["spec"]["sizeClasses"]]
    made = pinned.make_policy(resources=[pool], size_classes=sizes)
    with pytest.raises(ApiError, match="deviceClassName pins whole GPUs and unitsPerGpu shares them out"):
        pinned.api.request("POST", "/apis/taskoffer.dev/v1alpha1/capacitypolicies", made)
