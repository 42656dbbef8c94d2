"""Removing what a cluster leaves beside its processes, and sweeping up after supervisors that were killed."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from taskoffer_lab.cgroups import remove_groups
from taskoffer_lab.host_changes import restore_host
from taskoffer_lab.locking import locked
from taskoffer_lab.network import ClusterNetwork, remove_network
from taskoffer_lab.paths import cache_root, state_root
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.progress import say
from taskoffer_lab.state import ClusterRecord, claims_lock, records

KEPT_LOGS = 10
"""How many failed clusters' logs are kept."""

_UNCLAIMED_SECONDS = 60.0


def remove_cluster(record: ClusterRecord, *, keep_logs: bool) -> Path | None:
    """Remove networks, control groups and files of a cluster whose processes have ended.

    Returns:
        Where its logs are, if they were kept.

    Raises:
        LabError: Something is still in use.
    """
    if record.octet is not None:
        network = ClusterNetwork(record.octet)
        remove_network(network)
        remove_groups(network.cgroup)
    kept = _keep_logs(record) if keep_logs else None
    _remove_folder(record.layout.root)
    if record.octet is not None:
        with locked(claims_lock()):
            if all(other.octet is None for other in records()):
                restore_host(say)
    return kept


def sweep() -> list[str]:
    """Remove what clusters left whose supervisor was killed; returns their names."""
    swept = []
    with locked(state_root() / "sweep.lock"):
        for record in records():
            if not record.alive:
                say(f"cluster {record.name}: its supervisor is gone; removing what it left")
                kept = remove_cluster(record, keep_logs=True)
                say(f"cluster {record.name}: removed; its logs are in {kept}")
                swept.append(record.name)
        _remove_unclaimed()
    return swept


def wait_for_end(pid: int, seconds: float) -> None:
    """Wait until a process that need not be a child has ended.

    Raises:
        LabError: It runs on.
    """
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of process {pid}", seconds, interval=0.02)


def _remove_unclaimed() -> None:
    """Remove folders whose maker died between making them and writing the record."""
    for folder in state_root().iterdir():
        if folder.is_dir() and not (folder / "cluster.json").exists():
            age = time.time() - folder.stat().st_mtime
            if age > _UNCLAIMED_SECONDS:
                _remove_folder(folder)


def _keep_logs(record: ClusterRecord) -> Path | None:
    logs = record.layout.logs
    if not logs.is_dir():
        return None
    archive = cache_root() / "logs"
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    target = archive / f"{record.name}-{stamp}"
    shutil.copytree(logs, target, dirs_exist_ok=True)
    for folder in record.spec.node_names:
        node_logs = record.layout.node(folder) / "pod-logs"
        if node_logs.is_dir():
            shutil.copytree(node_logs, target / folder / "pods", symlinks=True, dirs_exist_ok=True)
    oldest_first = sorted(archive.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in oldest_first[:-KEPT_LOGS]:
        shutil.rmtree(old)
    return target


def _remove_folder(folder: Path) -> None:
    """Remove a folder, but first every mount below it: deleting through one would delete the user's data."""
    for mount in _mounts_below(folder):
        subprocess.run(["umount", "--lazy", mount], check=True)
    if folder.exists():
        shutil.rmtree(folder)


def _mounts_below(folder: Path) -> list[str]:
    inside = os.path.join(folder, "")
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(inside)), reverse=True)
