"""The builder: real buildah runs on images of a few bytes, in a cache of their own."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from taskoffer_lab.debian import find_program
from taskoffer_lab.errors import LabError
from taskoffer_lab.images.build import build_image, local_name, push_image
from taskoffer_lab.images.registry import Registry, has_tag
from taskoffer_lab.images.runner import CancelledError, Reporter
from taskoffer_lab.images.sources import BuildContext, ImageSource
from taskoffer_lab.images.store import BuildStore, images_folder
from taskoffer_lab.process_table import wait_until
from taskoffer_lab.registry_name import REGISTRY

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="building images needs root"),
    pytest.mark.usefixtures("image_tools"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TASKOFFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def context(folder: Path, dockerfile: str, **files: str) -> BuildContext:
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile.x").write_text(dockerfile)
    for name, text in files.items():
        (folder / name).write_text(text)
    return BuildContext(ImageSource("x", "Dockerfile.x"), folder, "0" * 12)


def mounts() -> set[str]:
    return {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}


def blobs(cache: Path) -> set[str]:
    return {path.parent.name for path in (cache / "images/registry").rglob("data")}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, what, 90)


def running(words: str) -> bool:
    """Tell whether a process has these words in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def test_an_image_is_built_pushed_and_nothing_of_the_builder_stays(cache, tmp_path):
    before, system = mounts(), Path("/var/lib/containers").exists()
    source = context(tmp_path / "src", "FROM scratch\nCOPY a /a\nCOPY code /code\n", a="1", code="1")
    reporter = Reporter([].append)

    with Registry.start("127.0.0.1") as registry:
        with BuildStore(reporter, registry.endpoint).opened() as store:
            build_image(store, source)
            assert store.has_image(local_name(source))
            push_image(store, source, f"{REGISTRY}:{registry.port}/x:first")
            first = blobs(cache)
            (source.folder / "code").write_text("2")
            build_image(store, source)
            assert "Using cache" in (cache / "images/logs/building-x.log").read_text()
            push_image(store, source, f"{REGISTRY}:{registry.port}/x:second")
            assert len(blobs(cache) - first) == 3, "only a manifest, a configuration and the changed layer are new"
            assert (cache / "images/containers/cache/blob-info-cache-v1.boltdb").exists()
        assert has_tag(registry.endpoint, "x", "first")
        assert has_tag(registry.endpoint, "x", "second")

    assert mounts() == before
    assert Path("/var/lib/containers").exists() is system
    assert not (images_folder() / "tmp").exists()


def test_a_build_that_fails_names_the_log_and_the_end_of_the_output(tmp_path):
    source = context(tmp_path / "src", "FROM scratch\nCOPY missing /a\n")

    with BuildStore(Reporter([].append)).opened() as store, pytest.raises(LabError) as caught:
        build_image(store, source)
    assert str(caught.value).startswith("building x failed with status")
    assert "missing" in str(caught.value)
    assert "building-x.log" in str(caught.value)


_SLOW = 'FROM scratch\nCOPY busybox /bin/busybox\nCOPY a /a\nRUN ["/bin/busybox", "sleep", "57{mark}"]\n'
_BUILDER = """
import sys
from pathlib import Path
from taskoffer_lab.images.build import build_image
from taskoffer_lab.images.runner import Reporter
from taskoffer_lab.images.sources import BuildContext, ImageSource
from taskoffer_lab.images.store import BuildStore
with BuildStore(Reporter()).opened() as store:
    build_image(store, BuildContext(ImageSource("x", "Dockerfile.x"), Path(sys.argv[1]), "0" * 12))
"""


def slow_context(folder: Path) -> tuple[BuildContext, str]:
    """Return a build whose last step runs long, and words of that step's command line."""
    busybox = find_program("busybox")
    if busybox is None:
        pytest.skip("busybox is missing")
    mark = f"{os.getpid()}"
    source = context(folder, _SLOW.format(mark=mark), a="1")
    shutil.copy(busybox, folder / "busybox")
    return source, f"busybox sleep 57{mark}"


def test_a_killed_build_leaves_no_process_and_no_mount_and_is_resumed(cache, tmp_path):
    before = mounts()
    source, words = slow_context(tmp_path / "src")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "lab")}
    with subprocess.Popen([sys.executable, "-c", _BUILDER, str(source.folder)], env=environment) as builder:
        wait_for(lambda: running(words), "the slow step never ran")
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    wait_for(lambda: not running(words), "the slow step outlived its builder")
    wait_for(lambda: not running(str(cache)), "buildah outlived its builder")
    assert mounts() == before

    dockerfile = source.folder / "Dockerfile.x"
    dockerfile.write_text(dockerfile.read_text().rpartition("RUN")[0])
    with BuildStore(Reporter([].append)).opened() as store:
        assert store.buildah(["containers", "--quiet"], "listing") == ""
        build_image(store, source)
        assert store.has_image(local_name(source))
    assert "Using cache" in (cache / "images/logs/building-x.log").read_text()


def test_a_cancelled_build_ends_at_once(tmp_path):
    source, words = slow_context(tmp_path / "src")
    cancelled = threading.Event()

    def cancel_when_running() -> None:
        try:
            wait_for(lambda: running(words), "the slow step never ran")
        finally:
            cancelled.set()

    thread = threading.Thread(target=cancel_when_running)
    thread.start()
    with BuildStore(Reporter([].append, cancelled)).opened() as store, pytest.raises(CancelledError):
        build_image(store, source)
    thread.join()
    wait_for(lambda: not running(words), "the slow step outlived its cancellation")
