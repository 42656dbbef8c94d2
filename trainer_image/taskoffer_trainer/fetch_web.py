"""One file behind an address, and files of the pod itself."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from taskoffer.api.contract import ExitCode, expiry
from taskoffer_trainer.addresses import check_address, shown, without_signature
from taskoffer_trainer.cache import BLOCK, CachedFile, key_of
from taskoffer_trainer.clock import now
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Fetched, Remote, Speaker, missing
from taskoffer_trainer.listing import Context, Listing, Wanted, check_path

__all__ = ["list_local", "list_web"]


def list_web(context: Context) -> Listing:
    """List the one file behind an address, after a look at when the address expires.

    Raises:
        TrainerError: ``NO_ACCESS`` when the address has expired, ``BAD_CONFIG`` when it must not be followed.
    """
    item, source = context.item, context.item.source.url
    if source is None or item.file_name is None:
        raise ValueError(f"item {item.name} is not behind an address")
    ends = min((moment for moment in (source.expires_at, expiry(source.url)) if moment is not None), default=None)
    if ends is not None and ends <= now():
        raise TrainerError(
            ExitCode.NO_ACCESS,
            "UrlExpired",
            f"{item.name}: {shown(source.url)} has expired at {ends:%Y-%m-%dT%H:%M:%SZ}; ask for a new address",
        )
    check_address(source.url, context.network)
    fetching = context.fetching(guarded=True)
    remote = Remote(label=f"{item.name} ({shown(source.url)})", url=source.url, kind=item.kind, sha256=item.sha256)

    def get(partial: Path, known: CachedFile | None, limit: int | None, speaker: Speaker) -> Fetched:
        return fetching.fetch(
            replace(remote, known_etag=None if known is None else known.etag), partial, limit, speaker
        )

    key = key_of("content", item.sha256) if item.sha256 else key_of("web", without_signature(source.url))
    wanted = Wanted(item.file_name, get, sha256=item.sha256)
    return Listing(key, (wanted,), item.sha256 is not None, file_format=item.file_format)


def list_local(context: Context) -> Listing:
    """List a file or a folder of the pod; its files are copied, so that a run's data cannot change under it.

    Raises:
        TrainerError: when there is nothing, or a link leads out of the folder.
    """
    item, text = context.item, context.item.source.path
    if text is None:
        raise ValueError(f"item {item.name} is not a path")
    root = Path(text)
    if not root.exists():
        raise missing(item.kind, "NotFound", f"{item.name}: {root} does not exist; is its volume mounted?")
    real = root.resolve()
    found = [real] if real.is_file() else sorted(_walk(real))
    for path in found:
        if not path.resolve().is_relative_to(real):
            raise missing(item.kind, "NameRefused", f"{item.name}: {path} is a link that leads out of {root}")
    if item.sha256 is not None and not real.is_file():
        raise missing(item.kind, "ChecksumMismatch", f"{item.name}: sha256 is one of a file and {root} is a folder")

    def wanted(path: Path) -> Wanted:
        name = path.name if real.is_file() else path.relative_to(real).as_posix()

        def get(partial: Path, _known: CachedFile | None, limit: int | None, speaker: Speaker) -> Fetched:
            return _copy(path, partial, limit, speaker, context)

        return Wanted(check_path(name, item.kind), get, path.stat().st_size, item.sha256)

    about = [f"{path.relative_to(real.parent)}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in found]
    key = key_of("local", str(real), item.sha256 or "", *about)
    # Names, sizes and times of writing are what the key stands for, as for make and rsync.
    return Listing(key, tuple(wanted(path) for path in found), True, file_format=item.file_format)


def _walk(root: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return found


def _copy(path: Path, partial: Path, limit: int | None, speaker: Speaker, context: Context) -> Fetched:
    item, interrupt = context.item, context.interrupt
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, partial.open("wb") as target:
        while block := source.read(BLOCK):
            size += len(block)
            if limit is not None and size > limit:
                raise missing(item.kind, "TooLarge", f"{item.name}: {path} is larger than sizeLimit leaves it, {limit}")
            target.write(block)
            digest.update(block)
            speaker.add(len(block))
            interrupt.check()
    found = digest.hexdigest()
    if item.sha256 is not None and found != item.sha256:
        partial.unlink()
        raise missing(item.kind, "ChecksumMismatch", f"{path} has SHA-256 {found} and should have {item.sha256}")
    return Fetched(found, size, None, size)
