"""A registry that serves the lab's images to its nodes: Debian's docker-registry over plain http."""

import contextlib
import http.client
import os
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from taskoffer_lab.debian import ensure_programs
from taskoffer_lab.errors import LabError
from taskoffer_lab.images.runner import Reporter, run_program
from taskoffer_lab.images.store import dial_host, images_folder
from taskoffer_lab.paths import folder_size
from taskoffer_lab.process_table import Command

KEEP_TAGS = 4
"""How many of the newest images of one name are kept, whatever their age."""

KEEP_SECONDS = 24 * 3600.0
"""How long an image is kept since it was last asked for."""

REGISTRY_BOUND_BYTES = 7_000_000_000
"""Above this size only the newest image of each name is kept. One set of layers is 3 GB."""

_READY_SECONDS = 60.0
_STOP_SECONDS = 5.0
_PORTS = range(20000, 30000)  # Below the ports that the kernel gives to outgoing connections.
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


def registry_command(address: str, port: int, log: Path) -> Command:
    """Return how a supervisor starts the registry on an address and port of its choice.

    Several may run at once on the same storage, on different addresses or ports.
    """
    return Command(
        name="registry",
        argv=["docker-registry", "serve", _configuration()],
        log=log,
        environment={"REGISTRY_HTTP_ADDR": f"{address}:{port}", "OTEL_TRACES_EXPORTER": "none"},
    )


class Registry:
    """A running registry. It ends with `stop`, with its context, and with this process, whatever ends that.

    The storage is shared by all registries of this cache. The port is remembered, because the builder remembers
    by name and port which layers it has pushed; where it is taken, another one serves as well.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self._log = images_folder() / "logs" / f"registry-{address}-{port}-{os.getpid()}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()

    @classmethod
    def start(cls, bind_address: str) -> "Registry":
        """Start a registry on an address of this machine and wait until it answers.

        Raises:
            LabError: docker-registry is missing, the address is not this machine's, or it does not come up.
        """
        ensure_programs(["docker-registry"])
        complaint = ""
        for port in _ports_to_try():
            registry = cls(bind_address, port)
            complaint = registry._come_up()
            if not complaint:
                return registry
            if "address already in use" not in complaint:
                break
        raise LabError(f"the image registry does not come up on {bind_address}: {complaint}")

    @property
    def endpoint(self) -> str:
        """`http://ADDRESS:PORT`."""
        return f"http://{self.address}:{self.port}"

    def stop(self) -> None:
        """End it; does nothing when it has ended."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _come_up(self) -> str:
        """Start the process and wait until it answers; return what went wrong, or nothing."""
        threading.Thread(target=self._own, name=f"registry-{self.port}", daemon=True).start()
        self._started.wait()
        deadline = time.monotonic() + _READY_SECONDS
        while self._process is not None and self._process.poll() is None:
            # An answer alone may come from another registry that was first on this port.
            if "listening on" in self._words():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if _request(self.endpoint, "GET", "/v2/") == http.HTTPStatus.OK:
                        return ""
            if time.monotonic() > deadline:
                self.stop()
                return f"no answer after {_READY_SECONDS:.0f} s"
            time.sleep(0.05)
        last = self._words().strip().rpartition("\n")[2]
        self._log.unlink(missing_ok=True)
        said = re.search(r'msg="(.*?)"(?: |$)', last)
        return (said[1] if said else last) or "it ended without a word"

    def _words(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _own(self) -> None:
        """Start the process and wait for its end.

        The kernel ends the process when the thread that started it ends, so that thread has to stay.
        """
        command = registry_command(self.address, self.port, self._log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *map(str, command.argv)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={"PATH": _search_path(), **command.environment},
                    process_group=0,  # Ctrl-C is for the lab, which then stops the registry last.
                )
        finally:
            self._started.set()
        self._process.wait()


def has_tag(endpoint: str, name: str, tag: str) -> bool:
    """Ask a registry whether it has an image.

    Raises:
        LabError: The registry does not answer.
    """
    try:
        status = _request(endpoint, "HEAD", f"/v2/{name}/manifests/{tag}")
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"the image registry at {endpoint} does not answer: {error}", "start it first") from error
    return status == http.HTTPStatus.OK


def mark_used(name: str, tag: str) -> None:
    """Remember that an image was asked for now."""
    stamp = images_folder() / "used" / name / tag
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


def prune_registry(reporter: Reporter) -> list[str]:
    """Remove images that nobody asked for in a while and the layers that only they had.

    Nobody may push meanwhile. Nodes keep what they have pulled.

    Returns:
        The removed images as `name:tag`.
    """
    removed = _drop(lambda place, age: place >= KEEP_TAGS and age > KEEP_SECONDS)
    if removed:
        _collect_garbage(reporter)
    if folder_size(_storage()) > REGISTRY_BOUND_BYTES:
        more = _drop(lambda place, age: place >= 1)
        if more:
            _collect_garbage(reporter)
        removed += more
    return removed


def _storage() -> Path:
    return images_folder() / "registry"


def _configuration() -> Path:
    """Write docker-registry's configuration and return its path; the address comes by the environment."""
    path = images_folder() / "registry.yml"
    text = (
        "version: 0.1\n"
        "log: {level: info, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{_storage()}'}}, delete: {{enabled: true}}}}\n"
        "http: {addr: '127.0.0.1:0'}\n"
    )
    _storage().mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        part = path.with_suffix(f".{threading.get_ident()}.tmp")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return path


def _ports_to_try() -> Iterator[int]:
    """Yield the remembered port, remembering one first, and then others."""
    memory = images_folder() / "registry.port"
    memory.parent.mkdir(parents=True, exist_ok=True)
    if not memory.exists():
        with contextlib.suppress(FileExistsError), memory.open("x", encoding="ascii") as file:
            file.write(str(random.choice(_PORTS)))  # noqa: S311 - Any free port will do.
    remembered = memory.read_text(encoding="ascii").strip()
    if remembered.isdigit():
        yield int(remembered)
    yield from random.sample(_PORTS, 5)


def _drop(unwanted: Callable[[int, float], bool]) -> list[str]:
    """Remove tags by their place among the tags of their name (0 is the newest) and their age in seconds."""
    removed = []
    for tags in (_storage() / "docker/registry/v2/repositories").glob("*/_manifests/tags"):
        name = tags.parent.parent.name
        ages = {tag.name: _age(name, tag) for tag in tags.iterdir()}
        for place, tag in enumerate(sorted(ages, key=lambda tag: ages[tag])):
            if unwanted(place, ages[tag]):
                shutil.rmtree(tags / tag)
                (images_folder() / "used" / name / tag).unlink(missing_ok=True)
                removed.append(f"{name}:{tag}")
    return removed


def _age(name: str, tag: Path) -> float:
    """Return the seconds since an image was asked for, or since it came where nobody has asked yet."""
    stamp = images_folder() / "used" / name / tag.name
    return time.time() - (stamp if stamp.exists() else tag).stat().st_mtime


def _collect_garbage(reporter: Reporter) -> None:
    argv: list[str | Path] = ["docker-registry", "garbage-collect", "--delete-untagged", _configuration()]
    log = images_folder() / "logs" / "registry-garbage.log"
    run_program(argv, "removing old images from the registry", reporter, log=log)


def _request(endpoint: str, method: str, path: str) -> int:
    """Return the status of a request."""
    port = urllib.parse.urlsplit(endpoint).port
    connection = http.client.HTTPConnection(dial_host(endpoint), port, timeout=5)
    try:
        connection.request(method, path, headers={"Accept": ", ".join(_MANIFESTS)})
        return connection.getresponse().status
    finally:
        connection.close()


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
