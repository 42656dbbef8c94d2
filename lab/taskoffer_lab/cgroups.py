"""Control groups of nodes: made in every hierarchy before a kubelet starts, removed when it has ended."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError

_ROOT = Path("/sys/fs/cgroup")
_V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids")
CPU_WEIGHT = 8
"""A cluster's share of a busy CPU, in processes outside of all groups: by default all pods together weigh one, and
starve beside the machine's other work and their own control plane."""

REMOVE_SECONDS = 10.0
"""How long killed processes may take to leave a control group."""


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy.

    Attributes:
        mount: Where.
        unified: Whether it is cgroup v2.
        options: The mount's options; for v1 they name the controllers.
    """

    mount: Path
    unified: bool
    options: frozenset[str]


def hierarchies(mountinfo: str | None = None) -> list[Hierarchy]:
    """Return the mounted hierarchies (format: proc_pid_mountinfo(5))."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            mount = Path(before.split()[4])
            found.append(Hierarchy(mount, kind == "cgroup2", frozenset(options.split(","))))
    return found


def is_unified(mounted: list[Hierarchy]) -> bool:
    """Whether this machine is on cgroup v2 alone (a hybrid one counts as v1, as runc sees it)."""
    return any(hierarchy.unified and hierarchy.mount == _ROOT for hierarchy in mounted)


def create_groups(name: str, mounted: list[Hierarchy] | None = None) -> None:
    """Make the group `name` (several levels, `CLUSTER/NODE`) where a kubelet looks for it.

    On cgroup v1 that is every hierarchy, the named `systemd` one included, and a new cpuset takes its CPUs
    and memory nodes from the root, for it is born with none. On cgroup v2 the controllers are delegated level
    by level; that branch follows the kernel's documentation and was not tried on a machine.

    Raises:
        LabError: The controllers cannot be delegated.
    """
    mounted = hierarchies() if mounted is None else mounted
    if is_unified(mounted):
        _create_unified(_ROOT, name)
        return
    for hierarchy in mounted:
        if hierarchy.unified:
            continue
        path = hierarchy.mount
        for part in name.split("/"):
            path = path / part
            path.mkdir(exist_ok=True)
            if "cpuset" in hierarchy.options:
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (path / file).write_text((hierarchy.mount / file).read_text())
        if "cpu" in hierarchy.options:
            (hierarchy.mount / name.split("/")[0] / "cpu.shares").write_text(str(1024 * CPU_WEIGHT))


def remove_groups(name: str, mounted: list[Hierarchy] | None = None) -> None:
    """Remove the group `name` and all below it from every hierarchy.

    Raises:
        LabError: Processes are still in one of them after `REMOVE_SECONDS`.
    """
    deadline = time.monotonic() + REMOVE_SECONDS
    for hierarchy in hierarchies() if mounted is None else mounted:
        path = hierarchy.mount / name
        while not _removed(path):
            if time.monotonic() > deadline:
                raise LabError(f"control group {path} is still in use after {REMOVE_SECONDS:.0f} s")
            time.sleep(0.02)


def _removed(path: Path) -> bool:
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False  # Busy: its processes have been killed but not reaped yet.
    return not path.exists()


def _create_unified(root: Path, name: str) -> None:
    path = root
    for part in name.split("/"):
        available = (path / "cgroup.controllers").read_text().split()
        wanted = " ".join(f"+{item}" for item in _V2_CONTROLLERS if item in available)
        try:
            (path / "cgroup.subtree_control").write_text(wanted)
        except OSError as error:
            raise LabError(
                f"cannot delegate {wanted} below {path}: {error}",
                "in a container, start it with its own cgroup namespace and move its processes to a leaf",
            ) from error
        path = path / part
        path.mkdir(exist_ok=True)
        if path.parent == root and (path / "cpu.weight").exists():
            (path / "cpu.weight").write_text(str(100 * CPU_WEIGHT))
