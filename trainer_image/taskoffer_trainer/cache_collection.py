"""Makes room in the cache: what no job uses, the longest unused first, and only when room is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from taskoffer.api.contract import CacheSettings, ExitCode
from taskoffer_trainer.cache import Cache, key_of
from taskoffer_trainer.clock import now
from taskoffer_trainer.failures import TrainerError

__all__ = ["Collected", "collect", "make_room", "usage"]

DISK_MARGIN = 64 << 20
"""Bytes of the disk that are left alone, for small files and other writers."""
_LOCK = "collection"


@dataclass(frozen=True)
class Collected:
    """What a collection did: bytes that the cache holds now, and bytes of blobs that it removed."""

    kept: int
    removed: int


def usage(cache: Cache) -> int:
    """Return the bytes of all blobs, and of downloads the greater of what has come and what was promised."""
    total = sum(about.st_size for _blob, about in _files(cache.root / "blobs"))
    for folder in _entries(cache.root / "incoming"):
        came = sum(about.st_size for file, about in _files(folder) if file.suffix == ".part")
        total += max(came, cache.reserved(folder.name))
    return total


def collect(cache: Cache, settings: CacheSettings, needed: int = 0) -> Collected:
    """Remove what nobody holds any more, then unused blobs while the cache is too large.

    Never removed are blobs that a job's folder links to, anything that was used within the minimum age, and
    downloads that somebody works on.

    Args:
        cache: the cache.
        settings: its limits.
        needed: bytes that are about to come on top.
    """
    with cache.lock(_LOCK, "the collection"):
        return _collect(cache, settings, needed)


def make_room(cache: Cache, settings: CacheSettings, key: str, needed: int) -> None:
    """Promise room to a download, after a collection where there is not enough.

    Raises:
        TrainerError: ``RESTART`` when there is none: jobs that end now make room for a later try; ``BAD_CONFIG``
            when there never will be.
    """
    if settings.size_limit is not None and needed > settings.size_limit:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "CacheTooSmall",
            f"cache.sizeLimit: {settings.size_limit} bytes are less than the {needed} that have to be fetched",
        )
    with cache.lock(_LOCK, "the collection"):
        cache.reserve(key, 0)
        excess = _excess(cache, settings, needed, usage(cache))
        if excess > 0:
            kept = _collect(cache, settings, needed).kept
            excess = _excess(cache, settings, needed, kept)
        if excess > 0:
            raise TrainerError(
                ExitCode.RESTART,
                "CacheFull",
                f"cache {cache.root}: {excess} bytes are lacking for {needed} that have to be fetched; all else is in "
                f"use or younger than {settings.min_age_seconds} s. Try again when jobs have ended, or enlarge it",
            )
        cache.reserve(key, needed)


def _excess(cache: Cache, settings: CacheSettings, needed: int, held: int) -> int:
    """Return by how many bytes the limit or the disk would be exceeded; negative where there is room."""
    of_disk = needed + DISK_MARGIN - shutil.disk_usage(cache.root).free if needed else 0
    of_limit = of_disk if settings.size_limit is None else held + needed - settings.size_limit
    return max(of_disk, of_limit)


def _collect(cache: Cache, settings: CacheSettings, needed: int) -> Collected:
    for grave in _entries(cache.root / "trash"):
        shutil.rmtree(grave, ignore_errors=True)
    _end_leases(cache, settings)
    _drop_stale_downloads(cache, settings)
    held = usage(cache)
    excess = _excess(cache, settings, needed, held)
    removed = 0
    for blob, _about in sorted(_files(cache.root / "blobs"), key=lambda found: found[1].st_mtime):
        if removed >= excess:
            break
        # Looked at again, for sorting took its time. A link that is made after this look keeps its content: what is
        # removed is only the name.
        about = blob.stat()
        if about.st_nlink == 1 and _age(about) >= settings.min_age_seconds:
            blob.unlink()
            removed += about.st_size
    if removed:
        print(f"cache: removed {removed} bytes that nobody uses", flush=True)
    _drop_records(cache, settings)
    _drop_locks(cache, settings)
    return Collected(held - removed, removed)


def _end_leases(cache: Cache, settings: CacheSettings) -> None:
    for folder in _entries(cache.root / "jobs"):
        with _held(cache, f"job-{key_of(folder.name)}") as mine:
            if not mine or not folder.exists():
                continue
            lease = cache.lease(folder.name)
            # Without a lease it is one that was killed at its first moment.
            over = _age(folder.stat()) >= settings.min_age_seconds if lease is None else lease.expires_at <= now()
            if over:
                print(f"cache: the time of job {folder.name} is over, its files are given up", flush=True)
                cache.discard_job(folder.name)


def _drop_stale_downloads(cache: Cache, settings: CacheSettings) -> None:
    for folder in _entries(cache.root / "incoming"):
        if folder.name.startswith("."):
            continue
        with _held(cache, folder.name) as mine:
            if not mine or not folder.exists():
                continue
            ages = [_age(folder.stat()), *(_age(about) for _path, about in _files(folder))]
            if min(ages) >= settings.min_age_seconds:
                cache.finish(folder.name)


def _drop_records(cache: Cache, settings: CacheSettings) -> None:
    for path, about in _files(cache.root / "items"):
        if path.suffix != ".json" or _age(about) < settings.min_age_seconds:
            continue
        with _held(cache, path.stem) as mine:
            record = cache.record(path.stem) if mine else None
            if mine and (record is None or not all(cache.blob(file.sha256).exists() for file in record.files)):
                path.unlink(missing_ok=True)


def _drop_locks(cache: Cache, settings: CacheSettings) -> None:
    """Remove locks of long ago; whoever opened one just now finds it gone when it has it, and makes another."""
    for path, about in _files(cache.root / "locks"):
        if _age(about) < max(settings.min_age_seconds, 3600):
            continue
        with _held(cache, path.stem) as mine:
            if mine:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(cache: Cache, name: str) -> Iterator[bool]:
    """Hold a lock where nobody else does; it lasts to the end of the block."""
    descriptor = cache.try_lock(name)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _age(about: os.stat_result) -> float:
    """Return the seconds since a file was last written or marked as used."""
    return time.time() - about.st_mtime


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files below a folder; what goes away meanwhile is passed over."""
    for place, _folders, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()
