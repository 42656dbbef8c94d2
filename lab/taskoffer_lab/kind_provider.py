"""The kind provider, for machines with Docker. It was written without one at hand: only its rendering is tested.

GPUs are extended resources written into the nodes' status, so they are counted by scheduler and kubelet but
have neither UUIDs nor health; use the local provider for those.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from taskoffer_lab.cluster import Cluster
from taskoffer_lab.errors import LabError
from taskoffer_lab.gpus import RESOURCE, inventory
from taskoffer_lab.paths import state_root
from taskoffer_lab.progress import step
from taskoffer_lab.spec import ClusterSpec
from taskoffer_lab.tool_catalog import KUBERNETES_VERSION
from taskoffer_lab.toolchain import ensure_tools

NODE_IMAGE = f"kindest/node:{KUBERNETES_VERSION}"
_PREFIX = "taskoffer-"


def render_config(spec: ClusterSpec) -> dict[str, Any]:
    """Return kind's configuration: a control plane and `spec.nodes` workers with the labels of H100 nodes."""
    workers = []
    for name in spec.node_names:
        labels = inventory(spec.name, name, spec.gpus_per_node).labels
        kept = {key: value for key, value in labels.items() if value is not None}
        workers.append({"role": "worker", "image": NODE_IMAGE, "labels": kept})
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "nodes": [{"role": "control-plane", "image": NODE_IMAGE}, *workers],
    }


def render_gpu_patch(count: int) -> list[dict[str, str]]:
    """Return the JSON patch of a node's status that advertises `count` GPUs as an extended resource."""
    path = "/status/capacity/" + RESOURCE.replace("/", "~1")
    return [{"op": "add", "path": path, "value": str(count)}]


class KindCluster(Cluster):
    """A cluster that kind made."""

    def down(self, *, keep_logs: bool = False) -> Path | None:
        """Delete the cluster; with `keep_logs` kind's export of them comes first."""
        kept = None
        if keep_logs:
            kept = self.kubeconfig.parent / f"{self.name}-kind-logs"
            _kind("export", "logs", str(kept), "--name", _PREFIX + self.name)
        _kind("delete", "cluster", "--name", _PREFIX + self.name)
        self.kubeconfig.unlink(missing_ok=True)
        return kept


class KindProvider:
    """Makes clusters with kind."""

    name = "kind"

    def up(self, spec: ClusterSpec) -> Cluster:
        """Create a kind cluster; it lives until `down`, whatever `spec.detached` says.

        Raises:
            LabError: kind or Docker is missing, or kind failed.
        """
        for program in ("kind", "docker"):
            if shutil.which(program) is None:
                raise LabError(f"the kind provider needs {program}, which is not on PATH", "--provider local")
        kubectl = ensure_tools(["kubectl"])["kubectl"]
        kubeconfig = state_root() / f"{spec.name}.kind.kubeconfig"
        arguments = ["create", "cluster", "--name", _PREFIX + spec.name, "--config", "-", "--wait", "180s"]
        with step(f"kind create cluster {spec.name}"):
            _kind(*arguments, "--kubeconfig", str(kubeconfig), stdin=json.dumps(render_config(spec)))
        cluster = KindCluster(spec.name, kubeconfig, kubectl, [])
        for node in cluster.kubectl("get", "nodes", "-l", f"{RESOURCE}.present", "-o", "name").split():
            patch = json.dumps(render_gpu_patch(spec.gpus_per_node))
            cluster.kubectl("patch", node, "--subresource=status", "--type=json", "-p", patch)
        return cluster


def _kind(*arguments: str, stdin: str | None = None) -> None:
    result = subprocess.run(["kind", *arguments], input=stdin, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LabError(f"kind {' '.join(arguments)} failed: {result.stderr.strip()[-1500:]}", "docker info")
