"""The image builder: buildah with a store of its own below the cache, in namespaces that end with it."""

import json
import os
import re
import shutil
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from taskoffer_lab.debian import IMAGE_TOOLS, ensure_programs
from taskoffer_lab.errors import LabError
from taskoffer_lab.images.runner import Reporter, run_program
from taskoffer_lab.paths import cache_root, folder_size
from taskoffer_lab.registry_name import REGISTRY

STORE_BOUND_BYTES = 9_000_000_000
"""Above this size layers that no image of the lab uses any more are removed. One set of layers is 6.3 GB."""

MOST_DANGLING_IMAGES = 60
"""Each code change leaves an image without a name; above this number they are removed."""

_SYSTEM_CONTAINERS = Path("/var/lib/containers")

# buildah keeps mounts in its store and knowledge about pushed layers below /var/lib/containers. In namespaces of
# its own both vanish with it, however it ends, and the knowledge lies in the cache. The registry's name is made
# known, for what was pushed is remembered by name and the registry's address changes.
# Where the folder is missing it is made on a tmpfs over its parent, so that the machine keeps no trace of it.
_ENTER = """
set -e
if [ ! -d "$2" ]; then mount -t tmpfs tmpfs "${2%/*}"; mkdir "$2"; fi
mount --bind "$1" "$2"
mount --bind "$3" /etc/hosts
shift 3
exec "$@"
"""
_STEP = re.compile(r"(?P<place>(?:\[\d+/\d+\] )?STEP \d+/\d+): (?P<instruction>.*)")
_BOILERPLATE = re.compile(r"--mount=\S+\s*|if \[.*?; fi\s*&&\s*|DEBIAN_FRONTEND=\S+\s*|/opt/uv/bin/")
_UNSHARE = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")


def images_folder() -> Path:
    """Return the folder of everything about images, below the cache."""
    return cache_root() / "images"


class BuildStore:
    """buildah commands on the lab's own store. Use it under the lock of `images_folder()` only."""

    def __init__(self, reporter: Reporter, registry_endpoint: str | None = None) -> None:
        self.reporter = reporter
        self.folder = images_folder()
        self.temporary = self.folder / "tmp"
        self._hosts = self.folder / "hosts"
        self._endpoint = registry_endpoint

    @contextmanager
    def opened(self) -> Iterator["BuildStore"]:
        """Check the tools, clear what a killed builder left, and remove temporary files at the end.

        Raises:
            LabError: This user or machine cannot build images.
        """
        if os.getuid() != 0:
            raise LabError("building images without a container engine needs root", "run the lab as root")
        ensure_programs(tool.program for tool in IMAGE_TOOLS)
        shutil.rmtree(self.temporary, ignore_errors=True)
        for folder in (self.temporary, self.folder / "containers", self._store, self._run_root):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_hosts()
        if self.folder.is_relative_to(_SYSTEM_CONTAINERS.parent):
            _SYSTEM_CONTAINERS.mkdir(exist_ok=True)  # A tmpfs over the parent would hide the cache.
        try:
            if self.buildah(["containers", "--quiet"], "listing build containers"):
                self.buildah(["rm", "--all"], "removing what an interrupted build left")
            yield self
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def buildah(self, arguments: Sequence[str | Path], label: str) -> str:
        """Run one buildah command and return its output; raises LabError when it fails."""
        command: list[str | Path] = ["buildah", "--root", self._store, "--runroot", self._run_root]
        command += ["--storage-driver", "overlay", *arguments]
        return self.isolated(command, label)

    def isolated(self, command: Sequence[str | Path], label: str) -> str:
        """Run a program in mount and process namespaces that end with it, and with this process."""
        # pdeathsig is sent when the thread that started the program ends; that thread waits for the program.
        argv: list[str | Path] = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "sh", "-c", _ENTER, "sh"]
        argv += [self.folder / "containers", _SYSTEM_CONTAINERS, self._hosts, *command]
        name = label.replace(" ", "-").replace("/", "-")
        return run_program(
            argv,
            label,
            self.reporter,
            log=self.folder / "logs" / f"{name}.log",
            environment={"TMPDIR": str(self.temporary), "CONTAINERS_STORAGE_CONF": str(self._storage_conf())},
            milestone=_build_step,
        )

    def has_image(self, name: str) -> bool:
        """Tell whether the store has an image of this name."""
        repository, _, _ = name.rpartition(":")
        listed = self.buildah(["images", "--format", "{{.Name}}:{{.Tag}}"], f"listing {repository}")
        return name in listed.splitlines()

    def prune(self) -> None:
        """Remove layers that are only a memory of earlier builds, when there are too many of them."""
        dangling = self.buildah(["images", "--quiet", "--filter", "dangling=true"], "counting old images")
        if len(dangling.split()) > MOST_DANGLING_IMAGES or self._size() > STORE_BOUND_BYTES:
            self.buildah(["rmi", "--prune", "--force"], "pruning old layers")

    def _size(self) -> int:
        """Return the bytes of all layers as buildah has written them down: walking them takes seconds."""
        try:
            layers = json.loads((self._store / "overlay-layers/layers.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return folder_size(self._store)
        return sum(layer.get("diff-size", 0) for layer in layers)

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    @property
    def _run_root(self) -> Path:
        # What is recorded here is about mounts, which do not survive a boot.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return self.folder / f"run-{boot}"

    def _storage_conf(self) -> Path:
        path = self.folder / "storage.conf"
        if not path.exists():
            path.write_text('[storage]\ndriver = "overlay"\n', encoding="utf-8")
        return path

    def _write_hosts(self) -> None:
        hosts = Path("/etc/hosts").read_text(encoding="utf-8")
        if self._endpoint is not None:
            address = socket.gethostbyname(dial_host(self._endpoint))
            hosts += f"\n{address} {REGISTRY}\n"
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False, encoding="utf-8") as part:
            part.write(hosts)
        Path(part.name).replace(self._hosts)
        for old in self.folder.glob("run-*"):
            if old != self._run_root:
                shutil.rmtree(old, ignore_errors=True)


def dial_host(endpoint: str) -> str:
    """Return the host under which this machine reaches an endpoint; 0.0.0.0 is reached by loopback.

    Raises:
        LabError: It is not `http://HOST:PORT`.
    """
    parts = urllib.parse.urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise LabError(f"registry endpoint {endpoint!r} is not http://HOST:PORT")
    return "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname


def _build_step(line: str) -> str | None:
    """Return the step that buildah announces in a line, without what every step has in common."""
    found = _STEP.search(line)
    if found is None:
        return None
    instruction = _BOILERPLATE.sub("", found["instruction"])
    return f"{found['place']} {instruction[:100]}"
