"""A cache of model and data files that jobs share: every content once, and nothing visible before it is whole.

::

    blobs/ab/abcd…        one file per content, named by its SHA-256, read-only
    items/<key>.json      which files, by SHA-256, a source was last found to hold
    jobs/<job>/<item>/…   what a job works with: hard links to blobs
    jobs/<job>/.lease     until when the job keeps them
    incoming/<key>/       downloads that are not whole yet, and the room they were promised
    locks/                files that are locked with flock, which the kernel ends with their holder
    trash/                folders on their way out

A job's folder holds links and not names, so a blob is in use exactly when it has more than one link. Collection
looks at nothing else: it cannot take away what somebody reads, even where it is wrong about leases or clocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from taskoffer.api.contract import ExitCode, FetchedItem, job_folder
from taskoffer_trainer.checkpoints import write_json
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt

__all__ = ["Cache", "CachedFile", "Held", "Lease", "Record", "key_of", "tree_digest"]

BLOCK = 1 << 20
"""Bytes that are read, hashed and written at once; between two blocks a step can end."""
_LEASE = ".lease"
_POLL_SECONDS = 0.1


class _Kept(BaseModel):
    """A small file of the cache; what a later version adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


_M = TypeVar("_M", bound=_Kept)


class CachedFile(_Kept):
    """A file of an item."""

    path: str
    sha256: str
    size: int
    etag: str | None = None


class Record(_Kept):
    """What a source was last found to hold."""

    source: str
    files: tuple[CachedFile, ...]
    fetched_at: AwareDatetime

    def file(self, path: str) -> CachedFile | None:
        """Return what is known of a file by its path."""
        return next((file for file in self.files if file.path == path), None)


class Held(_Kept):
    """An item of a job: what it was made from, and what was said of it then."""

    source: str
    report: FetchedItem


class Lease(_Kept):
    """Until when a job keeps its files, and which items it has."""

    expires_at: AwareDatetime
    items: dict[str, Held] = {}


def key_of(*parts: str) -> str:
    """Return a name for a source: a SHA-256 over its parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tree_digest(files: list[CachedFile]) -> str:
    """Return the SHA-256 over paths and contents of files, whatever their order."""
    return key_of(*(f"{file.path}\0{file.sha256}" for file in sorted(files, key=lambda file: file.path)))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_model(kind: type[_M], path: Path) -> _M | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


@dataclass(frozen=True)
class Cache:
    """The folder of the cache and what can be done with it. All paths are on one file system."""

    root: Path
    interrupt: Interrupt

    @classmethod
    def open(cls, root: Path, interrupt: Interrupt) -> Cache:
        """Make the folders of a cache where they are missing, and see that it can be used.

        Raises:
            TrainerError: ``BAD_CONFIG`` when it cannot be written or has no hard links.
        """
        cache = cls(root, interrupt)
        probe = root / "incoming" / f".probe-{os.getpid()}"
        try:
            for name in ("blobs", "items", "jobs", "incoming", "locks", "trash"):
                (root / name).mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.with_suffix(".link").unlink(missing_ok=True)
            os.link(probe, probe.with_suffix(".link"))
        except OSError as error:
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "CacheUnusable",
                f"cache.path: {root} must be a folder that user {os.getuid()} can write and whose file system has hard "
                f"links: {error.strerror or error}",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
                probe.with_suffix(".link").unlink(missing_ok=True)
        return cache

    def blob(self, sha256: str) -> Path:
        """Return where a content lies when it is there."""
        return self.root / "blobs" / sha256[:2] / sha256

    def incoming(self, key: str) -> Path:
        """Return the folder for unfinished downloads of a source; its lock must be held."""
        folder = self.root / "incoming" / key
        folder.mkdir(exist_ok=True)
        return folder

    def job(self, job_name: str) -> Path:
        """Return the folder of a job."""
        return self.root / job_folder(job_name)

    # --- Locks.

    def try_lock(self, name: str) -> int | None:
        """Take a lock when it is free and return its descriptor; closing that, or dying, gives it back."""
        path = self.root / "locks" / f"{name}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed the file after it was opened; then this lock protects from nobody.
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    @contextlib.contextmanager
    def lock(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock, waiting for it where another pod has it."""
        told = 0.0
        while (descriptor := self.try_lock(name)) is None:
            if time.monotonic() - told > 10:
                print(f"cache: waiting for another pod that has {what}", flush=True)
                told = time.monotonic()
            self.interrupt.wait(_POLL_SECONDS)
        try:
            yield
        finally:
            os.close(descriptor)

    # --- Contents.

    def take(self, sha256: str, size: int | None, place: Path) -> CachedFile | None:
        """Link a content to a place and mark it as used; None when the cache does not have it."""
        blob = self.blob(sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(blob, place)
        except FileNotFoundError:
            return None
        found = place.stat().st_size
        if size is not None and found != size:
            # Cut short by a fault of the file system: it was whole when it came here.
            blob.unlink(missing_ok=True)
            place.unlink()
            return None
        with contextlib.suppress(PermissionError):
            # Another user's file cannot be touched; then the order of removal is a little less exact.
            os.utime(place)
        return CachedFile(path="", sha256=sha256, size=found)

    def add(self, partial: Path, sha256: str, place: Path) -> None:
        """Turn a finished download into a blob and link it to a place; its content must have been hashed."""
        partial.chmod(0o444)
        _sync(partial)
        os.utime(partial)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        # First the link and then the name: so the blob is in use from its first moment.
        os.link(partial, place)
        blob = self.blob(sha256)
        blob.parent.mkdir(exist_ok=True)
        partial.rename(blob)
        _sync(blob.parent)

    def record(self, key: str) -> Record | None:
        """Return what is known of a source."""
        return _read_model(Record, self.root / "items" / f"{key}.json")

    def write_record(self, key: str, record: Record) -> None:
        """Remember what a source holds; its lock must be held."""
        write_json(self.root / "items" / f"{key}.json", record.model_dump(mode="json"))

    # --- Jobs.

    @contextlib.contextmanager
    def job_lock(self, job_name: str) -> Iterator[None]:
        """Keep a job's folder from being collected or changed by anybody else."""
        with self.lock(f"job-{key_of(job_name)}", f"the folder of job {job_name}"):
            yield

    def lease(self, job_name: str) -> Lease | None:
        """Return until when a job keeps its files."""
        return _read_model(Lease, self.job(job_name) / _LEASE)

    def hold(self, job_name: str, until: datetime) -> None:
        """Mark a job's files, present and coming, as used until a moment; its lock must be held."""
        self.job(job_name).mkdir(exist_ok=True)
        old = self.lease(job_name)
        lease = Lease(expires_at=until, items={} if old is None else old.items)
        write_json(self.job(job_name) / _LEASE, lease.model_dump(mode="json"))

    def staging(self, job_name: str, item: str) -> Path:
        """Return an empty folder where an item is put together; links in it count as use."""
        folder = self.job(job_name) / f".{item}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self, job_name: str, item: str, held: Held) -> None:
        """Let an item that was put together be seen, whole, under its name."""
        final, lease = self.job(job_name) / item, self.lease(job_name)
        if lease is None:
            raise ValueError(f"job {job_name} holds no lease")
        if final.exists():
            self._discard(final)
        lease = lease.model_copy(update={"items": {**lease.items, item: held}})
        write_json(self.job(job_name) / _LEASE, lease.model_dump(mode="json"))
        (self.job(job_name) / f".{item}.tmp").rename(final)
        _sync(final.parent)

    def published(self, job_name: str, item: str, source: str) -> FetchedItem | None:
        """Return what was said of an item when this job has it already, made from the same source."""
        lease = self.lease(job_name)
        held = None if lease is None else lease.items.get(item)
        if held is None or held.source != source or not (self.job(job_name) / item).is_dir():
            return None
        return held.report

    def release(self, job_name: str) -> None:
        """Give up all that a job holds; nothing happens when it holds nothing."""
        with self.job_lock(job_name):
            if self.job(job_name).exists():
                self._discard(self.job(job_name))

    def discard_job(self, job_name: str) -> None:
        """Remove a job's folder; its lock must be held."""
        self._discard(self.job(job_name))

    def _discard(self, folder: Path) -> None:
        """Remove a folder so that nobody ever sees half of it."""
        grave = self.root / "trash" / f"{os.getpid()}-{time.time_ns()}"
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def reserved(self, key: str) -> int:
        """Return the bytes that were promised to a download."""
        value = _read_json(self.root / "incoming" / key / "reserved")
        return int(value.get("bytes", 0)) if value else 0

    def reserve(self, key: str, size: int) -> None:
        """Promise room to a download, so that others count it before it has come."""
        write_json(self.incoming(key) / "reserved", {"bytes": size})

    def finish(self, key: str) -> None:
        """Remove what a download left; its lock must be held."""
        shutil.rmtree(self.root / "incoming" / key, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
