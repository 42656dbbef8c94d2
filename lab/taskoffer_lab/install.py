"""Put taskoffer into a cluster: CRDs, RBAC, and credentials of the ServiceAccount that ships."""

import base64
import json
from pathlib import Path

from taskoffer_lab.cluster import Cluster
from taskoffer_lab.errors import LabError

NAMESPACE = "taskoffer-system"
SERVICE_ACCOUNT = "taskoffer"


def project_root() -> Path:
    """Return the checkout that the lab runs from: it holds crds/, deploy/ and the Dockerfiles.

    Raises:
        LabError: when the lab was installed without a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "crds").is_dir():
        raise LabError(f"{root} holds no crds/", "run the lab from a checkout of taskoffer (make setup)")
    return root


def install(cluster: Cluster) -> None:
    """Apply the CRDs and the operator's RBAC, and wait until the kinds are served."""
    root = project_root()
    cluster.kubectl("apply", "--server-side", "-f", str(root / "crds"), "-f", str(root / "deploy" / "rbac.yaml"))
    for plural in ("taskoffers", "trainingjobs", "capacitypolicies"):
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{plural}.taskoffer.dev", "--timeout=30s")


def operator_kubeconfig(cluster: Cluster, directory: Path) -> Path:
    """Write a kubeconfig with a token of the operator's ServiceAccount, for an operator outside the cluster."""
    token = cluster.kubectl("create", "token", SERVICE_ACCOUNT, "-n", NAMESPACE, "--duration=8h").strip()
    config = cluster.client_config
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "operator",
        "clusters": [
            {
                "name": "lab",
                "cluster": {
                    "server": config.server,
                    "certificate-authority-data": base64.b64encode((config.authority or "").encode()).decode(),
                },
            }
        ],
        "users": [{"name": "operator", "user": {"token": token}}],
        "contexts": [{"name": "operator", "context": {"cluster": "lab", "user": "operator"}}],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "operator.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
