"""The one interface to a cluster, whoever provides it.

```python
with LocalProvider().up(ClusterSpec(nodes=1)) as cluster:
    cluster.kubectl("get", "nodes")
    cluster.node("node-a").set_gpus(count=8, unhealthy=[3])
```
"""

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from taskoffer_lab.api_client import ApiClient, ClientConfig
from taskoffer_lab.errors import LabError
from taskoffer_lab.node_handle import Node
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.progress import say
from taskoffer_lab.spec import ClusterSpec

__all__ = ["Cluster", "ClusterSpec", "Node", "ProcessHandle", "Provider"]


class ProcessHandle(Protocol):
    """One process of a cluster, for fault tests."""

    def start(self) -> None:
        """Start it again with the same arguments."""

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL if it does not end in time."""

    def kill(self) -> None:
        """End it with SIGKILL."""

    def pause(self) -> None:
        """Stop it with SIGSTOP: it keeps its connections and answers nothing."""

    def resume(self) -> None:
        """Let a paused one go on."""

    @property
    def pid(self) -> int | None:
        """Its process id, None when it does not run."""


class Cluster:
    """A running Kubernetes cluster.

    Attributes:
        name: Its name.
        kubeconfig: The administrator's kubeconfig.
        bin_dir: The folder with `kubectl`.
        nodes: The names of the nodes that the provider controls.
    """

    def __init__(self, name: str, kubeconfig: Path, kubectl: Path, nodes: list[str]) -> None:
        self.name = name
        self.kubeconfig = kubeconfig
        self.bin_dir = kubectl.parent
        self.nodes = nodes
        self._kubectl = kubectl

    @property
    def client_config(self) -> ClientConfig:
        """Server, authority and credentials of the administrator, for any client."""
        return ClientConfig.from_kubeconfig(self.kubeconfig)

    @property
    def api(self) -> ApiClient:
        """A small synchronous client as administrator."""
        return ApiClient(self.client_config)

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with KUBECONFIG, and kubectl first on PATH."""
        path = os.pathsep.join([str(self.bin_dir), os.environ.get("PATH", "")])
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 60.0) -> str:
        """Run kubectl as administrator and return what it prints.

        Args:
            arguments: After the program's name.
            stdin: Its input, e.g. a manifest for `apply -f -`.
            check: Whether a failure raises; else its stderr is returned after its stdout.
            timeout: Seconds.

        Raises:
            LabError: kubectl failed or took too long.
        """
        command = [str(self._kubectl), *arguments]
        try:
            result = subprocess.run(
                command,
                env=self.environment,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"kubectl {' '.join(arguments)}: no end after {timeout:.0f} s") from error
        if result.returncode == 0:
            return result.stdout
        if check:
            raise LabError(f"kubectl {' '.join(arguments)}: {(result.stderr or result.stdout).strip()}")
        return result.stdout + result.stderr

    def wait_ready(self, seconds: float = 60.0) -> float:
        """Wait until the API server answers again, e.g. after a restart; returns the seconds it took."""
        client = ApiClient(self.client_config, timeout=2.0)
        return wait_until(client.ready, f"API server of {self.name} ready", seconds)

    def process(self, name: str) -> ProcessHandle:
        """Return a process by name: a member of the control plane, or `NODE/kubelet` and the like.

        Raises:
            LabError: The provider does not control the cluster's processes.
        """
        raise LabError(f"the processes of {self.name} are not the lab's ({name})", "use the local provider")

    def node(self, name: str) -> Node:
        """Return a node that the provider controls.

        Raises:
            LabError: It controls none of that name.
        """
        raise LabError(f"the nodes of {self.name} are not the lab's ({name})", "use the local provider")

    @property
    def host_address(self) -> str:
        """The address under which pods reach this machine.

        Raises:
            LabError: The provider does not know it.
        """
        raise LabError(f"how pods of {self.name} reach this machine is not known")

    def use_registry(self, endpoint: str) -> None:
        """Let every node pull the lab's image names from `endpoint` (`http://HOST:PORT`).

        Raises:
            LabError: The provider does not control the nodes.
        """
        raise LabError(f"the nodes of {self.name} are not the lab's; {endpoint} not set")

    def down(self, *, keep_logs: bool = False) -> Path | None:
        """End the cluster and all that belongs to it; a cluster that was there before is left alone.

        Returns:
            Where the logs are, if they were kept.
        """
        del keep_logs
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self.down(keep_logs=kind is not None and issubclass(kind, Exception))
        if kept is not None:
            say(f"cluster {self.name}: its logs are in {kept}")


class Provider(Protocol):
    """Makes clusters."""

    name: str

    def up(self, spec: ClusterSpec) -> Cluster:
        """Bring a cluster up, or connect to it; returns when it can be used.

        Raises:
            LabError: It cannot; says why and what helps.
        """
