"""What tests of pinned GPUs do on a bench: nodes whose devices a driver publishes, claims, foreign pods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from device_builders import API, CLASS, make_device_class, make_slice
from operator_bench import SECONDS, Bench
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.install import project_root
from taskoffer_lab.process_table import wait_until

Object = dict[str, Any]

GPU = "nvidia.com/gpu"
RIGHTS = str(project_root() / "deploy" / "devices.yaml")


@contextmanager
def a_driver(cluster: Cluster) -> Iterator[None]:
    """Bring the DeviceClass that a driver brings, for a while."""
    cluster.api.request("POST", f"{API}/deviceclasses", make_device_class())
    try:
        yield
    finally:
        cluster.api.request("DELETE", f"{API}/deviceclasses/{CLASS}")


def device_node(bench: Bench, name: str = "a", devices: int = 8, **spec: Any) -> str:
    """Add a node without a device plugin whose devices a DRA driver publishes; return its full name."""
    node = bench.node(name, gpus=0)
    publish(bench, make_slice(node, devices, **spec))
    return node


def publish(bench: Bench, made: Object) -> None:
    """Publish a ResourceSlice as a driver does."""
    bench.api.request("POST", f"{API}/resourceslices", made)
    bench.clean_up(f"{API}/resourceslices/{made['metadata']['name']}")


def pinning(bench: Bench, *, ready: str = "Ready", **fields: Any) -> Object:
    """Create the bench's policy with pinned GPUs, and wait until its Ready condition gives this reason."""
    pool = {"name": GPU, "counts": [1, 2, 4], "deviceClassName": CLASS}
    made = bench.make_policy(resources=[pool], **fields)
    bench.api.request("POST", "/apis/taskoffer.dev/v1alpha1/capacitypolicies", made)
    return bench.policy_condition("Ready", ready)


def claims(bench: Bench) -> list[Object]:
    """Return the ResourceClaims of the bench's namespace by name."""
    found = bench.api.request("GET", bench.path("resourceclaims", api=API))["items"]
    return sorted(found, key=lambda claim: str(claim["metadata"]["name"]))


def allocation(claim: Object) -> list[str]:
    """Return the devices that the scheduler gave to a claim."""
    results = claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", [])
    return sorted(result["device"] for result in results)


def chosen(offer: Object) -> list[str]:
    """Return the devices that the operator chose for an offer."""
    (assignment,) = offer["status"]["admission"]["assignments"]
    assert assignment["deviceClassName"] == CLASS
    assert len(assignment["devices"]) == assignment["count"]
    return sorted(device["name"] for device in assignment["devices"])


def foreign_pod(bench: Bench, name: str, node: str, claim: str) -> None:
    """Create a pod of somebody else that uses a ResourceClaim, for the scheduler to place on a node."""
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    container = {"name": "trainer", "image": "foreign.invalid/x", "resources": {"claims": [{"name": "g"}]}}
    spec = {
        "affinity": {"nodeAffinity": required},
        "containers": [container],
        "resourceClaims": [{"name": "g", "resourceClaimName": claim}],
    }
    bench.api.request("POST", bench.path("pods", api="/api/v1"), {"metadata": {"name": name}, "spec": spec})


def until_allocated(bench: Bench, name: str) -> list[str]:
    """Wait until a claim has its devices; return them."""
    path = bench.path("resourceclaims", name, api=API)
    wait_until(lambda: bool(allocation(bench.api.request("GET", path))), f"claim {name} allocated", SECONDS)
    return allocation(bench.api.request("GET", path))


def until_no_claims(bench: Bench) -> None:
    """Wait until no ResourceClaim is left in the bench's namespace."""
    wait_until(lambda: not claims(bench), "no claims left", SECONDS)
