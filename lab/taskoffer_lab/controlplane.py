"""etcd, API server, controller manager and scheduler of one cluster: their files, flags and start."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.api_client import ApiClient, ClientConfig
from taskoffer_lab.network import ClusterNetwork
from taskoffer_lab.pki import (
    CertificateAuthority,
    kubeconfig,
    signing_key,
    write_kubeconfig,
    write_pair,
    write_secret,
)
from taskoffer_lab.process_table import Command, ProcessTable, wait_until
from taskoffer_lab.spec import Layout
from taskoffer_lab.state import ClusterRecord
from taskoffer_lab.toolchain import ToolSet

READY_SECONDS = 90.0
"""How long the API server may take; 3 to 4 s is usual on 2 cores."""

MEMBERS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
SERVICES_WITHOUT_NODES = "10.96.0.0/16"
_LOOPBACK = "127.0.0.1"
_DEFAULT_ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"
_USERS = {
    "admin": ("taskoffer-lab-admin", "system:masters"),
    "kube-controller-manager": ("system:kube-controller-manager", None),
    "kube-scheduler": ("system:kube-scheduler", None),
    "kube-proxy": ("system:kube-proxy", None),
}


@dataclass(frozen=True)
class ControlPlane:
    """The control plane of one cluster, as its supervisor sees it."""

    record: ClusterRecord
    tools: ToolSet

    @property
    def network(self) -> ClusterNetwork | None:
        """The networks, None where there are no nodes."""
        return ClusterNetwork(self.record.octet) if self.record.octet is not None else None

    @property
    def address(self) -> str:
        """Where the API server listens: loopback, or the bridge when there are nodes to reach it."""
        return self.network.host_address if self.network else _LOOPBACK

    @property
    def server(self) -> str:
        """The API server's URL."""
        return f"https://{self.address}:{self.record.ports['apiserver']}"

    @property
    def _layout(self) -> Layout:
        return self.record.layout

    def write_identities(self) -> None:
        """Make the authority, all certificates and all kubeconfigs, the nodes' included."""
        authority = CertificateAuthority(f"taskoffer-lab-{self.record.name}")
        pki, name = self._layout.pki, self.record.name
        write_pair(pki, "ca", authority.pair)
        services = (self.network.services if self.network else SERVICES_WITHOUT_NODES).partition("/")[0]
        first_service = services.rpartition(".")[0] + ".1"
        names = [_LOOPBACK, self.address, first_service, "localhost"]
        names += [f"kubernetes{rest}" for rest in ("", ".default", ".default.svc")]
        names.append("kubernetes.default.svc.cluster.local")
        write_pair(pki, "apiserver", authority.server("kube-apiserver", names))
        write_pair(pki, "kubelet-client", authority.client("kube-apiserver-kubelet-client", "system:masters"))
        write_secret(pki / "sa.key", signing_key())
        users: dict[str, tuple[str, str | None]] = dict(_USERS)
        for index, node in enumerate(self.record.spec.node_names):
            users[node] = (f"system:node:{node}", "system:nodes")
            if self.network:
                addresses = [node, self.network.node_address(index)]
                write_pair(pki, node, authority.server(f"system:node:{node}", addresses))
        certificate = authority.pair.certificate
        for user, (common_name, group) in users.items():
            content = kubeconfig(name, self.server, certificate, authority.client(common_name, group))
            write_kubeconfig(self._layout.kubeconfig(user), content)

    def start(self, table: ProcessTable, check: Callable[[], None]) -> None:
        """Start all members; returns when `/readyz` says ok and pods could be created.

        Args:
            table: Holds the processes.
            check: Called while waiting; raises when a member has died or the start was called off.

        Raises:
            LabError: Not ready in time.
        """
        self._layout.logs.mkdir(exist_ok=True)
        table.start(self.etcd())
        table.start(self.apiserver())
        client = ApiClient(ClientConfig.from_kubeconfig(self._layout.admin_kubeconfig))
        wait_until(client.ready, "kube-apiserver ready", READY_SECONDS, check=check)
        table.start(self.controller_manager())
        table.start(self.scheduler())
        # A pod is refused before its namespace has the default ServiceAccount.
        wait_until(lambda: client.exists(_DEFAULT_ACCOUNT), "the default ServiceAccount", READY_SECONDS, check=check)

    def etcd(self) -> Command:
        """How to start etcd; without fsync, for a lab's data is thrown away."""
        client = f"http://{_LOOPBACK}:{self.record.ports['etcd']}"
        peer = f"http://{_LOOPBACK}:{self.record.ports['etcd-peer']}"
        return self._command(
            "etcd",
            f"--data-dir={self._layout.root / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def apiserver(self) -> Command:
        """How to start the API server: RBAC and node authorization on, limits wide enough for benchmarks."""
        pki, spec = self._layout.pki, self.record.spec
        tolerated = f"toleration-seconds={spec.unreachable_toleration_seconds}"
        flags = [
            f"--etcd-servers=http://{_LOOPBACK}:{self.record.ports['etcd']}",
            f"--secure-port={self.record.ports['apiserver']}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--cert-dir={pki}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--client-ca-file={pki / 'ca.crt'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-account-key-file={pki / 'sa.key'}",
            f"--service-account-signing-key-file={pki / 'sa.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={self.network.services if self.network else SERVICES_WITHOUT_NODES}",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
            f"--kubelet-client-key={pki / 'kubelet-client.key'}",
            f"--kubelet-certificate-authority={pki / 'ca.crt'}",
            f"--default-not-ready-{tolerated}",
            f"--default-unreachable-{tolerated}",
            "--max-requests-inflight=3000",
            "--max-mutating-requests-inflight=1000",
            f"--enable-priority-and-fairness={str(spec.priority_and_fairness).lower()}",
        ]
        if self.network is None:
            # The reconciler refuses a loopback address, and without nodes nobody needs the endpoint.
            flags.append("--endpoint-reconciler-type=none")
        return self._command("kube-apiserver", *flags)

    def controller_manager(self) -> Command:
        """How to start the controller manager; its client limits are raised for benchmarks with many Jobs."""
        pki, grace = self._layout.pki, self.record.spec.node_monitor_grace_seconds
        return self._command(
            "kube-controller-manager",
            *self._component_flags("kube-controller-manager"),
            f"--service-account-private-key-file={pki / 'sa.key'}",
            f"--root-ca-file={pki / 'ca.crt'}",
            f"--cluster-signing-cert-file={pki / 'ca.crt'}",
            f"--cluster-signing-key-file={pki / 'ca.key'}",
            "--use-service-account-credentials=true",
            f"--node-monitor-grace-period={grace}s",
            f"--node-monitor-period={min(5, max(1, grace // 8))}s",
        )

    def scheduler(self) -> Command:
        """How to start the scheduler."""
        return self._command("kube-scheduler", *self._component_flags("kube-scheduler"))

    def _component_flags(self, name: str) -> list[str]:
        return [
            f"--kubeconfig={self._layout.kubeconfig(name)}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=300",
            "--kube-api-burst=600",
        ]

    def _command(self, name: str, *flags: str) -> Command:
        log = self._layout.logs / f"{name}.log"
        return Command(name, [self.tools[name], *flags], log, cwd=self._layout.root)


def program_path(folders: list[Path]) -> str:
    """Return a PATH that starts with `folders` and ends with where root's programs are."""
    return os.pathsep.join([*map(str, folders), os.environ.get("PATH", ""), "/usr/sbin:/usr/bin:/sbin:/bin"])
