"""Building one image from its Dockerfile. Every layer is kept, so an interrupted build goes on where it was."""

import ssl
import subprocess
from pathlib import Path

from taskoffer_lab.images.base import BASE_IMAGE, apt_credentials, host_mirror
from taskoffer_lab.images.sources import BuildContext
from taskoffer_lab.images.store import BuildStore

_CACHE_IN_BUILD = "/var/cache/uv"


def local_name(context: BuildContext) -> str:
    """Return the image's name in the builder's store."""
    return f"localhost/{context.source.name}:lab"


def build_image(store: BuildStore, context: BuildContext) -> None:
    """Build an image in the store and give it its local name; raises LabError when that fails."""
    arguments: list[str | Path] = ["build", "--layers", "--isolation", "chroot", "--pull-never"]
    arguments += ["--build-arg", f"BASE={BASE_IMAGE}"]
    arguments += ["--volume", f"{_package_cache(store)}:{_CACHE_IN_BUILD}"]
    authorities = ssl.get_default_verify_paths().cafile
    if authorities is not None:
        arguments += ["--secret", f"id=ca,src={authorities}"]
    credentials = apt_credentials(host_mirror())
    if credentials:
        lent = store.temporary / "apt-auth"
        lent.mkdir(mode=0o700, exist_ok=True)
        (lent / "host.conf").write_text(credentials, encoding="utf-8")
        arguments += ["--volume", f"{lent}:/etc/apt/auth.conf.d:ro"]
    arguments += ["--file", context.folder / context.source.dockerfile, "--tag", local_name(context), context.folder]
    store.buildah(arguments, f"building {context.source.name}")


def push_image(store: BuildStore, context: BuildContext, target: str) -> None:
    """Push an image to `HOST:PORT/name:tag` over plain http.

    Layers are compressed with zstd at its fastest level: the way is short, and a layer that the registry has
    already is neither compressed nor sent.
    """
    store.buildah(
        [
            "push",
            "--tls-verify=false",
            "--compression-format=zstd",
            "--compression-level=1",
            local_name(context),
            f"docker://{target}",
        ],
        f"pushing {context.source.name}",
    )


def _package_cache(store: BuildStore) -> Path:
    """Return uv's cache on the host, so that what `uv sync` fetched once is not fetched again."""
    try:
        found = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True)
        cache = Path(found.stdout.strip())
    except (FileNotFoundError, subprocess.CalledProcessError):
        cache = store.temporary / "uv"  # Without uv here the wheels are fetched for this build only.
    cache.mkdir(parents=True, exist_ok=True)
    return cache
