"""Which programs the lab builds, from which Go module, with which flags."""

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

GOTOOLS = Path(__file__).resolve().parent / "gotools"
KUBERNETES_VERSION = "v1.36.3"
CONTAINERD_VERSION = "v2.4.2"
_COMPONENT = "k8s.io/component-base/version"


@dataclass(frozen=True)
class GoModule:
    """One tools module (its own go.mod and go.sum) and the flags its programs are built with."""

    name: str
    ldflags: str
    tags: str = ""

    @property
    def folder(self) -> Path:
        """The folder that holds go.mod."""
        return GOTOOLS / self.name


KUBERNETES = GoModule(
    "kubernetes",
    ldflags=(
        f"-s -w -X {_COMPONENT}.gitVersion={KUBERNETES_VERSION} -X {_COMPONENT}.gitMajor=1 -X {_COMPONENT}.gitMinor=36"
    ),
)
CONTAINERD = GoModule(
    "containerd",
    ldflags=f"-s -w -X github.com/containerd/containerd/v2/version.Version={CONTAINERD_VERSION}",
    tags="no_btrfs no_devmapper no_zfs",
)


@dataclass(frozen=True)
class GoTool:
    """One program.

    Attributes:
        name: The file's name in the cache.
        module: Where it is built.
        package: The Go package; one that starts with `./` is the lab's own source.
        cold_seconds: What the build took on 2 cores with nothing cached, after those before it.
    """

    name: str
    module: GoModule
    package: str
    cold_seconds: int

    @property
    def own_source(self) -> Path | None:
        """The folder of the lab's own source, None for a program of somebody else."""
        return self.module.folder / self.package if self.package.startswith("./") else None

    def cache_name(self, go_version: str) -> str:
        """Return the cache folder's name: everything that decides the program's content is in it."""
        return f"{self.cache_prefix()}-{go_version}"

    def cache_prefix(self) -> str:
        """Return the part of `cache_name` that does not depend on the Go toolchain."""
        digest = hashlib.sha256()
        sources = [self.module.folder / "go.mod", self.module.folder / "go.sum"]
        own = self.own_source
        if own is not None:
            sources += sorted(own.glob("*.go"))
        for source in sources:
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        digest.update(f"{self.module.ldflags}\0{self.module.tags}\0{platform.machine()}".encode())
        return f"{self.name if own else self.module.name}-{digest.hexdigest()[:16]}"


_K8S = "k8s.io/kubernetes/cmd"
_CD = "github.com/containerd/containerd/v2/cmd"
CATALOG: dict[str, GoTool] = {
    tool.name: tool
    for tool in (
        GoTool("kube-apiserver", KUBERNETES, f"{_K8S}/kube-apiserver", 302),
        GoTool("kube-controller-manager", KUBERNETES, f"{_K8S}/kube-controller-manager", 80),
        GoTool("kube-scheduler", KUBERNETES, f"{_K8S}/kube-scheduler", 7),
        GoTool("etcd", KUBERNETES, "go.etcd.io/etcd/server/v3", 12),
        GoTool("kubectl", KUBERNETES, f"{_K8S}/kubectl", 30),
        GoTool("kubelet", KUBERNETES, f"{_K8S}/kubelet", 25),
        GoTool("kube-proxy", KUBERNETES, f"{_K8S}/kube-proxy", 13),
        GoTool("gpu-device-plugin", KUBERNETES, "./gpu-device-plugin", 5),
        GoTool("containerd", CONTAINERD, f"{_CD}/containerd", 73),
        GoTool("containerd-shim-runc-v2", CONTAINERD, f"{_CD}/containerd-shim-runc-v2", 2),
        GoTool("ctr", CONTAINERD, f"{_CD}/ctr", 5),
        GoTool("node-store-clean", CONTAINERD, "./node-store-clean", 2),
    )
}
CONTROL_PLANE_TOOLS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd", "kubectl")
NODE_TOOLS = (
    "kubelet",
    "kube-proxy",
    "gpu-device-plugin",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "node-store-clean",
)
