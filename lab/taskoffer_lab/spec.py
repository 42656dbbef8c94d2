"""What a cluster shall be like, and where its files are."""

import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from taskoffer_lab.errors import LabError

MOST_NODES = 16
"""Real nodes of one cluster; more wants KWOK nodes beside a real one."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_name() -> str:
    """Return a cluster name that nobody else has."""
    return f"lab-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class ClusterSpec:
    """A wish for a cluster.

    Attributes:
        name: Unique among running clusters; at most 20 characters of a-z, 0-9 and `-`.
        nodes: Real nodes, named node-a, node-b, …; 0 is a control plane on loopback that needs no root.
        gpus_per_node: Simulated `nvidia.com/gpu` of each node at the start.
        node_monitor_grace_seconds: After how long without a heartbeat a node counts as lost (Kubernetes'
            default is 50); short ones make nodes send heartbeats more often.
        unreachable_toleration_seconds: How long pods stay bound to a lost node before they are evicted
            (Kubernetes' default is 300).
        registry_endpoint: `http://HOST:PORT` of the lab's image registry; the host 0.0.0.0 becomes the
            host's address on the cluster's bridge.
        serve_registry: Whether the cluster's supervisor serves the lab's images itself, on the bridge, for as long
            as the cluster lives; then `registry_endpoint` must be None.
        detached: Whether it lives on when the process that started it ends.
        priority_and_fairness: Whether the API server queues by priority and fairness, as by default, or only
            by its limits of requests in flight.
    """

    name: str = field(default_factory=random_name)
    nodes: int = 0
    gpus_per_node: int = 8
    node_monitor_grace_seconds: int = 50
    unreachable_toleration_seconds: int = 300
    registry_endpoint: str | None = None
    serve_registry: bool = False
    detached: bool = False
    priority_and_fairness: bool = True

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise LabError(f"cluster name {self.name!r} is not allowed", "at most 20 characters: a-z, 0-9 and - inside")
        if not 0 <= self.nodes <= MOST_NODES:
            raise LabError(f"{self.nodes} nodes: 0 to {MOST_NODES} are possible")
        if self.serve_registry and (self.registry_endpoint or not self.nodes):
            raise LabError("serve_registry needs nodes and no registry_endpoint beside it")
        if self.gpus_per_node < 0:
            raise LabError(f"{self.gpus_per_node} GPUs per node: must be 0 or more")
        if self.node_monitor_grace_seconds < 4:
            raise LabError(
                f"node_monitor_grace_seconds {self.node_monitor_grace_seconds} is below 4:"
                " healthy nodes would be called lost between two heartbeats"
            )

    @property
    def node_names(self) -> list[str]:
        """The nodes' names in order."""
        return [f"node-{_LETTERS[index]}" for index in range(self.nodes)]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ClusterSpec":
        """Read what `to_json` wrote."""
        return ClusterSpec(**content)


@dataclass(frozen=True)
class Layout:
    """The files of one cluster.

    Attributes:
        root: Its folder below the state folder.
    """

    root: Path

    @property
    def record(self) -> Path:
        """What is known of it, for other processes (see `state.ClusterRecord`)."""
        return self.root / "cluster.json"

    @property
    def control(self) -> Path:
        """The supervisor's socket."""
        return self.root / "ctl"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"

    @property
    def admin_kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.kubeconfig("admin")

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of one of the cluster's users."""
        return self.root / f"{user}.kubeconfig"

    def node(self, name: str) -> Path:
        """The folder of one node."""
        return self.root / name
