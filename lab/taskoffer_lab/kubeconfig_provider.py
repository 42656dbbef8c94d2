"""The kubeconfig provider: a cluster that is there already and that the lab neither makes nor ends."""

import os
from pathlib import Path

from taskoffer_lab.cluster import Cluster
from taskoffer_lab.errors import LabError
from taskoffer_lab.spec import ClusterSpec
from taskoffer_lab.toolchain import ensure_tools


class KubeconfigProvider:
    """Connects to an existing cluster."""

    name = "kubeconfig"

    def __init__(self, path: Path | None = None) -> None:
        """Take a kubeconfig; None means $KUBECONFIG (its first file), else ~/.kube/config."""
        first = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
        self._path = path or (Path(first) if first else Path.home() / ".kube" / "config")

    def up(self, spec: ClusterSpec) -> Cluster:
        """Connect; of the wish only the name is used, for nodes and GPUs are what they are.

        Raises:
            LabError: No kubeconfig, or the cluster does not answer.
        """
        if not self._path.exists():
            raise LabError(f"no kubeconfig at {self._path}", "set KUBECONFIG, or use the local provider")
        cluster = Cluster(spec.name, self._path.absolute(), ensure_tools(["kubectl"])["kubectl"], [])
        try:
            cluster.kubectl("get", "--raw", "/readyz", timeout=20.0)
        except LabError as error:
            raise LabError(
                f"the cluster of {self._path} does not answer: {error.message}", "check the kubeconfig"
            ) from error
        return cluster
