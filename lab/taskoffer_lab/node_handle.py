"""One node of a local cluster as its owner sees it: its GPUs can change and it can vanish."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from taskoffer_lab.api_client import MERGE_PATCH, ApiClient, ClientConfig
from taskoffer_lab.control_channel import ask
from taskoffer_lab.gpus import GpuInventory, inventory
from taskoffer_lab.nodes import gpus_shown, node_is_ready
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.state import ClusterRecord

SHOWN_SECONDS = 30.0
"""How long changed GPUs may take to show in the node's status; 1 to 2 s is usual."""

READY_SECONDS = 60.0


class Node:
    """A node of a local cluster."""

    def __init__(self, name: str, record: ClusterRecord, config: ClientConfig) -> None:
        self.name = name
        self._record = record
        self._api = ApiClient(config)

    @property
    def folder(self) -> Path:
        """The node's files."""
        return self._record.layout.node(self.name)

    @property
    def gpus(self) -> GpuInventory:
        """The node's GPUs as they are set now."""
        return GpuInventory.read(self._gpu_file)

    def get(self) -> dict[str, Any]:
        """Return the Node object from the API server."""
        found: dict[str, Any] = self._api.request("GET", f"/api/v1/nodes/{self.name}")
        return found

    def set_gpus(
        self,
        count: int | None = None,
        unhealthy: Collection[int] | None = None,
        replicas: int | None = None,
        *,
        wait: bool = True,
    ) -> GpuInventory:
        """Change the node's GPUs while it runs; what is None stays.

        Args:
            count: How many GPUs there are. A GPU keeps its UUID.
            unhealthy: Indices of the broken ones, from 0.
            replicas: Time-slicing replicas of each GPU.
            wait: Whether to wait until the node's status shows it.

        Raises:
            LabError: Impossible numbers, or the status did not follow within `SHOWN_SECONDS`.
        """
        old = self.gpus
        size = len(old.uuids) if count is None else count
        kept = {index for index in old.unhealthy if index < size}
        new = inventory(
            self._record.name,
            self.name,
            size,
            kept if unhealthy is None else unhealthy,
            old.replicas if replicas is None else replicas,
        )
        new.write(self._gpu_file)
        self._api.request("PATCH", f"/api/v1/nodes/{self.name}", {"metadata": {"labels": new.labels}}, MERGE_PATCH)
        if wait:
            what = f"{self.name} showing {new.allocatable} of {new.capacity} GPUs"
            wait_until(lambda: gpus_shown(self.get()["status"], new), what, SHOWN_SECONDS)
        return new

    def kill(self) -> None:
        """Let the node vanish, as when its power fails: all its processes end and its network is cut."""
        self._act("kill")

    def start(self, *, wait: bool = True) -> None:
        """Start a killed node again: same name and disks, as after a reboot."""
        self._act("start")
        if wait:
            self.wait_ready()

    def wait_ready(self, seconds: float = READY_SECONDS) -> float:
        """Wait until the node is Ready with its GPUs; returns the seconds it took."""
        gpus = self.gpus
        return wait_until(lambda: node_is_ready(self._api, self.name, gpus), f"{self.name} Ready", seconds)

    @property
    def _gpu_file(self) -> Path:
        return self.folder / "gpus.json"

    def _act(self, action: str) -> None:
        ask(self._record.layout.control, {"op": "node", "name": self.name, "action": action})
