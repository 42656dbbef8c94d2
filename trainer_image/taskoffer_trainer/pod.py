"""What the pod gives this process: the CPUs that it may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["pod_cpus"]

_CGROUP = Path("/sys/fs/cgroup")


def pod_cpus(cgroup: Path = _CGROUP) -> float:
    """Return how many CPUs the pod may use at once: those it may run on, within the quota of its cgroup.

    Args:
        cgroup: where the control groups are mounted; a pod sees its own there. Version 2 says quota and period in
            ``cpu.max``, version 1 in ``cpu/cpu.cfs_quota_us`` and ``cpu/cpu.cfs_period_us``.
    """
    allowed = float(len(os.sched_getaffinity(0)))
    return min(allowed, _quota(cgroup))


def _quota(cgroup: Path) -> float:
    """Return the quota in CPUs, or infinity without one."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return math.inf
    return math.inf if quota in ("max", "-1") or not int(period) else int(quota) / int(period)
