"""The registry: real docker-registry processes on loopback."""

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taskoffer_lab.errors import LabError
from taskoffer_lab.images import registry as registry_module
from taskoffer_lab.images.registry import Registry, has_tag, mark_used, prune_registry, registry_command
from taskoffer_lab.images.runner import Reporter
from taskoffer_lab.process_table import wait_until

REPOSITORY = Path(__file__).parents[2]
MANIFEST = "application/vnd.oci.image.manifest.v1+json"

needs_registry = pytest.mark.usefixtures("image_tools")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TASKOFFER_CACHE", str(tmp_path))
    return tmp_path


def request(registry: Registry, method: str, path: str, body: bytes = b"", kind: str = "") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(registry.address, registry.port, timeout=10)
    connection.request(method, path, body, {"Content-Type": kind or "application/octet-stream"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


def push(registry: Registry, name: str, tag: str, content: bytes) -> str:
    """Push an image of one blob and return the blob's digest."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    place = request(registry, "POST", f"/v2/{name}/blobs/uploads/").getheader("Location") or ""
    path = place.partition(f":{registry.port}")[2]
    assert request(registry, "PUT", f"{path}&digest={digest}", content).status == 201
    entry = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(content)}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": entry, "layers": []}
    body = json.dumps(manifest).encode()
    assert request(registry, "PUT", f"/v2/{name}/manifests/{tag}", body, MANIFEST).status == 201
    return digest


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: gone(pid), f"the end of process {pid}", 60)


@needs_registry
def test_a_registry_answers_has_what_was_pushed_and_ends_with_its_context(cache):
    with Registry.start("127.0.0.1") as registry:
        assert registry.endpoint == f"http://127.0.0.1:{registry.port}"
        assert not has_tag(registry.endpoint, "x", "1")
        push(registry, "x", "1", b"{}")
        assert has_tag(registry.endpoint, "x", "1")
        assert has_tag(f"http://0.0.0.0:{registry.port}", "x", "1")

    with pytest.raises(LabError, match=rf"registry at {registry.endpoint} does not answer"):
        has_tag(registry.endpoint, "x", "1")
    assert list((cache / "images/logs").iterdir()) == []


@needs_registry
def test_registries_on_one_cache_share_images_and_the_first_keeps_the_remembered_port():
    with Registry.start("127.0.0.1") as first, Registry.start("127.0.0.1") as second:
        assert first.port != second.port
        push(first, "x", "1", b"{}")
        assert has_tag(second.endpoint, "x", "1")
        remembered = first.port
    with Registry.start("127.0.0.1") as again:
        assert again.port == remembered
        assert has_tag(again.endpoint, "x", "1")


@needs_registry
def test_an_address_of_another_machine_is_refused_with_the_reason():
    with pytest.raises(LabError, match=r"does not come up on 192\.0\.2\.1: .*cannot assign requested address"):
        Registry.start("192.0.2.1")


_OWNER = """
import sys, time
from taskoffer_lab.images.registry import Registry
registry = Registry.start("127.0.0.1")
print(registry._process.pid, flush=True)
time.sleep(60)
"""


@needs_registry
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_registry_ends_with_its_owner_however_that_ends(end):
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "lab")},
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not gone(pid)
        owner.send_signal(end)
        owner.wait()
    wait_until_gone(pid)


def test_a_supervisor_gets_the_address_by_the_environment(cache):
    command = registry_command("10.210.0.1", 21000, cache / "r.log")

    assert command.environment["REGISTRY_HTTP_ADDR"] == "10.210.0.1:21000"
    assert str(cache / "images/registry") in Path(command.argv[-1]).read_text()


def age(cache: Path, name: str, tag: str, seconds: float) -> None:
    mark_used(name, tag)
    moment = time.time() - seconds
    os.utime(cache / "images/used" / name / tag, (moment, moment))


@needs_registry
def test_old_images_and_their_layers_are_removed_and_new_or_shared_ones_stay(cache):
    day = 24 * 3600.0
    with Registry.start("127.0.0.1") as registry:
        digests = {tag: push(registry, "x", tag, tag.encode()) for tag in ("a", "b", "c", "d", "e", "f")}
        push(registry, "y", "only", b"f")
        for days, tag in enumerate("abcde"):
            age(cache, "x", tag, days * 0.9 * day)
        age(cache, "x", "f", 30 * day)
        age(cache, "y", "only", 30 * day)

        assert sorted(prune_registry(Reporter([].append))) == ["x:e", "x:f"]

        assert [tag for tag in digests if has_tag(registry.endpoint, "x", tag)] == ["a", "b", "c", "d"]
        assert has_tag(registry.endpoint, "y", "only")
        blobs = {path.name for path in (cache / "images/registry").rglob("blobs/sha256/*/*")}
        assert digests["e"].removeprefix("sha256:") not in blobs
        assert digests["f"].removeprefix("sha256:") in blobs, "y still has this layer"
        push(registry, "x", "e", b"e")  # What was removed can come again while the registry runs.
        assert has_tag(registry.endpoint, "x", "e")


@needs_registry
def test_above_the_bound_only_the_newest_image_of_each_name_stays(cache, monkeypatch):
    monkeypatch.setattr(registry_module, "REGISTRY_BOUND_BYTES", 1)
    with Registry.start("127.0.0.1") as registry:
        for seconds, tag in enumerate(("newest", "second", "third")):
            push(registry, "x", tag, tag.encode())
            age(cache, "x", tag, seconds)

        assert sorted(prune_registry(Reporter([].append))) == ["x:second", "x:third"]
        assert has_tag(registry.endpoint, "x", "newest")
