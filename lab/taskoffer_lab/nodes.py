"""The nodes of one cluster as its supervisor holds them: each in namespaces of its own."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer_lab.api_client import ApiClient, ClientConfig
from taskoffer_lab.base_images import cached_archives
from taskoffer_lab.cgroups import create_groups, hierarchies, is_unified
from taskoffer_lab.control_channel import ask
from taskoffer_lab.controlplane import ControlPlane, program_path
from taskoffer_lab.debian import cni_folder, find_program
from taskoffer_lab.errors import LabError
from taskoffer_lab.gpus import RESOURCE, GpuInventory, inventory
from taskoffer_lab.host_changes import BOUND, PRIVATE, change_host
from taskoffer_lab.images.registry import registry_command
from taskoffer_lab.locking import locked
from taskoffer_lab.network import ClusterNetwork, connect_node, create_bridge, remove_cable
from taskoffer_lab.node_config import KERNEL_SETTINGS, NodeConfig
from taskoffer_lab.node_store import Slot, claim_slot
from taskoffer_lab.paths import package_root
from taskoffer_lab.process_table import Command, ProcessTable, wait_until
from taskoffer_lab.registry_hosts import write_hosts
from taskoffer_lab.registry_name import REGISTRY
from taskoffer_lab.state import claims_lock

READY_SECONDS = 90.0
"""How long a node may take to be Ready; 3 to 7 s is usual."""

_NAMESPACES_SECONDS = 10.0
PROCESSES = ("containerd", "kubelet", "kube-proxy", "gpu-device-plugin")
"""What runs inside a node; `NODE/kubelet` names one."""


@dataclass(frozen=True)
class _RunningNode:
    config: NodeConfig
    slot: Slot

    @property
    def control(self) -> Path:
        return self.config.folder / "ctl"

    @property
    def gpu_file(self) -> Path:
        return self.config.folder / "gpus.json"


class NodeSet:
    """Starts, kills and restarts the nodes of one cluster."""

    def __init__(self, plane: ControlPlane, table: ProcessTable) -> None:
        self._plane = plane
        self._table = table
        self._nodes: dict[str, _RunningNode] = {}
        self._unified = is_unified(hierarchies())

    @property
    def _network(self) -> ClusterNetwork:
        network = self._plane.network
        if network is None:
            raise LabError("this cluster has no nodes")
        return network

    def start_early(self) -> None:
        """Make networks and start every node up to containerd, which can come up beside the control plane."""
        record = self._plane.record
        if not record.spec.nodes:
            return
        with locked(claims_lock()):
            change_host()
        create_bridge(self._network)
        endpoint = self._start_registry() if record.spec.serve_registry else record.spec.registry_endpoint
        for index, name in enumerate(record.spec.node_names):
            slot = claim_slot()
            cni = cni_folder()
            if cni is None:
                raise LabError("no CNI plugins on this machine", "taskoffer-lab doctor")
            config = NodeConfig(record.spec, record.layout, self._network, name, index, slot.folder, cni)
            self._nodes[name] = _RunningNode(config, slot)
            config.write(unified_cgroups=self._unified)
            inventory(record.name, name, record.spec.gpus_per_node).write(self._nodes[name].gpu_file)
            if endpoint:
                write_hosts(config.folder, endpoint, self._network.host_address)
            self._start(self._nodes[name], clean_store=True)

    def _start_registry(self) -> str:
        record = self._plane.record
        address, port = self._network.host_address, record.ports["registry"]
        self._table.start(registry_command(address, port, record.layout.logs / "registry.log"))
        return f"http://{address}:{port}"

    def start_kubelets(self) -> None:
        """Start what talks to the API server, once that is ready; an early kubelet may wait a minute."""
        for node in self._nodes.values():
            self._start_kubelet(node)

    def wait_ready(self, check: Callable[[], None]) -> None:
        """Wait until every node is Ready with its GPUs."""
        client = ApiClient(ClientConfig.from_kubeconfig(self._plane.record.layout.admin_kubeconfig))
        for name, node in self._nodes.items():
            gpus = GpuInventory.read(node.gpu_file)
            wait_until(
                lambda name=name, gpus=gpus: node_is_ready(client, name, gpus),  # type: ignore[misc]
                f"node {name} Ready with {gpus.allocatable} GPUs",
                READY_SECONDS,
                check=lambda node=node: self._check(node, check),  # type: ignore[misc]
                interval=0.1,
            )

    def act(self, name: str, action: str) -> dict[str, Any]:
        """Kill a node (everything in it ends at once, as when the power fails) or start it again."""
        node = self._get(name)
        if action == "kill":
            self._table.stop(name, force=True)
            remove_cable(self._network, node.config.index)
        elif action == "start":
            remove_cable(self._network, node.config.index)
            self._start(node, clean_store=False)
            self._start_kubelet(node)
        elif action != "status":
            raise LabError(f"unknown action {action!r} for a node", "known: kill, start, status")
        return {"pid": self._table.act(name, "status")["pid"]}

    def act_inside(self, name: str, action: str) -> dict[str, Any]:
        """Do something to a process inside a node, named `NODE/PROCESS`."""
        node, _, process = name.partition("/")
        return ask(self._get(node).control, {"op": "process", "name": process, "action": action})

    def running(self) -> dict[str, bool]:
        """Return which nodes run."""
        return {name: self._table.alive(name) for name in self._nodes}

    def _get(self, name: str) -> _RunningNode:
        if name not in self._nodes:
            raise LabError(f"no node {name!r}", f"there are: {', '.join(self._nodes) or 'none'}")
        return self._nodes[name]

    def _check(self, node: _RunningNode, check: Callable[[], None]) -> None:
        check()
        ask(node.control, {"op": "check"})

    def _start(self, node: _RunningNode, *, clean_store: bool) -> None:
        config = node.config
        create_groups(config.cgroup)
        node.control.unlink(missing_ok=True)
        description = config.folder / "node.json"
        description.write_text(json.dumps(self._describe(node, clean_store=clean_store), indent=1))
        namespaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        program: list[str | Path] = [sys.executable, "-m", "taskoffer_lab.node_init", description]
        environment = {"PYTHONPATH": str(package_root()), "PYTHONUNBUFFERED": "1"}
        log = self._plane.record.layout.logs / config.name / "init.log"
        pid = self._table.start(
            Command(
                config.name,
                [find_program("unshare") or "unshare", *namespaces, "--", *program],
                log,
                environment,
                cwd=Path("/"),
                # The storage stays claimed until the last process of the node has ended.
                pass_descriptors=(node.slot.lock,),
            )
        )
        own = os.readlink("/proc/self/ns/net")
        wait_until(
            lambda: _network_namespace(pid) not in ("", own),
            f"network namespace of {config.name}",
            _NAMESPACES_SECONDS,
            check=lambda: self._alive_or_raise(node),
            interval=0.005,
        )
        connect_node(self._network, config.index, pid, self._plane.record.spec.nodes)

    def _start_kubelet(self, node: _RunningNode) -> None:
        wait_until(
            node.control.exists,
            f"containerd of {node.config.name}",
            READY_SECONDS,
            check=lambda: self._alive_or_raise(node),
        )
        ask(node.control, {"op": "start-kubelet"})

    def _alive_or_raise(self, node: _RunningNode) -> None:
        if not self._table.alive(node.config.name):
            log = self._plane.record.layout.logs / node.config.name / "init.log"
            tail = log.read_text(errors="replace").strip()[-1500:]
            raise LabError(f"node {node.config.name} ended while it started:\n{tail}")

    def _describe(self, node: _RunningNode, *, clean_store: bool) -> dict[str, Any]:
        config, tools, layout = node.config, self._plane.tools, self._plane.record.layout
        bind = {target: str(config.folder / source) for target, source in BOUND.items()}
        bind |= {f"/proc/sys/{name}": str(config.folder / "kernel" / name) for name in KERNEL_SETTINGS}
        clean = [[str(tools["node-store-clean"]), str(config.store), REGISTRY]] if clean_store else []
        return {
            "name": config.name,
            "folder": str(config.folder),
            "logs": str(layout.logs / config.name),
            "control": str(node.control),
            "path": program_path(tools.folders),
            "bind": bind,
            "private": list(PRIVATE),
            "before": clean,
            "images": {name: str(path) for name, path in cached_archives().items()},
            "containerd_client": [str(tools["ctr"]), "-a", str(config.socket)],
            "commands": self._commands(node),
        }

    def _commands(self, node: _RunningNode) -> dict[str, list[str]]:
        config, tools, layout = node.config, self._plane.tools, self._plane.record.layout
        gpus = GpuInventory.read(node.gpu_file)
        labels = ",".join(f"{key}={value}" for key, value in gpus.labels.items() if value is not None)
        kubelet = [
            str(tools["kubelet"]),
            f"--config={config.folder / 'kubelet.json'}",
            f"--kubeconfig={layout.kubeconfig(config.name)}",
            f"--hostname-override={config.name}",
            f"--node-ip={config.network.node_address(config.index)}",
            f"--cert-dir={config.folder / 'kubelet-pki'}",
            "--v=2",
        ]
        proxy = [str(tools["kube-proxy"]), f"--config={config.folder / 'kube-proxy.json'}"]
        return {
            "containerd": [str(tools["containerd"]), "-c", str(config.folder / "containerd.toml")],
            "gpu-device-plugin": [str(tools["gpu-device-plugin"]), str(node.gpu_file)],
            "kubelet": kubelet + ([f"--node-labels={labels}"] if labels else []),
            "kube-proxy": [*proxy, f"--hostname-override={config.name}"],
        }


def node_is_ready(client: ApiClient, name: str, gpus: GpuInventory) -> bool:
    """Whether a node is Ready and its status shows these GPUs; False also when nobody answers."""
    try:
        status, content = client.raw("GET", f"/api/v1/nodes/{name}")
    except OSError:
        return False
    if status != 200:
        return False
    found = json.loads(content)["status"]
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in found.get("conditions", []))
    return ready and gpus_shown(found, gpus)


def gpus_shown(status: dict[str, Any], gpus: GpuInventory) -> bool:
    """Whether a node's status shows these GPUs as capacity and allocatable."""
    capacity = int(status.get("capacity", {}).get(RESOURCE, 0))
    allocatable = int(status.get("allocatable", {}).get(RESOURCE, 0))
    return (capacity, allocatable) == (gpus.capacity, gpus.allocatable)


def _network_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except FileNotFoundError:
        return ""
