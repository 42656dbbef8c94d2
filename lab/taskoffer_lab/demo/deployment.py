"""Taskoffer in the demo's cluster: CRDs, RBAC, two replicas of the operator in pods, the policy, the claims."""

import json
from pathlib import Path
from typing import Any

import yaml

from taskoffer import presets
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.demo.material import Material
from taskoffer_lab.demo.rows import condition
from taskoffer_lab.demo.script import DATA_CLAIM, EXAMPLES, MODELS_CLAIM, NAMESPACE, OUTPUTS_CLAIM, Script
from taskoffer_lab.errors import LabError
from taskoffer_lab.images import Images
from taskoffer_lab.install import NAMESPACE as OPERATOR_NAMESPACE
from taskoffer_lab.install import install, project_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.volumes import ensure_volume

OPERATOR_SECONDS = 120.0
PULL_SECONDS = 600.0
"""How long a node may take to pull and unpack the trainer image (5 GB) for the first time."""

POLICY = "lab"
"""The preset that decides the examples."""

_PULLER = "pull-trainer"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def operator_manifest(image: str, *arguments: str) -> dict[str, Any]:
    """Return deploy/operator.yaml as one list, with an image and further arguments for `taskoffer run`."""
    text = (project_root() / "deploy" / "operator.yaml").read_text(encoding="utf-8")
    manifests: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    deployment = next(manifest for manifest in manifests if manifest["kind"] == "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["image"] = image
    container["args"] = [*container["args"], *arguments]
    return {"apiVersion": "v1", "kind": "List", "items": manifests}


def prepare_namespace(cluster: Cluster, material: Material, outputs: Path) -> None:
    """Make the namespace with the three claims that the examples name."""
    # Training pods keep to the strictest of the pod security standards, and the server sees to it.
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
    ensure_volume(cluster, NAMESPACE, MODELS_CLAIM, material.models, read_only=True)
    ensure_volume(cluster, NAMESPACE, DATA_CLAIM, material.data, read_only=True)
    ensure_volume(cluster, NAMESPACE, OUTPUTS_CLAIM, outputs)


def start_operator(cluster: Cluster, image: str) -> None:
    """Install CRDs and RBAC and start two replicas of the operator; does not wait for them."""
    install(cluster)
    # The table is fed from the objects, so progress is written more often than the default of 10 s.
    manifest = operator_manifest(image, "--progress-interval=1")
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))


def wait_for_operator(cluster: Cluster) -> None:
    """Wait until both replicas are ready, and one of them leads and has taken up the policy.

    Raises:
        LabError: They are not ready in time; carries the end of their log.
    """
    try:
        cluster.kubectl(
            "rollout",
            "status",
            "deployment/taskoffer",
            f"--namespace={OPERATOR_NAMESPACE}",
            f"--timeout={OPERATOR_SECONDS:.0f}s",
            timeout=OPERATOR_SECONDS + 10,
        )
    except LabError as error:
        raise LabError(f"the operator does not start: {error.message}\n{operator_log(cluster, 30)}") from error
    try:
        wait_until(lambda: _policy_ready(cluster), f"policy {POLICY} is Ready", OPERATOR_SECONDS, interval=0.2)
    except LabError as error:
        raise LabError(f"{error.message}; the operator's log ends:\n{operator_log(cluster, 30)}") from error


def policy_of(script: Script, image: str) -> dict[str, Any]:
    """Return the `lab` preset with a trainer image and what a script changes."""
    policy = presets.load(POLICY, image=image)
    if script.at_once is not None:
        policy["spec"]["filters"]["maxConcurrentJobs"] = script.at_once
    for size in policy["spec"]["sizeClasses"]:
        size["train"].update(script.train)
    return policy


def apply_policy(cluster: Cluster, images: Images, script: Script = EXAMPLES) -> None:
    """Apply a script's policy with the trainer image of this checkout."""
    policy = policy_of(script, images.trainer)
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(policy))


def start_pull(cluster: Cluster, image: str) -> None:
    """Let every node pull the trainer image ahead of the first offer, by pods that end at once."""
    for node in cluster.nodes:
        container = {
            "name": "pull",
            "image": image,
            "command": ["python", "--version"],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        }
        spec = {"restartPolicy": "Never", "nodeName": node, "containers": [container]}
        name = f"{_PULLER}-{node}"
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}
        cluster.api.request("POST", _PODS, body)


def wait_for_pull(cluster: Cluster) -> None:
    """Wait until every node has the trainer image.

    Raises:
        LabError: A node cannot pull it; says what the kubelet said.
    """
    for node in cluster.nodes:
        path = f"{_PODS}/{_PULLER}-{node}"
        try:
            wait_until(lambda path=path: _has_run(cluster, path), f"{node} has the trainer image", PULL_SECONDS)  # type: ignore[misc]
        except LabError as error:
            events = cluster.kubectl("get", "events", "-n", NAMESPACE, "--sort-by=.lastTimestamp", check=False)
            raise LabError(f"{error.message}\n{events}", error.remedy) from error
        cluster.api.request("DELETE", path)


def operator_log(cluster: Cluster, lines: int) -> str:
    """Return the last lines of both replicas' logs, for a failure's report."""
    selector = "app.kubernetes.io/name=taskoffer"
    arguments = ("logs", "-n", OPERATOR_NAMESPACE, "-l", selector, f"--tail={lines}", "--prefix")
    return cluster.kubectl(*arguments, check=False).strip()


def _policy_ready(cluster: Cluster) -> bool:
    policy = cluster.api.request("GET", f"/apis/taskoffer.dev/v1alpha1/capacitypolicies/{POLICY}")
    ready = condition(policy, "Ready")
    return ready is not None and ready["status"] == "True"


def _has_run(cluster: Cluster, path: str) -> bool:
    pod = cluster.api.request("GET", path)
    if pod["status"]["phase"] == "Failed":
        raise LabError(f"pod {pod['metadata']['name']} failed: {json.dumps(pod['status'])[:800]}")
    return bool(pod["status"]["phase"] == "Succeeded")
