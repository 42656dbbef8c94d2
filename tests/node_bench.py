"""A bench on a real node of the lab: pods are containers that run until a test lets them end.

The trainer's place is taken by a shell of 2 MB, which starts at once and wants no CPU; all else is real.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from auditor import Auditor
from auditor_history import Object
from builders import make_policy
from operator_bench import Bench
from taskoffer.render.names import OUTPUT_DIR
from taskoffer_lab.api_client import ApiError
from taskoffer_lab.base_images import cached_archives, write_oci_archive
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.registry_name import BUSYBOX_IMAGE, REGISTRY
from taskoffer_lab.volumes import ensure_volume

IMAGE = f"{REGISTRY}/stand-in:1"
CONTAINER_SECONDS = 120.0
"""How long containers may take to run or to be gone on a busy machine; 1 to 3 s is usual."""

_SCRIPT = f"""
trap 'exit 143' TERM
cd {OUTPUT_DIR}
echo "$NVIDIA_VISIBLE_DEVICES" > "$HOSTNAME.writing" && mv "$HOSTNAME.writing" "$HOSTNAME.gpus"
until [ -e "$HOSTNAME.end" ]; do sleep 0.5 & wait $!; done
exit "$(cat "$HOSTNAME.end")"
"""
POD_TEMPLATE = {"image": IMAGE, "cpuPerGpu": "10m", "memoryPerGpu": "16Mi", "terminationGraceSeconds": 30}
"""In place of what the presets ask for beside each GPU: 12 CPUs and 110 GiB, which a small machine lacks."""


def bring_image(cluster: LocalCluster, folder: Path) -> None:
    """Put the image of the stand-in onto the cluster's nodes."""
    archive = folder / "stand-in.tar"
    # A pod's arguments, which are the trainer's, follow the script's name as its parameters.
    command = {"Entrypoint": ["/bin/sh", "-c", _SCRIPT, "stand-in"]}
    write_oci_archive(archive, IMAGE, _only_layer(cached_archives()[BUSYBOX_IMAGE]), command)
    for node in cluster.nodes:
        client = json.loads((cluster.node(node).folder / "node.json").read_text())["containerd_client"]
        subprocess.run([*client, "-n", "k8s.io", "images", "import", str(archive)], check=True, capture_output=True)


def _only_layer(path: Path) -> bytes:
    with tarfile.open(path) as archive:

        def read(name: str) -> bytes:
            content = archive.extractfile(name)
            assert content is not None
            return content.read()

        def blob(entry: Object) -> bytes:
            return read(f"blobs/{entry['digest'].replace(':', '/')}")

        (manifest,) = json.loads(read("index.json"))["manifests"]
        (layer,) = json.loads(blob(manifest))["layers"]
        return blob(layer)


class LabKubelet:
    """What `FakeKubelet` plays, done by the kubelet of the lab's node.

    Args:
        cluster: The cluster.
        outputs: The folder that is mounted into pods for their outputs.
    """

    nodes: tuple[str, ...] = ()
    """No node is the bench's own, to be removed at its end."""

    def __init__(self, cluster: LocalCluster, outputs: Path) -> None:
        self._api, self._outputs = cluster.api, outputs

    def start(self, namespace: str, name: str) -> None:
        """Wait until a pod's container runs and has noted its GPUs."""
        noted = self._outputs / f"{name}.gpus"
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            wait_until(lambda: self._runs(path) and noted.exists(), f"pod {name} runs", CONTAINER_SECONDS, interval=0.1)
        except Exception as error:
            error.add_note(json.dumps(self._api.request("GET", path)["status"])[:4000])
            raise

    def _runs(self, path: str) -> bool:
        return bool(self._api.request("GET", path)["status"].get("phase") == "Running")

    def end(self, _namespace: str, name: str, exit_code: int = 0, message: str = "") -> None:
        """Tell a pod's container to end, which it does within a second."""
        assert not message, "the stand-in says nothing"
        there = self._outputs / f"{name}.end"
        written = there.with_suffix(".telling")
        written.write_text(str(exit_code))
        written.rename(there)

    def ignoring_absence(self, method: str, path: str) -> None:
        """Send a request about an object that may be gone already."""
        try:
            self._api.request(method, path)
        except ApiError as error:
            if error.status != 404:
                raise


class NodeBench(Bench):
    """What a test of the operator works with where pods are real. It has the node to itself.

    Args:
        cluster: Has one node, with the stand-in's image.
        audit: Watches from before the first object on.
        folder: Where the claims' folders are made; pods must be able to reach it.
    """

    def __init__(self, cluster: LocalCluster, audit: Auditor, folder: Path) -> None:
        self._folder = folder
        super().__init__(cluster, LabKubelet(cluster, folder / "outputs"), audit)
        (self.node_name,) = cluster.nodes

    def _claim(self, name: str) -> None:
        made = ensure_volume(self.cluster, self.namespace, name, self._folder / name, read_only=name != "outputs")
        self.clean_up(f"/api/v1/persistentvolumes/{made}")

    def preset(self, name: str, *, default: bool = True, **fields: Any) -> Object:
        """Create a preset as it is, but for its pod template and the fields that are merged into its spec."""
        return super().preset(name, default=default, pod_template=POD_TEMPLATE, **fields)

    def apply_preset(self, name: str) -> Object:
        """Apply a preset under the name of the bench's policy, as the default one, as kubectl's users do."""
        made = make_policy(preset=name, name=self.policy_name, pod_template=POD_TEMPLATE)
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(made))
        return self.policy_condition("Ready", "Ready")

    def pod(self, name: str) -> Object:
        """Read a pod."""
        found: Object = self.api.request("GET", self.path("pods", name, api="/api/v1"))
        return found

    def gpus(self, pod: str) -> list[str]:
        """Return the UUIDs of the GPUs that the kubelet gave to a pod's container, as that sees them."""
        return (self._folder / "outputs" / f"{pod}.gpus").read_text().strip().split(",")

    def empty(self) -> None:
        """Delete all offers and wait until their pods have ended: only then are the node's GPUs free again."""
        pods = self.path("pods", api="/api/v1")
        self.api.request("DELETE", self.path("taskoffers"))
        wait_until(lambda: not self.api.request("GET", pods)["items"], "no pod left", CONTAINER_SECONDS)

    def clear(self) -> None:
        """Remove everything, pods by their own end."""
        try:
            self.empty()
        finally:
            super().clear()
