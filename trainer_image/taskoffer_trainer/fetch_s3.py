"""Lists an object or a prefix of a bucket, so that it can be fetched like any other file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx2

from taskoffer.api.contract import ExitCode, FileFormat
from taskoffer_trainer.addresses import TOO_MANY_REDIRECTS, check_address
from taskoffer_trainer.buckets import Bucket, Listed, read_keys
from taskoffer_trainer.cache import CachedFile, key_of
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Fetched, Fetching, Remote, Speaker, error_document, missing
from taskoffer_trainer.listing import Context, Listing, Wanted, check_path
from taskoffer_trainer.row_files import formats_of

__all__ = ["list_s3"]


def list_s3(context: Context) -> Listing:
    """List what lies at an s3 address now.

    Raises:
        TrainerError: ``NO_ACCESS``, the code of a missing item, or ``RESTART`` when the store does not answer.
    """
    item, source = context.item, context.item.source.s3
    if source is None:
        raise ValueError(f"item {item.name} is not in a bucket")
    bucket = Bucket.of(source, read_keys(context.credentials))
    # A store other than AWS is the operator's choice, as the hub is.
    guarded = source.endpoint is None
    if guarded:
        check_address(bucket.base, context.network)
    fetching = context.fetching(guarded)

    def remote(key: str, listed: Listed | None) -> Remote:
        url = bucket.url(key)
        size, etag = (None, None) if listed is None else (listed.size, listed.etag or None)
        return Remote(
            label=f"{item.name} (s3://{bucket.name}/{key})",
            url=url,
            kind=item.kind,
            headers=lambda: bucket.headers("GET", url),
            size=size,
            sha256=item.sha256,
            etag=etag,
            fault=bucket.wrong_region,
        )

    if item.file_name is not None:
        wanted = Wanted(item.file_name, _getter(fetching, remote(bucket.prefix, None)), sha256=item.sha256)
        key = key_of("content", item.sha256) if item.sha256 else key_of("s3", bucket.url(bucket.prefix))
        return Listing(key, (wanted,), item.sha256 is not None, file_format=item.file_format)
    found = _ask(context, bucket, fetching.client, source.url)
    names = {check_path(one.key.removeprefix(bucket.prefix), item.kind): one for one in found}
    chosen = list(names)
    # Which files of a data set's folder are read is said by others of them.
    suffix = item.file_format if item.file_format is not FileFormat.HF else None
    if suffix is not None:
        chosen = formats_of(chosen).get(suffix, [])
    if not chosen:
        what = "no objects" if suffix is None else f"no objects that end in .{suffix.value}"
        raise missing(item.kind, "NothingToFetch", f"{item.name}: {source.url} holds {what}")
    files = tuple(
        Wanted(path, _getter(fetching, remote(names[path].key, names[path])), names[path].size) for path in chosen
    )
    about = [f"{path}:{names[path].size}:{names[path].etag}" for path in sorted(chosen)]
    key = key_of("s3", bucket.url(bucket.prefix), *about)
    return Listing(key, files, True, file_format=item.file_format)


def _getter(fetching: Fetching, remote: Remote) -> Callable[..., Fetched]:
    def get(partial: Path, known: CachedFile | None, limit: int | None, speaker: Speaker) -> Fetched:
        return fetching.fetch(
            replace(remote, known_etag=None if known is None else known.etag), partial, limit, speaker
        )

    return get


def _ask(context: Context, bucket: Bucket, client: httpx2.Client, url: str) -> list[Listed]:
    network, item = context.network, context.item
    why = "it was never asked"
    for number in range(1, network.tries + 1):
        context.interrupt.check()
        try:
            return bucket.list_objects(client)
        except httpx2.HTTPStatusError as error:
            status = error.response.status_code
            region = bucket.wrong_region(error.response, error_document(error.response))
            if region is not None:
                raise region from error
            if status in (401, 403):
                raise TrainerError(
                    ExitCode.NO_ACCESS,
                    "AccessDenied",
                    f"{item.name}: {url} answered {status}; check credentials.s3CredentialsFile and what it may list",
                ) from error
            if status < 500 and status != 429:
                raise missing(item.kind, "NotFound", f"{item.name}: {url} answered {status}") from error
            why = f"the store answered {status}"
        except ValueError as error:
            raise missing(item.kind, "Refused", f"{item.name}: {url}: {error}") from error
        except httpx2.TooManyRedirects as error:
            raise missing(item.kind, "RedirectLoop", f"{item.name}: {url}: {TOO_MANY_REDIRECTS}") from error
        except httpx2.TransportError as error:
            why = str(error) or type(error).__name__
        if number < network.tries:
            print(f"{item.name}: {why}; trying again", flush=True)
            context.interrupt.wait(min(network.retry_wait_seconds * 2**number, 30.0))
    raise TrainerError(ExitCode.RESTART, "NetworkFailed", f"{item.name}: {url}: {why} ({network.tries} tries)")
