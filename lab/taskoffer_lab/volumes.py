"""PersistentVolumes on the host: folders of this machine for models, data and outputs, with their claims."""

import os
import stat
from pathlib import Path
from typing import Any

from taskoffer_lab.api_client import ApiClient, ApiError
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.errors import LabError
from taskoffer_lab.host_changes import BOUND, PRIVATE
from taskoffer_lab.process_table import wait_until

POD_USER = 65532
"""The user id of the product's pods."""

BOUND_SECONDS = 30.0
_CONFLICT = 409


def ensure_volume(
    cluster: Cluster,
    namespace: str,
    claim: str,
    host_dir: Path,
    *,
    read_only: bool = False,
    storage: str = "10Gi",
) -> str:
    """Make a folder of this machine claimable in a namespace; returns when the claim is bound.

    The folder is made if it is missing and then belongs to the pods' user. Kubernetes does not enforce access
    modes on host paths: pods should also mount a read-only claim with `readOnly: true`.

    Args:
        cluster: A local cluster (pods see this machine's files; those of other providers do not).
        namespace: Must exist.
        claim: The PersistentVolumeClaim's name.
        host_dir: The folder.
        read_only: ReadOnlyMany instead of ReadWriteMany.
        storage: The size that volume and claim state; nothing enforces it on a host path.

    Returns:
        The PersistentVolume's name.

    Raises:
        LabError: Pods could not read (or write) the folder, or a volume of that name has another folder.
    """
    folder = host_dir.resolve()
    prepare_folder(folder, writable=not read_only)
    volume, wish = render_volume(namespace, claim, folder, read_only=read_only, storage=storage)
    api = cluster.api
    claims = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    name = str(volume["metadata"]["name"])
    _create(api, "/api/v1/persistentvolumes", volume)
    existing = api.request("GET", f"/api/v1/persistentvolumes/{name}")["spec"]["hostPath"]["path"]
    if existing != str(folder):
        raise LabError(f"volume {name} is {existing}, not {folder}", f"kubectl delete pv {name}")
    _create(api, claims, wish)
    wait_until(
        lambda: api.request("GET", f"{claims}/{claim}")["status"].get("phase") == "Bound",
        f"claim {namespace}/{claim} bound",
        BOUND_SECONDS,
    )
    return name


def render_volume(
    namespace: str, claim: str, folder: Path, *, read_only: bool, storage: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the PersistentVolume and its claim, bound to each other by name."""
    modes = ["ReadOnlyMany" if read_only else "ReadWriteMany"]
    name = f"{namespace}-{claim}"
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "accessModes": modes,
            "capacity": {"storage": storage},
            "claimRef": {"namespace": namespace, "name": claim},
            "hostPath": {"path": str(folder), "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
        },
    }
    wish = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim, "namespace": namespace},
        "spec": {
            "accessModes": modes,
            "resources": {"requests": {"storage": storage}},
            "storageClassName": "",
            "volumeName": name,
        },
    }
    return volume, wish


def prepare_folder(folder: Path, *, writable: bool) -> None:
    """Make the folder if it is missing and check that pods can use it.

    Raises:
        LabError: A node hides it, or the pods' user may not read (or write) it.
    """
    for hidden in map(Path, [*BOUND, *PRIVATE]):
        if folder == hidden or hidden in folder.parents:
            raise LabError(f"{folder} is below {hidden}, which nodes cover with their own", "move it elsewhere")
    if not folder.exists():
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown(folder, POD_USER, POD_USER)
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise LabError(f"{folder} is not a folder")
    needed = 0o7 if writable else 0o5
    own = status.st_mode >> 6 if status.st_uid == POD_USER else 0
    group = status.st_mode >> 3 if status.st_gid == POD_USER else 0
    if (own | group | status.st_mode) & needed != needed:
        verb = "write to" if writable else "read"
        raise LabError(f"user {POD_USER} of the pods may not {verb} {folder}", f"chown {POD_USER} {folder}")


def _create(api: ApiClient, path: str, content: dict[str, Any]) -> None:
    try:
        api.request("POST", path, content)
    except ApiError as error:
        if error.status != _CONFLICT:
            raise
