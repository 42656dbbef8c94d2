"""The step before a training: ``python -m taskoffer_trainer.prepare`` puts model and data into the cache."""

from __future__ import annotations

import sys
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from taskoffer.api.contract import (
    PREPARE_CONFIG_PATH,
    ExitCode,
    FetchedItem,
    FetchItem,
    FileFormat,
    ItemKind,
    PrepareConfig,
    Termination,
    item_path,
)
from taskoffer_trainer.addresses import without_signature
from taskoffer_trainer.buckets import read_keys
from taskoffer_trainer.cache import Cache, CachedFile, Held, Record, key_of, tree_digest
from taskoffer_trainer.cache_collection import collect, make_room
from taskoffer_trainer.clock import now
from taskoffer_trainer.failures import COMPLETED, TrainerError
from taskoffer_trainer.fetch import Speaker, missing
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.listing import Context, Listing, Wanted, git_key, secret
from taskoffer_trainer.model_files import what_is_lacking
from taskoffer_trainer.row_files import formats_of
from taskoffer_trainer.step_command import run_step
from taskoffer_trainer.target_check import check_target

__all__ = ["main", "prepare"]

_ABOUT = """\
Asks whether the result may be written where it is to go, then fetches the model, the data and a foreign trainer that a
PrepareConfig file names into a cache that jobs share, checks them, and gives the job its own folder there,
<cache>/jobs/<job>. What is there already is not fetched again, and a download that was stopped goes on where it was."""

_MORE = """\
Exit codes: 0 all is there; 143 stopped by a signal and 138 please start again (the network, a full cache or disk):
the same command goes on; 64 bad configuration; 65 the data and 66 the model is missing or not what it should be; 77
access was refused or an address has expired; 70 fault in the step.

Environment: HF_ENDPOINT (address of the hub), TASKOFFER_TERMINATION_LOG (termination message,
/dev/termination-log), and the usual HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE. Secrets come as files only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_step("prepare", _ABOUT, _MORE, PrepareConfig, PREPARE_CONFIG_PATH, check, prepare, arguments)


def check(config: PrepareConfig, interrupt: Interrupt) -> str:
    """Look at all that can be looked at without fetching anything.

    Raises:
        TrainerError: with what is wrong.
    """
    Cache.open(Path(config.cache.path), interrupt)
    secret("hubTokenFile", config.credentials.hub_token_file)
    read_keys(config.credentials)
    check_target(config, interrupt)
    with ExitStack() as stack:
        for item in config.items:
            if item.source.hub is None and item.source.s3 is None:
                _list(Context(item, config.credentials, config.network, interrupt, stack))
    return f"ready to fetch {', '.join(item.name for item in config.items) or 'nothing'} for {config.job_name}"


def prepare(config: PrepareConfig, interrupt: Interrupt) -> Termination:
    """Bring every item into the job's folder.

    Raises:
        TrainerError: with the item and what is wrong with it.
    """
    if config.lease_expires_at <= now():
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "DeadlinePassed",
            f"leaseExpiresAt: {config.lease_expires_at:%Y-%m-%dT%H:%M:%SZ} has passed",
        )
    cache = Cache.open(Path(config.cache.path), interrupt)
    check_target(config, interrupt)
    fetched = []
    with cache.job_lock(config.job_name), ExitStack() as stack:
        cache.hold(config.job_name, config.lease_expires_at)
        for item in config.items:
            one = _Preparing(cache, config, Context(item, config.credentials, config.network, interrupt, stack)).run()
            print(
                f"prepare: {item.name}: {one.files} files, {one.bytes / 1e6:.1f} MB, of which "
                f"{one.fetched_bytes / 1e6:.1f} MB were fetched, at {cache.root / item_path(config.job_name, item)}",
                flush=True,
            )
            fetched.append(one)
    # What came without its size being known beforehand was not counted then.
    collect(cache, config.cache)
    size, came = sum(one.bytes for one in fetched), sum(one.fetched_bytes for one in fetched)
    message = f"{len(fetched)} items of {size} bytes are ready, {came} bytes were fetched"
    return Termination(exit_code=ExitCode.DONE, reason=COMPLETED, message=message, fetched=tuple(fetched))


def _list(context: Context) -> Listing:
    """Ask the item's source what it holds. Sources are imported when they are used: the hub's library is slow."""
    source = context.item.source
    if source.hub is not None:
        from taskoffer_trainer.fetch_hub import list_hub

        return list_hub(context)
    if source.git is not None:
        from taskoffer_trainer.fetch_git import list_git

        return list_git(context)
    from taskoffer_trainer.fetch_s3 import list_s3
    from taskoffer_trainer.fetch_web import list_local, list_web

    if source.url is not None:
        return list_web(context)
    return list_s3(context) if source.s3 is not None else list_local(context)


@dataclass
class _Preparing:
    """One item on its way into the job's folder."""

    cache: Cache
    config: PrepareConfig
    context: Context

    @property
    def item(self) -> FetchItem:
        """The item."""
        return self.context.item

    def run(self) -> FetchedItem:
        """Have the item in the job's folder, and say what it is."""
        job, item = self.config.job_name, self.item
        source = _source_key(item)
        ready = self.cache.published(job, item.name, source)
        if ready is not None:
            # An earlier attempt of this job has it. A later one trains on the very same files, whatever a branch
            # or an address may hold by now.
            return ready.model_copy(update={"fetched_bytes": 0})
        began = now()
        listing = self._listing_in_cache() or _list(self.context)
        self._check_size(sum(wanted.size or 0 for wanted in listing.files))
        staging = self.cache.staging(job, item.name)
        with self.cache.lock(listing.key, item.name):
            listing, brought = self._brought(listing)
            files, came = self._gather(listing, staging, began)
            _check_content(item, staging, files)
            self.cache.write_record(listing.key, Record(source=item.name, files=tuple(files), fetched_at=now()))
            self.cache.finish(listing.key)
        report = _report(item, files, came + brought, listing)
        self.cache.publish(job, item.name, Held(source=source, report=report))
        return report

    def _listing_in_cache(self) -> Listing | None:
        """Return what a commit that is named in full holds, when all of it is in the cache: no need to ask."""
        source = self.item.source
        if source.hub is not None:
            from taskoffer_trainer.fetch_hub import fixed_key

            key, revision = fixed_key(self.context), source.hub.revision
        elif source.git is not None:
            key, revision = git_key(source.git), source.git.commit
        else:
            return None
        record = None if key is None else self.cache.record(key)
        if key is None or record is None or not all(self.cache.blob(file.sha256).exists() for file in record.files):
            return None

        def gone(*_arguments: object) -> object:
            raise TrainerError(ExitCode.RESTART, "CacheChanged", f"{self.item.name}: the cache lost a file meanwhile")

        files = tuple(Wanted(file.path, gone, file.size, file.sha256) for file in record.files)  # type: ignore[arg-type]
        return Listing(key, files, True, revision, self.item.file_format)

    def _brought(self, listing: Listing) -> tuple[Listing, int]:
        """Bring a source that comes in one piece, unless another pod brought it while its lock was waited for."""
        if listing.bring is None:
            return listing, 0
        known = self._listing_in_cache()
        if known is not None:
            return known, 0
        make_room(self.cache, self.config.cache, listing.key, 0)
        limits = [limit for limit in (self.item.size_limit, self.config.cache.size_limit) if limit is not None]
        speaker = Speaker(f"prepare: {self.item.name}")
        files, came = listing.bring(self.cache.incoming(listing.key), min(limits, default=None), speaker)
        return replace(listing, files=files), came

    def _check_size(self, size: int) -> None:
        limit = self.item.size_limit
        if limit is not None and size > limit:
            raise missing(self.item.kind, "TooLarge", f"{self.item.name} has {size} bytes and sizeLimit allows {limit}")

    def _gather(self, listing: Listing, staging: Path, since: datetime) -> tuple[list[CachedFile], int]:
        """Link what the cache has, then fetch what it lacks; the lock of the source is held."""
        record = self.cache.record(listing.key)
        # A pod that was waited for has just fetched it; then it need not come a second time.
        just_now = record is not None and record.fetched_at >= since
        files: dict[str, CachedFile] = {}
        for wanted in listing.files:
            known = record.file(wanted.path) if record is not None else None
            sha256 = wanted.sha256 or (known.sha256 if known is not None and (listing.fixed or just_now) else None)
            taken = self.cache.take(sha256, wanted.size, staging / wanted.path) if sha256 is not None else None
            if taken is not None:
                etag = None if known is None else known.etag
                files[wanted.path] = taken.model_copy(update={"path": wanted.path, "etag": etag})
            self.context.interrupt.check()
        lacking = [wanted for wanted in listing.files if wanted.path not in files]
        needed = sum(wanted.size or 0 for wanted in lacking)
        if lacking:
            make_room(self.cache, self.config.cache, listing.key, needed)
        speaker = Speaker(f"prepare: {self.item.name}", needed or None)
        came = 0
        for wanted in lacking:
            held = sum(file.size for file in files.values())
            known = record.file(wanted.path) if record is not None else None
            files[wanted.path], size = self._fetch(listing, wanted, known, staging / wanted.path, held, speaker)
            came += size
        return [files[wanted.path] for wanted in listing.files], came

    def _fetch(
        self,
        listing: Listing,
        wanted: Wanted,
        known: CachedFile | None,
        place: Path,
        held: int,
        speaker: Speaker,
    ) -> tuple[CachedFile, int]:
        # What the server may call unchanged is pinned first, so that it cannot go while the server is asked.
        kept = None
        if known is not None and known.etag is not None:
            kept = self.cache.take(known.sha256, known.size, place)
        limits = [self.item.size_limit, self.config.cache.size_limit]
        limit = min((limit - held for limit in limits if limit is not None), default=None)
        partial = self.cache.incoming(listing.key) / f"{key_of(wanted.path)[:32]}.part"
        got = wanted.get(partial, known if kept is not None else None, limit, speaker)
        if got.unchanged and kept is not None and known is not None:
            return known, 0
        self.cache.add(partial, got.sha256, place)
        return CachedFile(path=wanted.path, sha256=got.sha256, size=got.size, etag=got.etag), got.came


def _source_key(item: FetchItem) -> str:
    """Return a name for what an item is made from; another signature of the same address changes nothing."""
    url = item.source.url
    if url is not None:
        plain = url.model_copy(update={"url": without_signature(url.url), "expires_at": None})
        item = item.model_copy(update={"source": item.source.model_copy(update={"url": plain})})
    return key_of(item.model_dump_json())


def _report(item: FetchItem, files: list[CachedFile], came: int, listing: Listing) -> FetchedItem:
    found = formats_of([file.path for file in files]) if item.kind is ItemKind.DATA else {}
    return FetchedItem(
        name=item.name,
        digest=tree_digest(files),
        revision=listing.revision,
        files=len(files),
        bytes=sum(file.size for file in files),
        fetched_bytes=came,
        file_format=item.file_format or listing.file_format or next(iter(found), None),
    )


def _check_content(item: FetchItem, folder: Path, files: list[CachedFile]) -> None:
    """See that an item can be what it is for; whether it can be trained on shows in training."""
    if not files or sum(file.size for file in files) == 0:
        raise missing(item.kind, "Empty", f"{item.name}: the source holds no bytes")
    lacking = what_is_lacking(folder, [file.path for file in files]) if item.kind is ItemKind.MODEL else ""
    if lacking:
        names = ", ".join(file.path for file in files[:8])
        raise missing(
            item.kind,
            "ModelIncomplete",
            f"{item.name}: {lacking}; what came is {names}; name a model, or a revision of it, that has its weights as "
            "safetensors",
        )
    git = item.source.git
    if git is not None and git.entrypoint is not None and not (folder / git.entrypoint).is_file():
        names = ", ".join(file.path for file in files if file.path.endswith(".py"))[:300] or "none"
        raise missing(
            item.kind,
            "EntrypointMissing",
            f"{item.name}: commit {git.commit} has no {git.entrypoint} (of Python: {names})",
        )
    if item.file_format is FileFormat.ZIP:
        for file in files:
            if not zipfile.is_zipfile(folder / file.path):
                raise missing(item.kind, "NotAnArchive", f"{item.name}: {file.path} is not a zip archive")


if __name__ == "__main__":
    sys.exit(main())
