"""Hands a result over to a folder or to a bucket, and reads back what has arrived."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlencode
from xml.sax.saxutils import escape

import httpx2

from taskoffer.api.contract import BucketFiles, ExitCode, PrepareConfig, Published, SubmitConfig
from taskoffer_trainer.addresses import TOO_MANY_REDIRECTS, check_address, make_client
from taskoffer_trainer.buckets import Bucket, read_keys
from taskoffer_trainer.cache import BLOCK
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Speaker, document_fields, error_document
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit_verify import Part, failed

__all__ = ["may_write_to", "to_bucket", "to_folder"]

_T = TypeVar("_T")
PIECE = 64 << 20
"""Bytes that are written to a bucket in one request; a larger file goes in pieces of so many. One request takes 5 GiB
at most, which an adapter of high rank exceeds, and of pieces only the one that breaks is sent again."""
_REFUSED = "SubmitRefused"
"""Reason of an answer that is neither a success nor a lack of rights."""
MOST_PIECES = 10_000
"""Pieces of one object that S3 takes (AWS, "Amazon S3 multipart upload limits")."""


def _published(to: str, parts: list[Part]) -> Published:
    return Published(to=to, files=len(parts), bytes=sum(part.size for part in parts))


def _blocks(part: Part, speaker: Speaker, interrupt: Interrupt) -> Iterator[bytes]:
    if part.path is None:
        yield part.read()
        return
    with part.path.open("rb") as file:
        while block := file.read(BLOCK):
            interrupt.check()
            yield block
            speaker.add(len(block))


def _digest_of(path: Path, interrupt: Interrupt) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                interrupt.check()
    except (FileNotFoundError, IsADirectoryError):
        return None
    return digest.hexdigest()


def to_folder(final: Path, parts: list[Part], interrupt: Interrupt) -> Published:
    """Copy beside the folder, check the copy, and rename it into place.

    Raises:
        TrainerError: ``VERIFY_FAILED`` when the copy is not what was copied.
    """
    if all(_digest_of(final / part.name, interrupt) == part.sha256 for part in parts):
        print(f"submit: {final} holds all of it already", flush=True)
        return _published(str(final), parts)
    fresh, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    speaker = Speaker(f"submit: copying to {final}", sum(part.size for part in parts))
    try:
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        for part in parts:
            place = fresh / part.name
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                for block in _blocks(part, speaker, interrupt):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise TrainerError(
            ExitCode.BAD_CONFIG, "FolderNotWritable", f"target.folder: {final}: {error.strerror or error}"
        ) from error
    wrong = [part.name for part in parts if _digest_of(fresh / part.name, interrupt) != part.sha256]
    if wrong:
        raise failed("UploadMismatch", f"{fresh}: {', '.join(wrong)} reads back otherwise than it was written")
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return _published(str(final), parts)


def to_bucket(config: SubmitConfig, target: BucketFiles, parts: list[Part], interrupt: Interrupt) -> Published:
    """Write each file as an object below the prefix, the manifest last, and read each back.

    Raises:
        TrainerError: ``NO_ACCESS``, ``RESTART`` when the store does not answer, or ``VERIFY_FAILED``.
    """
    with _upload(config, target, interrupt, sum(part.size for part in parts)) as run:
        for part in parts:
            # Who may write and read objects and not list them is told 403 of one that is not there.
            if run.digest(part, nothing=(403, 404)) != part.sha256:
                run.put(part)
                if run.digest(part) != part.sha256:
                    raise failed("UploadMismatch", f"{target.url}{part.name} reads back otherwise than it was written")
    return _published(target.url, parts)


def may_write_to(target: BucketFiles, config: PrepareConfig, interrupt: Interrupt) -> bool:
    """Tell whether objects can be written below a prefix: an upload in pieces is begun there and given up.

    Returns:
        False where the store's answer decides nothing.

    Raises:
        TrainerError: ``NO_ACCESS``; ``VERIFY_FAILED`` when there is no such bucket; ``RESTART`` when the store does not
            answer.
    """
    part = Part.of("adapter_model.safetensors", b"")
    with _upload(config, target, interrupt, 0) as run:
        try:
            upload = run.begin(part)
        except TrainerError as error:
            if error.reason != _REFUSED:
                raise
            return False
        run.give_up(part, upload)
    return True


@contextmanager
def _upload(
    config: SubmitConfig | PrepareConfig, target: BucketFiles, interrupt: Interrupt, total: int
) -> Iterator[_BucketUpload]:
    bucket = Bucket.of(target, read_keys(config.credentials))
    # A store other than AWS is the operator's choice, as the hub is.
    guarded = target.endpoint is None
    if guarded:
        check_address(bucket.base, config.network)
    with make_client(config.network, guarded) as client:
        yield _BucketUpload(bucket, config, interrupt, client, total)


class _BucketUpload:
    """One result on its way to one bucket."""

    def __init__(
        self,
        bucket: Bucket,
        config: SubmitConfig | PrepareConfig,
        interrupt: Interrupt,
        client: httpx2.Client,
        total: int,
    ) -> None:
        self.bucket, self.config, self.interrupt = bucket, config, interrupt
        self.client = client
        self.speaker = Speaker(f"submit: uploading below {bucket.prefix}", total)

    def digest(self, part: Part, nothing: tuple[int, ...] = (404,)) -> str | None:
        """Return the SHA-256 of what the bucket holds under a name; None when it holds nothing.

        Args:
            part: the file.
            nothing: answers that mean that it holds nothing.
        """
        url = self._url(part)

        def ask() -> str | None:
            digest = hashlib.sha256()
            with self.client.stream("GET", url, headers=self.bucket.headers("GET", url)) as answer:
                if answer.status_code in nothing:
                    return None
                if not answer.is_success:
                    answer.read()
                answer.raise_for_status()
                for block in answer.iter_raw():
                    digest.update(block)
                    self.interrupt.check()
            return digest.hexdigest()

        return self._tried(part.name, ask)

    def put(self, part: Part) -> None:
        """Write an object; the store checks what comes against the SHA-256 that is part of each signature."""
        if part.path is not None and part.size > PIECE:
            self._put_pieces(part, part.path)
            return

        def ask() -> None:
            content = _blocks(part, self.speaker, self.interrupt)
            self._send("PUT", self._url(part), part.sha256, part.size, content)

        self._tried(part.name, ask)

    def begin(self, part: Part) -> str:
        """Begin an upload in pieces and return its id."""
        begun = self._tried(part.name, lambda: self._post(self._url(part, uploads=""), b""))
        upload = begun.get("UploadId")
        if not upload:
            raise failed(_REFUSED, f"{part.name}: the store gives no id for an upload in pieces")
        return upload

    def give_up(self, part: Part, upload: str) -> None:
        """End an upload in pieces without an object: pieces without an end would stay and be paid for."""
        # The answer does not matter: nothing depends on it, or a failure is told.
        with contextlib.suppress(httpx2.HTTPError):
            url = self._url(part, uploadId=upload)
            self.client.delete(url, headers=self.bucket.headers("DELETE", url))

    def _put_pieces(self, part: Part, path: Path) -> None:
        """Write an object in pieces, which become one when the last has arrived (AWS, "Multipart upload overview")."""
        upload = self.begin(part)
        size = max(PIECE, -(-part.size // MOST_PIECES))
        try:
            tags = [self._put_piece(part, path, upload, at, size) for at in range(0, part.size, size)]
            pieces = "".join(
                f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>"
                for number, tag in enumerate(tags, start=1)
            )
            self._join(part, upload, f"<CompleteMultipartUpload>{pieces}</CompleteMultipartUpload>".encode())
        except BaseException:
            self.give_up(part, upload)
            raise

    def _join(self, part: Part, upload: str, pieces: bytes) -> None:
        try:
            self._tried(part.name, lambda: self._post(self._url(part, uploadId=upload), pieces))
        except TrainerError:
            # Where only the answer was lost, there is nothing left to put together a second time.
            if self.digest(part, nothing=(403, 404)) != part.sha256:
                raise

    def _put_piece(self, part: Part, path: Path, upload: str, begin: int, size: int) -> str:
        """Write a piece and return the tag that the store gives it."""
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read(size)
        url = self._url(part, partNumber=str(begin // size + 1), uploadId=upload)
        digest = hashlib.sha256(content).hexdigest()

        def blocks() -> Iterator[bytes]:
            for at in range(0, len(content), BLOCK):
                self.interrupt.check()
                yield content[at : at + BLOCK]
                self.speaker.add(len(content[at : at + BLOCK]))

        def ask() -> str:
            return escape(self._send("PUT", url, digest, len(content), blocks()).headers.get("ETag", ""))

        return self._tried(part.name, ask)

    def _post(self, url: str, body: bytes) -> dict[str, str]:
        """Ask for something and return the fields of the answer.

        Raises:
            httpx2.RemoteProtocolError: when the answer begins as a success and is an error, which S3 sends where
                putting pieces together takes long and fails.
        """
        answer = self._send("POST", url, hashlib.sha256(body).hexdigest(), len(body), iter((body,)))
        said = document_fields(answer.content)
        if "Code" in said:
            raise httpx2.RemoteProtocolError(f"the store answered {said['Code']}", request=answer.request)
        return said

    def _send(self, method: str, url: str, sha256: str, size: int, content: Iterator[bytes]) -> httpx2.Response:
        headers = {**self.bucket.headers(method, url, sha256), "Content-Length": str(size)}
        return self.client.request(method, url, headers=headers, content=content).raise_for_status()

    def _url(self, part: Part, **query: str) -> str:
        url = self.bucket.url(self.bucket.prefix + part.name)
        return f"{url}?{urlencode(sorted(query.items()), quote_via=quote, safe='~')}" if query else url

    def _tried(self, name: str, ask: Callable[[], _T]) -> _T:
        network, why = self.config.network, "it was never asked"
        for number in range(1, network.tries + 1):
            self.interrupt.check()
            try:
                return ask()
            except httpx2.HTTPStatusError as error:
                status = error.response.status_code
                document = error_document(error.response)
                region = self.bucket.wrong_region(error.response, document)
                if region is not None:
                    raise region from error
                if status in (401, 403):
                    raise TrainerError(
                        ExitCode.NO_ACCESS,
                        "AccessDenied",
                        f"{name}: the store answered {status}; check credentials.s3CredentialsFile and its rights",
                    ) from error
                if status < 500 and status not in (408, 429):
                    if document.get("Code") == "NoSuchBucket":
                        raise failed("BucketMissing", f"there is no bucket {self.bucket.name}") from error
                    raise failed(_REFUSED, f"{name}: the store answered {status}") from error
                why = f"the store answered {status}"
            except httpx2.TooManyRedirects as error:
                raise failed(_REFUSED, f"{name}: {TOO_MANY_REDIRECTS}") from error
            except httpx2.TransportError as error:
                why = str(error) or type(error).__name__
            if number < network.tries:
                print(f"store: {name}: {why}; trying again", flush=True)
                self.interrupt.wait(min(network.retry_wait_seconds * 2**number, 30.0))
        raise TrainerError(ExitCode.RESTART, "NetworkFailed", f"{name}: {why} ({network.tries} tries)")
