"""Simulated GPUs of a node: the device plugin's state file and the labels of GPU feature discovery."""

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError

RESOURCE = "nvidia.com/gpu"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "gpus.lab.taskoffer.dev")
_PREFIX = "nvidia.com"

# What GPU feature discovery 0.17 (gpu-feature-discovery/README of NVIDIA/k8s-device-plugin) sets on an 8xH100
# machine with driver 570.124.06; count, replicas and sharing are added below.
_H100_LABELS = {
    "cuda.driver-version.full": "570.124.06",
    "cuda.driver-version.major": "570",
    "cuda.driver-version.minor": "124",
    "cuda.driver-version.revision": "06",
    "cuda.driver.major": "570",
    "cuda.driver.minor": "124",
    "cuda.driver.rev": "06",
    "cuda.runtime-version.full": "12.8",
    "cuda.runtime-version.major": "12",
    "cuda.runtime-version.minor": "8",
    "cuda.runtime.major": "12",
    "cuda.runtime.minor": "8",
    "gpu.compute.major": "9",
    "gpu.compute.minor": "0",
    "gpu.family": "hopper",
    "gpu.machine": "DGXH100",
    "gpu.memory": "81559",
    "gpu.mode": "compute",
    "gpu.present": "true",
    "mig.capable": "true",
    "mig.strategy": "single",
    "mps.capable": "false",
    "vgpu.present": "false",
}
_PRODUCT = "NVIDIA-H100-80GB-HBM3"


@dataclass(frozen=True)
class GpuInventory:
    """The GPUs of one node.

    Attributes:
        uuids: One per GPU, in order.
        unhealthy: Indices of broken ones.
        replicas: Time-slicing replicas of each GPU; 1 is exclusive use.
    """

    uuids: tuple[str, ...]
    unhealthy: frozenset[int] = frozenset()
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise LabError(f"replicas is {self.replicas}, must be at least 1")
        unknown = sorted(index for index in self.unhealthy if not 0 <= index < len(self.uuids))
        if unknown:
            raise LabError(f"no GPU {unknown} on a node of {len(self.uuids)} GPUs (counted from 0)")

    @property
    def capacity(self) -> int:
        """What the node's status says as capacity of `nvidia.com/gpu`."""
        return len(self.uuids) * self.replicas

    @property
    def allocatable(self) -> int:
        """What it says as allocatable: replicas of healthy GPUs."""
        return (len(self.uuids) - len(self.unhealthy)) * self.replicas

    @property
    def labels(self) -> dict[str, str | None]:
        """The node's labels; None removes a label that does not fit (any more)."""
        count = len(self.uuids)
        shared = self.replicas > 1
        labels: dict[str, str | None] = {
            **_H100_LABELS,
            "gpu.count": str(count),
            "gpu.product": f"{_PRODUCT}-SHARED" if shared else _PRODUCT,
            "gpu.replicas": str(self.replicas),
            "gpu.sharing-strategy": "time-slicing" if shared else "none",
        }
        if not count:
            labels = dict.fromkeys(labels, None)
        return {f"{_PREFIX}/{name}": value for name, value in labels.items()}

    def write(self, path: Path) -> None:
        """Write the device plugin's state file, atomically; a running plugin follows within 0.1 s."""
        devices = [{"uuid": uuid_, "healthy": index not in self.unhealthy} for index, uuid_ in enumerate(self.uuids)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"replicas": self.replicas, "devices": devices}, indent=1))
        temporary.replace(path)

    @staticmethod
    def read(path: Path) -> "GpuInventory":
        """Read what `write` wrote."""
        content = json.loads(path.read_text())
        devices = content["devices"]
        return GpuInventory(
            uuids=tuple(device["uuid"] for device in devices),
            unhealthy=frozenset(index for index, device in enumerate(devices) if not device["healthy"]),
            replicas=content["replicas"],
        )


def gpu_uuids(cluster: str, node: str, count: int) -> tuple[str, ...]:
    """Return UUIDs in the driver's form (`GPU-xxxxxxxx-…`), always the same ones for the same GPU."""
    return tuple(f"GPU-{uuid.uuid5(_NAMESPACE, f'{cluster}/{node}/{index}')}" for index in range(count))


def inventory(cluster: str, node: str, count: int, unhealthy: Collection[int] = (), replicas: int = 1) -> GpuInventory:
    """Return the inventory of a node with `count` GPUs."""
    return GpuInventory(gpu_uuids(cluster, node, count), frozenset(unhealthy), replicas)
