"""The programs of a cluster: used from `KUBEBUILDER_ASSETS` or the cache, else built on the spot."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.go_toolchain import Go, ensure_go, find_go
from taskoffer_lab.locking import locked
from taskoffer_lab.paths import cache_root
from taskoffer_lab.progress import say, step
from taskoffer_lab.tool_catalog import CATALOG, CONTROL_PLANE_TOOLS, KUBERNETES_VERSION, NODE_TOOLS, GoTool

GROUPS: dict[str, tuple[str, ...]] = {"controlplane": CONTROL_PLANE_TOOLS, "node": NODE_TOOLS}
KEEP_UNUSED_SECONDS = 3 * 24 * 3600.0
"""A tool folder of another key is removed once nobody used it for this long."""

_ASSETS = {"kube-apiserver": "--version", "etcd": "--version", "kubectl": "version"}
_USED_MARK = ".used"


@dataclass(frozen=True)
class ToolSet:
    """Where each program is."""

    paths: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.paths[name]

    @property
    def folders(self) -> list[Path]:
        """The folders that hold the programs, each once, for a PATH."""
        return list(dict.fromkeys(path.parent for path in self.paths.values()))


def ensure_tools(names: Iterable[str]) -> ToolSet:
    """Return the programs `names` (tools or the groups `controlplane` and `node`), building what is missing.

    Order: `KUBEBUILDER_ASSETS` where its version fits, the cache keyed by content, `go build`. Parallel
    callers wait for each other; a program appears in the cache only when it is complete.

    Raises:
        LabError: Unknown name, or a build failed (with the end of its output).
    """
    wanted = _expand(names)
    found = {name: path for name in wanted if (path := _asset(name)) is not None}
    go = find_go()
    found |= _cached([name for name in wanted if name not in found], go)
    missing = [name for name in CATALOG if name in wanted and name not in found]
    if missing:
        go = go or ensure_go()
        found |= _build_all(missing, go)
    _mark_used(found.values())
    return ToolSet({name: found[name] for name in wanted})


def missing_tool_names(names: Iterable[str]) -> list[str]:
    """Return those of `names` that would have to be built; builds nothing."""
    go = find_go()
    wanted = [name for name in _expand(names) if _asset(name) is None]
    have = _cached(wanted, go)
    return [name for name in wanted if name not in have]


def prune_tools(keep_seconds: float = KEEP_UNUSED_SECONDS) -> list[Path]:
    """Remove tool folders that were not used for `keep_seconds`; returns what was removed."""
    removed = []
    root = _tools_root()
    for folder in root.iterdir() if root.is_dir() else []:
        mark = folder / _USED_MARK
        if not folder.is_dir():
            continue
        used = (mark if mark.exists() else folder).stat().st_mtime
        if time.time() - used > keep_seconds:
            shutil.rmtree(folder)
            removed.append(folder)
    return removed


def _tools_root() -> Path:
    return cache_root() / "tools"


def _expand(names: Iterable[str]) -> list[str]:
    wanted: list[str] = []
    for name in names:
        members: Sequence[str] = GROUPS.get(name, (name,))
        for member in members:
            if member not in CATALOG:
                raise LabError(f"unknown tool {member!r}", f"known: {', '.join([*GROUPS, *CATALOG])}")
            if member not in wanted:
                wanted.append(member)
    return wanted


def _asset(name: str) -> Path | None:
    """Return the program from KUBEBUILDER_ASSETS if it is there and of the lab's Kubernetes minor version."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder or name not in _ASSETS:
        return None
    program = Path(folder) / name
    if not os.access(program, os.X_OK):
        return None
    arguments: list[str | Path] = [program, _ASSETS[name], *(["--client"] if name == "kubectl" else [])]
    output = subprocess.run(arguments, capture_output=True, text=True, check=False).stdout
    fits = re.search(r"etcd Version: 3\.([5-9]|\d\d)" if name == "etcd" else _minor_pattern(), output)
    if fits is None:
        first = output.splitlines()[0] if output else "no version"
        say(f"KUBEBUILDER_ASSETS has {name} ({first}), which does not fit {KUBERNETES_VERSION}: not used")
        return None
    return program.absolute()


def _minor_pattern() -> str:
    major, minor, _ = KUBERNETES_VERSION.split(".")
    return re.escape(f"{major}.{minor}.")


def _cached(names: Iterable[str], go: Go | None) -> dict[str, Path]:
    """Return what the cache holds; without a Go toolchain any toolchain's build of it will do."""
    found = {}
    for name in names:
        tool = CATALOG[name]
        if go is not None:
            folders = [_tools_root() / tool.cache_name(go.version)]
        else:
            folders = sorted(_tools_root().glob(f"{tool.cache_prefix()}-*"), reverse=True)
        for folder in folders:
            if (folder / name).exists():
                found[name] = folder / name
                break
    return found


def _build_all(names: Sequence[str], go: Go) -> dict[str, Path]:
    root = _tools_root()
    lock = root / ".lock"
    with locked(lock, on_wait=lambda: say("another process is building the tools; waiting for it")):
        built = _cached(names, go)
        todo = [CATALOG[name] for name in names if name not in built]
        if todo:
            cold = sum(tool.cold_seconds for tool in todo)
            say(f"building {len(todo)} tools with Go {go.version}, kept afterwards: up to {cold} s on 2 cores")
        for tool in todo:
            built[tool.name] = _build(tool, go, root)
        prune_tools()
    return built


def _build(tool: GoTool, go: Go, root: Path) -> Path:
    folder = root / tool.cache_name(go.version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _USED_MARK).touch()
    partial = folder / f".{tool.name}.partial"
    log = folder / f".{tool.name}.log"
    command: list[str | Path] = [go.program, "build", "-trimpath", "-ldflags", tool.module.ldflags]
    command += ["-tags", tool.module.tags] if tool.module.tags else []
    command += ["-o", partial, tool.package]
    with step(f"building {tool.name}", f"up to {tool.cold_seconds} s") as current, log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=tool.module.folder, env=go.environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while _still_running(process):
                current.tick()
        except BaseException:
            process.terminate()
            process.wait()
            partial.unlink(missing_ok=True)
            raise
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-2000:]
        raise LabError(f"building {tool.name} failed ({process.returncode}):\n{tail}", f"whole output: {log}")
    log.unlink()
    partial.replace(folder / tool.name)
    return folder / tool.name


def _still_running(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return True
    return False


def _mark_used(programs: Iterable[Path]) -> None:
    for folder in {program.parent for program in programs}:
        if folder.parent == _tools_root():
            (folder / _USED_MARK).touch()
