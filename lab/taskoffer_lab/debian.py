"""Debian packages that the lab needs: found, or installed aloud where root allows it."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.progress import say, step

_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
CNI_FOLDERS = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")
"""Where distributions put the CNI plugins."""


@dataclass(frozen=True)
class SystemTool:
    """A program of the system, the Debian package that brings it, and what the lab uses it for."""

    program: str
    package: str
    purpose: str


SYSTEM_TOOLS = (
    SystemTool("runc", "runc", "runs containers"),
    SystemTool("bridge", "containernetworking-plugins", "gives pods their network (CNI plugins)"),
    SystemTool("iptables", "iptables", "Services inside a node (kube-proxy) and the way out of it"),
    SystemTool("ip", "iproute2", "bridges, veth pairs and network namespaces"),
    SystemTool("nsenter", "util-linux", "enters a node's namespaces"),
    SystemTool("unshare", "util-linux", "makes a node's namespaces"),
    SystemTool("mount", "mount", "mounts inside a node's namespace"),
    SystemTool("gcc", "gcc", "compiles the pause program"),
    SystemTool("busybox", "busybox-static", "the contents of the busybox image"),
)
"""What real nodes need beside the Go tools. The control plane alone needs none of it."""

IMAGE_TOOLS = (
    SystemTool("buildah", "buildah", "builds the images"),
    SystemTool("debootstrap", "debootstrap", "makes the base image"),
    SystemTool("docker-registry", "docker-registry", "serves images to the nodes"),
)
"""What building and serving the images needs; no container engine is involved."""


def cni_folder() -> Path | None:
    """Return the folder with the CNI plugins `bridge`, `host-local` and `loopback`, if there is one."""
    for folder in map(Path, CNI_FOLDERS):
        if all((folder / plugin).exists() for plugin in ("bridge", "host-local", "loopback")):
            return folder
    return None


def find_program(name: str) -> Path | None:
    """Return the path of a program, also looking where root's PATH would."""
    if name == "bridge":
        folder = cni_folder()
        return folder / "bridge" if folder else None
    search = os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS])
    found = shutil.which(name, path=search)
    return Path(found) if found else None


def missing_tools(programs: Iterable[str]) -> list[SystemTool]:
    """Return those of `programs` (names in `SYSTEM_TOOLS` or `IMAGE_TOOLS`) that this machine lacks."""
    wanted = set(programs)
    known = [tool for tool in (*SYSTEM_TOOLS, *IMAGE_TOOLS) if tool.program in wanted]
    return [tool for tool in known if find_program(tool.program) is None]


def ensure_programs(programs: Iterable[str]) -> None:
    """Make sure that `programs` are there, installing their Debian packages aloud if root allows it.

    Raises:
        LabError: Something is missing and cannot be installed here; names the packages.
    """
    missing = missing_tools(programs)
    if not missing:
        return
    packages = sorted({tool.package for tool in missing})
    names = ", ".join(tool.program for tool in missing)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        raise LabError(f"programs missing on this machine: {names}", f"run: sudo {' '.join(command)}")
    say(f"missing: {names}; installing Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with step(f"apt-get install {' '.join(packages)}"):
        for attempt in (["apt-get", "update", "-q"], command):
            result = subprocess.run(attempt, env=environment, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise LabError(
                    f"{' '.join(attempt)} failed ({result.returncode}): {result.stderr.strip()[-500:]}",
                    "repair apt, or install the packages by hand",
                )
    still = missing_tools(programs)
    if still:
        raise LabError(f"still missing after the installation: {', '.join(t.program for t in still)}")
