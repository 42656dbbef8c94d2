"""What this machine must be able to do for real nodes, each with its remedy."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.cgroups import hierarchies
from taskoffer_lab.debian import SYSTEM_TOOLS, ensure_programs, find_program
from taskoffer_lab.errors import LabError


@dataclass(frozen=True)
class Requirement:
    """One thing that real nodes need.

    Attributes:
        name: What.
        remedy: What helps when it is missing.
        check: Returns "" when it is there, else what was found instead.
    """

    name: str
    remedy: str
    check: Callable[[], str]


def _linux() -> str:
    return "" if sys.platform == "linux" else f"this is {sys.platform}"


def _root() -> str:
    return "" if os.geteuid() == 0 else f"running as user {os.geteuid()}"


def _groups() -> str:
    mounted = hierarchies()
    if not mounted:
        return "no control groups are mounted"
    blocked = [str(item.mount) for item in mounted if not os.access(item.mount, os.W_OK)]
    return f"not writable: {', '.join(blocked)}" if blocked else ""


def _overlay() -> str:
    known = Path("/proc/filesystems").read_text().split()
    return "" if "overlay" in known else "not in /proc/filesystems"


def _namespaces() -> str:
    """Make a bridge in a throw-away network namespace, which needs every privilege that a node needs."""
    unshare, ip = find_program("unshare"), find_program("ip")
    if unshare is None or ip is None:
        return "programs missing"
    command: list[str | Path] = [unshare, "--net", "--mount", "--pid", "--uts", "--ipc", "--fork"]
    command += [ip, "link", "add", "probe", "type", "bridge"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stderr.strip()


HOST_REQUIREMENTS = (
    Requirement("Linux", "run the lab on Linux", _linux),
    Requirement("root", "run as root (sudo), or use the control plane without nodes", _root),
    Requirement("control groups", "mount them writable; in a container: --privileged", _groups),
    Requirement("overlayfs", "modprobe overlay", _overlay),
    Requirement("namespaces and bridges", "in a container: --privileged; modprobe bridge veth", _namespaces),
)
"""What no package can bring."""


def why_no_nodes() -> str:
    """Return why real nodes are impossible on this machine, "" if they are possible.

    Programs that are missing but that root could install do not count.
    """
    for requirement in HOST_REQUIREMENTS[:2]:
        if found := requirement.check():
            return f"{requirement.name}: {found} ({requirement.remedy})"
    missing = [tool for tool in SYSTEM_TOOLS if find_program(tool.program) is None]
    if missing and find_program("apt-get") is None:
        return f"programs missing: {', '.join(tool.program for tool in missing)} (no apt-get to install them)"
    for requirement in HOST_REQUIREMENTS[2:]:
        if not missing and (found := requirement.check()):
            return f"{requirement.name}: {found} ({requirement.remedy})"
    return ""


def ensure_node_requirements() -> None:
    """Install missing programs aloud and check the rest.

    Raises:
        LabError: Something is missing that the lab cannot bring.
    """
    if found := _linux() or _root():
        raise LabError(f"real nodes are impossible here: {found}", "run as root on Linux, or use nodes=0")
    ensure_programs(tool.program for tool in SYSTEM_TOOLS)
    if found := why_no_nodes():
        raise LabError(f"real nodes are impossible here: {found}", "taskoffer-lab doctor")
