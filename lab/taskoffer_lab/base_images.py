"""The two images that every node has without a pull: pause (the sandbox) and busybox (a shell).

Both are one-layer OCI archives that are written here, without an image builder: the pause program is compiled
from its source in the Kubernetes module, busybox is Debian's static one.
"""

import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from taskoffer_lab.debian import find_program
from taskoffer_lab.errors import LabError
from taskoffer_lab.go_toolchain import ensure_go
from taskoffer_lab.locking import locked
from taskoffer_lab.paths import cache_root
from taskoffer_lab.progress import step
from taskoffer_lab.registry_name import BUSYBOX_IMAGE, PAUSE_IMAGE
from taskoffer_lab.tool_catalog import KUBERNETES, KUBERNETES_VERSION

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_OCI = "application/vnd.oci.image"
_FORMAT = "1"  # Part of the cache's key: change it when what is written here changes.


def cached_archives() -> dict[str, Path]:
    """Return image name → archive.

    Raises:
        LabError: They have not been built; `ensure_base_images` does.
    """
    folder = _folder()
    archives = {PAUSE_IMAGE: folder / "pause.tar", BUSYBOX_IMAGE: folder / "busybox.tar"}
    for name, path in archives.items():
        if not path.exists():
            raise LabError(f"image {name} is not in {folder}", "build it: taskoffer-lab up --nodes 1")
    return archives


def ensure_base_images() -> dict[str, Path]:
    """Return image name → archive, building them if they are not in the cache."""
    folder = _folder()
    with locked(folder.with_suffix(".lock")):
        if not (folder / "busybox.tar").exists():
            with step("building the pause and busybox images"):
                folder.mkdir(parents=True, exist_ok=True)
                _write_pause(folder / "pause.tar")
                _write_busybox(folder / "busybox.tar")
    return cached_archives()


def write_oci_archive(target: Path, name: str, layer: bytes, command: Mapping[str, list[str]]) -> None:
    """Write a one-layer OCI archive.

    Args:
        target: The file, replaced atomically.
        name: The image's full name.
        layer: An uncompressed tar of the file system.
        command: `Entrypoint` and `Cmd` of the image's configuration.
    """
    blobs: dict[str, bytes] = {}

    def add(content: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": f"{_OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    layer_entry = add(layer, "layer.v1.tar")
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {**command, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer_entry["digest"]]},
    }
    config_entry = add(json.dumps(config).encode(), "config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": config_entry,
        "layers": [layer_entry],
    }
    entry = add(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    temporary = target.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as archive:
        _add(archive, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        for digest, content in blobs.items():
            _add(archive, f"blobs/sha256/{digest}", content)
    temporary.replace(target)


def _folder() -> Path:
    busybox = find_program("busybox")
    if busybox is None:
        raise LabError("busybox is not on this machine", "apt-get install busybox-static")
    content = hashlib.sha256(busybox.read_bytes()).hexdigest()
    key = hashlib.sha256("\0".join([_FORMAT, KUBERNETES_VERSION, PAUSE_IMAGE, content]).encode())
    return cache_root() / "base-images" / key.hexdigest()[:16]


def _write_pause(target: Path) -> None:
    go = ensure_go()
    found = subprocess.run(
        [go.program, "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"],
        cwd=KUBERNETES.folder,
        env=go.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    source = Path(found.stdout.strip()) / "build/pause/linux/pause.c"
    if found.returncode != 0 or not source.exists():
        raise LabError(f"the source of pause is not in the Kubernetes module: {found.stderr.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pause"
        compiler: list[str | Path] = ["gcc", "-Os", "-static", "-s", f"-DVERSION={KUBERNETES_VERSION}"]
        compiler += ["-o", program, source]
        result = subprocess.run(compiler, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise LabError(f"compiling pause failed: {result.stderr.strip()[-500:]}", "apt-get install gcc libc6-dev")
        layer = _tar({"pause": program.read_bytes()}, {})
    write_oci_archive(target, PAUSE_IMAGE, layer, {"Entrypoint": ["/pause"]})


def _write_busybox(target: Path) -> None:
    busybox = find_program("busybox")
    if busybox is None:
        raise LabError("busybox is not on this machine", "apt-get install busybox-static")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{applet}": "busybox" for applet in listed if applet != "busybox"}
    layer = _tar({"bin/busybox": busybox.read_bytes()}, links)
    write_oci_archive(target, BUSYBOX_IMAGE, layer, {"Cmd": ["/bin/sh"]})


def _tar(programs: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder, mode in (("bin", 0o755), ("tmp", 0o1777), ("etc", 0o755)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        for name, content in programs.items():
            _add(archive, name, content, mode=0o755)
        for name, destination in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, destination, 0o777
            archive.addfile(entry)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
