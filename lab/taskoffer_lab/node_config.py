"""The files that a node's programs read: containerd, CNI, kubelet, kube-proxy. Pure rendering."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer_lab.network import ClusterNetwork
from taskoffer_lab.registry_hosts import hosts_folder
from taskoffer_lab.registry_name import PAUSE_IMAGE
from taskoffer_lab.spec import ClusterSpec, Layout

HEARTBEATS_PER_GRACE = 5
"""How many heartbeats fit into the grace period after which a node counts as lost."""

_DEFAULT_LEASE_SECONDS = 40  # Kubernetes' default; the kubelet renews after a quarter of it.
_RENEWALS_PER_LEASE = 4

KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""What a kubelet insists on (setupKernelTunables in its container manager) and would set for the whole
machine; files with these values are mounted over /proc/sys inside the node instead."""


@dataclass(frozen=True)
class NodeConfig:
    """Everything about one node that its files are rendered from.

    Attributes:
        spec: The cluster's.
        layout: The cluster's files.
        network: The cluster's networks.
        name: The node's name.
        index: Its place in the cluster, from 0.
        store: containerd's persistent folder.
        cni_folder: The folder of the CNI plugins.
    """

    spec: ClusterSpec
    layout: Layout
    network: ClusterNetwork
    name: str
    index: int
    store: Path
    cni_folder: Path

    @property
    def folder(self) -> Path:
        """The node's folder."""
        return self.layout.node(self.name)

    @property
    def socket(self) -> Path:
        """Containerd's socket."""
        return self.folder / "cd.sock"

    @property
    def cgroup(self) -> str:
        """The node's control group."""
        return f"{self.network.cgroup}/{self.name}"

    def containerd(self) -> str:
        """Return containerd's configuration.

        Layers are dropped once they are unpacked (only the local pull does that), which halves an image's
        size on disk; the OOM score is left alone because many containers lack the privilege to lower it.
        """
        cri = "io.containerd.cri.v1"
        return f"""version = 3
root = {_toml(self.store)}
state = {_toml(self.folder / "containerd")}
imports = []

[grpc]
  address = {_toml(self.socket)}

[plugins."{cri}.images"]
  snapshotter = "overlayfs"
  discard_unpacked_layers = true
  use_local_image_pull = true
[plugins."{cri}.images".pinned_images]
  sandbox = {_toml(PAUSE_IMAGE)}
[plugins."{cri}.images".registry]
  config_path = {_toml(hosts_folder(self.folder))}

[plugins."{cri}.runtime"]
  restrict_oom_score_adj = true
[plugins."{cri}.runtime".cni]
  bin_dirs = [{_toml(self.cni_folder)}]
  conf_dir = {_toml(self.folder / "cni")}
[plugins."{cri}.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.internal.v1.opt"]
  path = {_toml(self.folder / "opt")}
[plugins."io.containerd.nri.v1.nri"]
  disable = true
"""

    def cni(self) -> dict[str, Any]:
        """Return the pods' network: a bridge inside the node; the world is reached through the host."""
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.network.node_pods(self.index)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.folder / "ipam"),
        }
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "ipam": addresses}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, {"type": "loopback"}]}

    def kubelet(self, *, unified_cgroups: bool) -> dict[str, Any]:
        """Return the kubelet's configuration.

        Status is computed every second, so that changed GPUs show at once, but written only when it changed
        or once a minute. Images are never removed for want of disk space: the store is pruned by the lab.
        An image that is there needs no pull to prove a right to it, also under a second name.
        """
        pki, grace = self.layout.pki, self.spec.node_monitor_grace_seconds
        lease = min(_DEFAULT_LEASE_SECONDS, max(1, _RENEWALS_PER_LEASE * grace // HEARTBEATS_PER_GRACE))
        config: dict[str, Any] = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.network.node_address(self.index),
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
                "webhook": {"enabled": True},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "evictionHard": {},
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "imagePullCredentialsVerificationPolicy": "NeverVerify",
            "nodeLeaseDurationSeconds": lease,
            "nodeStatusReportFrequency": "1m",
            "nodeStatusUpdateFrequency": "1s",
            "readOnlyPort": 0,
            "resolvConf": "",
            "serializeImagePulls": False,
            "tlsCertFile": str(pki / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(pki / f"{self.name}.key"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
        }
        if not unified_cgroups:
            config["failCgroupV1"] = False
        return config

    def kube_proxy(self) -> dict[str, Any]:
        """Return kube-proxy's configuration; the machine's connection tracking limits are left alone."""
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self.layout.kubeconfig("kube-proxy"))},
            "mode": "iptables",
            "clusterCIDR": self.network.pods,
            "conntrack": {"maxPerCore": 0},
        }

    def write(self, *, unified_cgroups: bool) -> None:
        """Write all files into the node's folder."""
        (self.folder / "cni").mkdir(parents=True, exist_ok=True)
        hosts_folder(self.folder).mkdir(exist_ok=True)
        (self.folder / "containerd.toml").write_text(self.containerd())
        (self.folder / "cni" / "10-pods.conflist").write_text(json.dumps(self.cni(), indent=1))
        kubelet = self.kubelet(unified_cgroups=unified_cgroups)
        (self.folder / "kubelet.json").write_text(json.dumps(kubelet, indent=1))
        (self.folder / "kube-proxy.json").write_text(json.dumps(self.kube_proxy(), indent=1))
        for name, value in KERNEL_SETTINGS.items():
            file = self.folder / "kernel" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")


def _toml(value: Path | str) -> str:
    return json.dumps(str(value))  # A JSON string is a TOML basic string.
