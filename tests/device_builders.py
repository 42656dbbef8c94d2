"""Builders of what a DRA driver and its users put into a cluster: DeviceClasses, ResourceSlices, ResourceClaims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Object = dict[str, Any]

DRIVER = "gpu.nvidia.com"
CLASS = "gpu.nvidia.com"
API = "/apis/resource.k8s.io/v1"
DRA = "resource.k8s.io/v1"


def make_device_class(name: str = CLASS, *expressions: str) -> Object:
    """Return a DeviceClass; without expressions the one that ships with the NVIDIA driver."""
    usual = (f"device.driver == '{DRIVER}' && device.attributes['{DRIVER}'].type == 'gpu'",)
    selectors = [{"cel": {"expression": text}} for text in expressions or usual]
    return {"apiVersion": DRA, "kind": "DeviceClass", "metadata": {"name": name}, "spec": {"selectors": selectors}}


def make_device(
    name: str = "gpu-0", node: str = "node-a", *, root: str | None = None, taint: str | None = None, **over: Any
) -> Object:
    """Return a device of a ResourceSlice as the NVIDIA driver publishes it; ``over`` replaces fields."""
    attributes: Object = {
        "type": {"string": "gpu"},
        "uuid": {"string": f"GPU-{node}-{name}"},
        "productName": {"string": "NVIDIA H100 80GB HBM3"},
        "driverVersion": {"version": "570.148.8"},
    }
    if root is not None:
        attributes["resource.kubernetes.io/pcieRoot"] = {"string": root}
    made: Object = {"name": name, "attributes": attributes, "capacity": {"memory": {"value": "81559Mi"}}}
    if taint is not None:
        made["taints"] = [{"key": "gpu.nvidia.com/xid", "value": "79", "effect": taint}]
    return {**made, **over}


def make_slice(
    node: str = "node-a",
    devices: int | Sequence[Object] = 8,
    *,
    name: str | None = None,
    generation: int = 1,
    slices: int = 1,
    driver: str = DRIVER,
    **spec: Any,
) -> Object:
    """Return a ResourceSlice with so many devices, or with these."""
    made = [make_device(f"gpu-{n}", node) for n in range(devices)] if isinstance(devices, int) else list(devices)
    pool = {"name": node, "generation": generation, "resourceSliceCount": slices}
    full = {"driver": driver, "nodeName": node, "pool": pool, "devices": made, **spec}
    metadata = {"name": name or f"{node}-{driver}-{generation}"}
    return {"apiVersion": DRA, "kind": "ResourceSlice", "metadata": metadata, "spec": full}


def make_resource_claim(
    name: str = "theirs", namespace: str = "default", *, count: int = 1, selector: str | None = None
) -> Object:
    """Return a ResourceClaim of somebody else."""
    exactly: Object = {"deviceClassName": CLASS, "allocationMode": "ExactCount", "count": count}
    if selector is not None:
        exactly["selectors"] = [{"cel": {"expression": selector}}]
    return {
        "apiVersion": DRA,
        "kind": "ResourceClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"devices": {"requests": [{"name": "mine", "exactly": exactly}]}},
    }


def allocated(claim: Object, *names: str, pool: str = "node-a", pods: Sequence[str] = ()) -> Object:
    """Return a ResourceClaim to which devices were allocated, reserved for pods of these UIDs."""
    results = [{"request": "mine", "driver": DRIVER, "pool": pool, "device": name} for name in names]
    status: Object = {"allocation": {"devices": {"results": results}}}
    if pods:
        status["reservedFor"] = [{"resource": "pods", "name": uid, "uid": uid} for uid in pods]
    return {**claim, "status": status}
