"""Folders of the host over which a node mounts its own: made where they are missing, removed at the end."""

from pathlib import Path

from taskoffer_lab.paths import state_root

MOUNT_POINTS = {
    "/var/lib/kubelet": "kubelet",
    "/var/lib/cni": "cni-cache",
    "/var/log/pods": "pod-logs",
    "/var/log/containers": "container-logs",
}
"""Constants in kubelet and CNI plugins, and the folder of the node that is mounted there."""


def _made_by_lab() -> Path:
    return state_root() / "mount-points"


def make_mount_points() -> None:
    """Make what is missing and remember what was made; the caller holds the claims' lock."""
    made = _read()
    for point in map(Path, MOUNT_POINTS):
        if not point.exists():
            point.mkdir(parents=True)
            made.append(str(point))
    _made_by_lab().write_text("".join(f"{point}\n" for point in dict.fromkeys(made)))


def remove_mount_points() -> None:
    """Remove what `make_mount_points` made; the caller holds the claims' lock and no node runs.

    While one runs, removing the folder would take the mount away from under it.
    """
    for point in map(Path, _read()):
        if point.is_dir() and not any(point.iterdir()):
            point.rmdir()
    _made_by_lab().unlink(missing_ok=True)


def _read() -> list[str]:
    file = _made_by_lab()
    return file.read_text().splitlines() if file.exists() else []
