"""Fetches one file over HTTP: in blocks, goes on where it stopped, and checks what came."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx2
from pydantic import BaseModel, ValidationError

from taskoffer.api.contract import ExitCode, ItemKind, NetworkSettings
from taskoffer_trainer.addresses import TOO_MANY_REDIRECTS
from taskoffer_trainer.cache import BLOCK
from taskoffer_trainer.checkpoints import write_json
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt

__all__ = [
    "Fetched",
    "Fetching",
    "Remote",
    "Speaker",
    "disk_error",
    "document_fields",
    "error_document",
    "git_oid",
    "missing",
]

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0


def missing(kind: ItemKind, reason: str, message: str) -> TrainerError:
    """Build the error for an item that cannot be had."""
    return TrainerError(ExitCode.NO_MODEL if kind is ItemKind.MODEL else ExitCode.BAD_DATA, reason, message)


@dataclass
class Speaker:
    """Says how far something that takes long has come, at most every two seconds."""

    what: str
    total: int | None = None
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def add(self, size: int) -> None:
        """Count bytes."""
        self.done += size
        moment = time.monotonic()
        if moment - self.told >= 2:
            self.told = moment
            of = "" if self.total is None else f" of {self.total / 1e6:.1f}"
            rate = self.done / 1e6 / (moment - self.began)
            print(f"{self.what}: {self.done / 1e6:.1f}{of} MB, {rate:.1f} MB/s", flush=True)


@dataclass(frozen=True)
class Remote:
    """A file behind an address, and what is known of it before it comes.

    ``headers`` is asked anew for every try, because signatures age. ``known_etag`` is that of a copy in the cache:
    when the server still has the same one, nothing is fetched. ``fault`` knows refusals that only this kind of server
    gives, by the answer and its error document.
    """

    label: str
    url: str
    kind: ItemKind
    headers: Callable[[], Mapping[str, str]] = dict
    size: int | None = None
    sha256: str | None = None
    git_oid: str | None = None
    etag: str | None = None
    known_etag: str | None = None
    fault: Callable[[httpx2.Response, Mapping[str, str]], TrainerError | None] = lambda _response, _document: None


@dataclass(frozen=True)
class Fetched:
    """What came; ``unchanged`` means that the copy in the cache is still right and nothing was written."""

    sha256: str
    size: int
    etag: str | None
    came: int
    unchanged: bool = False


class _Partial(BaseModel):
    """What is remembered beside an unfinished file."""

    etag: str | None = None


class _AgainError(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass
class Fetching:
    """Fetches files with one client under the same limits."""

    client: httpx2.Client
    network: NetworkSettings
    interrupt: Interrupt

    def fetch(self, remote: Remote, partial: Path, limit: int | None, speaker: Speaker) -> Fetched:
        """Fetch a file into ``partial``, from where an earlier process stopped if it is still the same file.

        Raises:
            TrainerError: ``NO_ACCESS``, ``NO_MODEL`` or ``BAD_DATA`` when it cannot be had or is not what it should
                be; ``RESTART`` when the network gave nothing new for all tries.
        """
        run = _Run(self, remote, partial, limit, speaker)
        run.recall()
        left = self.network.tries
        while True:
            before = run.size
            try:
                return run.once()
            except httpx2.TooManyRedirects as error:
                raise missing(remote.kind, "RedirectLoop", f"{remote.label}: {TOO_MANY_REDIRECTS}") from error
            except (httpx2.TransportError, httpx2.StreamError, _AgainError) as error:
                why = str(error) or type(error).__name__
                wait = error.wait if isinstance(error, _AgainError) else None
            except OSError as error:
                raise disk_error(partial, error) from error
            left = self.network.tries if run.size > before else left - 1
            if left <= 0:
                raise TrainerError(
                    ExitCode.RESTART,
                    "NetworkFailed",
                    f"{remote.label}: {self.network.tries} tries brought nothing new: {why}; "
                    f"{run.size} bytes are kept for the next attempt",
                )
            if wait is None:
                wait = self.network.retry_wait_seconds * 2 ** (self.network.tries - left)
            print(f"{remote.label}: {why}; trying again at byte {run.size}", flush=True)
            self.interrupt.wait(min(wait, _LONGEST_WAIT))


def disk_error(path: Path, error: OSError) -> TrainerError:
    """Build the error for a file of the cache that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainerError(ExitCode.RESTART, "NoSpace", f"{path.parent}: the disk is full; give the cache more room")
    return TrainerError(ExitCode.INTERNAL, "CacheUnusable", f"{path}: {error.strerror or error}")


class _Run:
    """One file on its way."""

    def __init__(self, by: Fetching, remote: Remote, partial: Path, limit: int | None, speaker: Speaker) -> None:
        self.by, self.remote, self.partial, self.limit, self.speaker = by, remote, partial, limit, speaker
        self.about = partial.with_name(partial.name + ".json")
        self.etag: str | None = None
        self.expected: int | None = None
        self.size = 0
        self.came = 0
        self.spoiled = False
        self.digest = hashlib.sha256()

    def recall(self) -> None:
        """Take up what an earlier process left, where it can only be the same file."""
        with contextlib.suppress(OSError, ValidationError):
            self.etag = _Partial.model_validate_json(self.about.read_bytes()).etag
        same = self.etag is not None and self.remote.etag in (None, self.etag)
        if not self.partial.exists() or not (self._verified or same):
            self._restart()
            return
        with self.partial.open("rb") as file:
            while block := file.read(BLOCK):
                self.digest.update(block)
                self.size += len(block)
                self.by.interrupt.check()
        if self.remote.size is not None and self.size > self.remote.size:
            self._restart()
        elif self.size:
            print(f"{self.remote.label}: going on at byte {self.size}", flush=True)
            self.speaker.done += self.size

    @property
    def _verified(self) -> bool:
        return self.remote.sha256 is not None or self.remote.git_oid is not None

    def _restart(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)
        self.speaker.done -= self.size
        self.size, self.etag, self.digest = 0, None, hashlib.sha256()

    def once(self) -> Fetched:
        """Ask once and take what comes."""
        if self.remote.size is None or self.size < self.remote.size or not self.partial.exists():
            headers = dict(self.remote.headers())
            if self.size:
                headers["Range"] = f"bytes={self.size}-"
                if self.etag is not None:
                    headers["If-Range"] = self.etag
            elif self.remote.known_etag is not None:
                headers["If-None-Match"] = self.remote.known_etag
            with self.by.client.stream("GET", self.remote.url, headers=headers) as response:
                if self._still_known(response):
                    return Fetched("", 0, self.remote.known_etag, 0, unchanged=True)
                if not self._is_whole(response):
                    self._begin(response)
                    self._receive(response)
        return self._finish()

    def _is_whole(self, response: httpx2.Response) -> bool:
        """Tell whether there is nothing after what is here already, of a file that is still the same."""
        end = response.headers.get("Content-Range") == f"bytes */{self.size}"
        return response.status_code == 416 and end and self.size > 0 and (self._verified or self.etag is not None)

    def _still_known(self, response: httpx2.Response) -> bool:
        known = self.remote.known_etag
        return known is not None and (response.status_code == 304 or _strong_etag(response) == known)

    def _begin(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 416:
            self._restart()
            raise _AgainError("the server has no such range any more")
        if status not in (200, 206):
            raise self._refusal(response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise missing(self.remote.kind, "Refused", f"{self.remote.label}: the server sends it compressed, unasked")
        if status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != self.size:
                self._restart()
                raise _AgainError("the server sent another range than was asked for")
            total = None if found[2] == "*" else int(found[2])
        else:
            # The whole file, because it has changed or the server knows no ranges.
            self._restart()
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and length.isdecimal() else None
        if total is not None:
            self._check_limit(total)
            if self.remote.size is not None and total != self.remote.size:
                raise missing(
                    self.remote.kind,
                    "SizeMismatch",
                    f"{self.remote.label} has {total} bytes and {self.remote.size} were announced",
                )
        self.expected = total if total is not None else self.remote.size
        if self.expected is None and not self._verified and "Transfer-Encoding" not in response.headers:
            # RFC 9112, 8: where only the end of the connection ends it, a part cannot be told from the whole.
            print(f"{self.remote.label}: the server does not say how long it is; a sha256 would tell that all came")
        self.speaker.total = self.speaker.total or self.expected
        self.etag = _strong_etag(response)
        write_json(self.about, _Partial(etag=self.etag).model_dump())

    def _check_limit(self, size: int) -> None:
        if self.limit is not None and size > self.limit:
            raise missing(
                self.remote.kind,
                "TooLarge",
                f"{self.remote.label} has {size} bytes or more and sizeLimit leaves it {self.limit}",
            )

    def _receive(self, response: httpx2.Response) -> None:
        with self.partial.open("ab") as file:
            for block in response.iter_raw():
                self._check_limit(self.size + len(block))
                file.write(block)
                self.digest.update(block)
                self.size += len(block)
                self.came += len(block)
                self.speaker.add(len(block))
                self.by.interrupt.check()
        if self.expected is not None and self.size < self.expected:
            raise _AgainError(f"the connection ended after {self.size} of {self.expected} bytes")

    def _finish(self) -> Fetched:
        found = self.digest.hexdigest()
        fault = None
        if self.remote.sha256 is not None and found != self.remote.sha256:
            fault = f"has SHA-256 {found} and should have {self.remote.sha256}"
        elif self.remote.git_oid is not None and (oid := git_oid(self.partial)) != self.remote.git_oid:
            fault = f"is git object {oid} and should be {self.remote.git_oid}"
        if fault is None:
            return Fetched(found, self.size, self.etag, self.came)
        self._restart()
        if not self.spoiled:
            # A block that was lost on the way is not the offer's fault: once more, from the beginning.
            self.spoiled = True
            raise _AgainError(fault)
        raise missing(self.remote.kind, "ChecksumMismatch", f"{self.remote.label} {fault}, twice")

    def _refusal(self, response: httpx2.Response) -> Exception:
        """Say what an answer other than the file means."""
        status, label = response.status_code, self.remote.label
        document = error_document(response)
        said = _reason_given(response, document)
        known = self.remote.fault(response, document)
        if known is not None:
            return known
        if status in _RETRIED:
            after = response.headers.get("Retry-After", "")
            return _AgainError(f"the server answered {status}{said}", float(after) if after.isdecimal() else None)
        if "expired" in said.lower():
            return TrainerError(
                ExitCode.NO_ACCESS, "UrlExpired", f"{label}: the address has expired{said}; ask for a new one"
            )
        if status in (401, 403):
            return TrainerError(
                ExitCode.NO_ACCESS,
                "AccessDenied",
                f"{label}: the server answered {status}{said}; the token, its permissions or the signature of the "
                "address are not good for this file",
            )
        if status in (404, 410):
            return missing(self.remote.kind, "NotFound", f"{label}: the server answered {status}{said}")
        return missing(self.remote.kind, "Refused", f"{label}: the server answered {status}{said}")


def git_oid(path: Path) -> str:
    """Return the SHA-1 that git gives a file: over ``blob <size>``, a zero byte and the content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _strong_etag(response: httpx2.Response) -> str | None:
    """Return the entity tag that stands for these very bytes (RFC 9110, 8.8.3), if there is one."""
    value: Any = response.headers.get("ETag")
    return value if isinstance(value, str) and value.startswith('"') and value.endswith('"') else None


def error_document(response: httpx2.Response) -> dict[str, str]:
    """Return the fields of an S3 error document by their names; nothing where the answer holds none."""
    text = b""
    with contextlib.suppress(httpx2.HTTPError):
        for block in response.iter_bytes():
            text += block
            if len(text) > 16384:
                break
    return document_fields(text)


def document_fields(text: bytes) -> dict[str, str]:
    """Return the fields of one of S3's documents by their names; nothing of a text that is none."""
    if not text.lstrip().startswith(b"<") or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        return {}
    try:
        root = ElementTree.fromstring(text.strip().decode("utf-8", "replace"))  # noqa: S314 - no entities, at most 16 KiB.
    except ElementTree.ParseError:
        return {}
    return {child.tag.rpartition("}")[2]: child.text for child in root if child.text}


def _reason_given(response: httpx2.Response, document: Mapping[str, str]) -> str:
    """Return the hub's error header, or the code and message of an S3 error document, for a message."""
    header = response.headers.get("X-Error-Message")
    if header:
        return f" ({header[:200]})"
    words = [document[name] for name in ("Code", "Message") if name in document]
    return f" ({': '.join(words)[:200]})" if words else ""
