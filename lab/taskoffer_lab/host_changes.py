"""What nodes change on the host itself, remembered so that the last cluster's end undoes it.

Folders over which a node mounts its own (constants in kubelet, containerd and CNI plugins) are made where
they are missing, and the kernel is told to forward IPv4 so that pods reach the world.
"""

import json
from collections.abc import Callable
from pathlib import Path

from taskoffer_lab.paths import state_root

BOUND = {
    "/var/lib/kubelet": "kubelet",
    "/var/lib/cni": "cni-cache",
    "/var/log/pods": "pod-logs",
    "/var/log/containers": "container-logs",
}
"""Folder of the host → folder of the node that is mounted over it."""

PRIVATE = ("/run/containerd", "/run/netns")
"""Folders over which a node mounts an empty tmpfs: containerd's and the pods' networks' files."""

_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def change_host() -> None:
    """Make missing mount points and switch IPv4 forwarding on; the caller holds the claims' lock."""
    memory = _memory()
    folders, forwarding = _read(memory)
    for point in map(Path, [*BOUND, *PRIVATE]):
        if not point.exists():
            point.mkdir(parents=True)
            folders.append(str(point))
    current = _FORWARDING.read_text().strip()
    if current != "1":
        forwarding = current
        _FORWARDING.write_text("1")
    content = {"folders": list(dict.fromkeys(folders)), "ip_forward": forwarding}
    memory.write_text(json.dumps(content))


def restore_host(note: Callable[[str], None] = lambda text: None) -> None:
    """Undo `change_host`; the caller holds the claims' lock and no node runs.

    While one runs, removing a mount point would take the mount away from under it.
    """
    memory = _memory()
    folders, forwarding = _read(memory)
    for point in map(Path, folders):
        if not point.is_dir():
            continue
        if any(point.iterdir()):
            note(f"{point} was made by the lab but holds something now: left alone")
        else:
            point.rmdir()
    if forwarding is not None:
        _FORWARDING.write_text(forwarding)
    memory.unlink(missing_ok=True)


def _memory() -> Path:
    return state_root() / "host-changes.json"


def _read(memory: Path) -> tuple[list[str], str | None]:
    if not memory.exists():
        return [], None
    content = json.loads(memory.read_text())
    return list(content["folders"]), content["ip_forward"]
