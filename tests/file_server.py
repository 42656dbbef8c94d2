"""Files, presigned files and an object store over HTTP, and what can go wrong with any of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

PAGE = 3
"""Entries on a page of a list."""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class WebFile:
    """A file that is served as it is."""

    content: bytes
    etag: str | None = None
    ranges: bool = True
    encoding: str | None = None
    length: bool = True


@dataclass
class Faults:
    """What goes wrong; counters go down with every time it did."""

    cut_after: int | None = None
    cuts: int = 0
    corrupt: int = 0
    statuses: list[int] = field(default_factory=list)
    block_seconds: float = 0.0
    block: int = 16384
    hang: threading.Event | None = None
    hang_at: int = 1
    lose_upload: int = 0
    lose_answers: int = 0
    unlisted: bool = False
    break_uploads: int = 0
    refuse_commits: int = 0


class StoreHandler(BaseHTTPRequestHandler):
    """Answers for files and objects; ``hub`` holds them and the log of what was asked."""

    hub: Any
    entry: Any
    body: bytes
    protocol_version = "HTTP/1.1"
    timeout = 30

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.entry.sent += len(body)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def content(self, file: WebFile) -> None:
        """Send a file, or the range of it that was asked for, with the faults of the moment."""
        begin, status, headers = 0, 200, {}
        content, faults = file.content, self.hub.faults
        if file.etag is not None:
            headers["ETag"] = file.etag
            if self.headers.get("If-None-Match") == file.etag:
                return self.answer(304, headers=headers)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range") in (None, file.etag)
        if wanted and file.ranges and fresh:
            begin = int(wanted[1])
            if begin >= len(content):
                return self.answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if file.encoding is not None:
            headers["Content-Encoding"] = file.encoding
        body = content[begin:]
        if faults.corrupt > 0 and body:
            faults.corrupt -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if file.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return None
        for offset in range(0, len(body), faults.block):
            if faults.cuts > 0 and faults.cut_after is not None and offset >= faults.cut_after:
                faults.cuts -= 1
                self.close_connection = True
                return None
            if faults.hang is not None and begin + offset >= faults.hang_at:
                faults.hang.wait(30)
            if faults.block_seconds:
                time.sleep(faults.block_seconds)
            block = body[offset : offset + faults.block]
            self.wfile.write(block)
            self.entry.sent += len(block)
        return None

    # --- Plain files, and presigned ones: these want a signature and say in S3's words what is wrong with it.

    def on_get_file(self, name: str) -> None:
        file = self.hub.files.get(name)
        return self.answer(404, b"no such file") if file is None else self.content(file)

    def on_get_signed(self, name: str) -> None:
        if self.entry.query.get("X-Amz-Signature") != ["good"]:
            said = "<Code>AccessDenied</Code><Message>Request has expired</Message>"
            return self.answer(403, f"<?xml version='1.0'?><Error>{said}</Error>".encode())
        return self.on_get_file(name)

    def on_get_redirect(self, name: str) -> None:
        """Lead to where the query says, and without one to the same address again."""
        self.answer(302, headers={"Location": self.entry.query.get("to", [f"/redirect/{name}"])[0]})

    # --- The object store, addressed by path.

    def on_get_objects(self, bucket: str, key: str) -> None:
        if not self._signed():
            return None
        if not key:
            return self._list(bucket)
        content = self.hub.buckets[bucket].get(key)
        if content is None and self.hub.faults.unlisted:
            # As AWS answers whoever may not list the bucket.
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        if content is None:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
        return self.content(WebFile(content, f'"{sha256(content)[:32]}"'))

    on_head_objects = on_get_objects

    def _signed(self) -> bool:
        said = self.headers.get("Authorization", "")
        stated = self.headers.get("x-amz-content-sha256")
        if self.hub.region and f"/{self.hub.region}/s3/aws4_request" not in said:
            return self._of_another_region()
        if "Credential=AKIDEXAMPLE/" in said and stated in ("UNSIGNED-PAYLOAD", sha256(self.body)):
            return True
        self.answer(403, b"<Error><Code>SignatureDoesNotMatch</Code><Message>wrong key</Message></Error>")
        return False

    def _of_another_region(self) -> bool:
        """Answer as AWS does for a bucket of another region, in the way that ``hub.region_answer`` names."""
        status, code = self.hub.region_answer
        said = f"<Error><Code>{code}</Code><Message>wrong; expecting '{self.hub.region}'</Message></Error>"
        headers = {"x-amz-bucket-region": self.hub.region} if status == 301 else {}
        self.answer(status, said.encode(), headers)
        return False

    def on_put_objects(self, bucket: str, key: str) -> None:
        if not self._signed():
            return
        if self.hub.faults.lose_upload > 0:
            self.hub.faults.lose_upload -= 1
            self.body = self.body[:-1]
        query = self.entry.query
        if "uploadId" in query:
            self.hub.pieces[query["uploadId"][0]][int(query["partNumber"][0])] = self.body
        else:
            self.hub.buckets[bucket][key] = self.body
        self.answer(200, headers={"ETag": f'"{sha256(self.body)[:32]}"'})

    def on_post_objects(self, bucket: str, key: str) -> None:
        """Begin an upload in pieces, or put its pieces together as their list says."""
        if not self._signed():
            return None
        upload = self.entry.query.get("uploadId", [""])[0]
        if bucket not in self.hub.buckets:
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
        if bucket in self.hub.read_only:
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        if "?uploads" in self.path:
            upload = f"{len(self.hub.pieces)}/+="
            self.hub.pieces[upload] = {}
            return self.answer(200, f"<Result xmlns='x'><UploadId>{upload}</UploadId></Result>".encode())
        if upload not in self.hub.pieces:
            return self.answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        listed = re.findall(r"<PartNumber>(\d+)</PartNumber><ETag>(?:&quot;|\")(\w+)", self.body.decode())
        there = self.hub.pieces[upload]
        if [(int(number), tag) for number, tag in listed] != [
            (number, sha256(there[number])[:32]) for number in sorted(there)
        ]:
            return self.answer(200, b"<Error><Code>InvalidPart</Code></Error>")
        self.hub.buckets[bucket][key] = b"".join(there[number] for number in sorted(there))
        del self.hub.pieces[upload]
        if self.hub.faults.lose_answers > 0:
            self.hub.faults.lose_answers -= 1
            return self.answer(200, b"<Error><Code>InternalError</Code></Error>")
        return self.answer(200, b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>")

    def on_delete_objects(self, bucket: str, key: str) -> None:
        if self._signed():
            self.hub.pieces.pop(self.entry.query["uploadId"][0], None)
            self.answer(204)

    def _list(self, bucket: str) -> None:
        prefix = self.entry.query.get("prefix", [""])[0]
        keys = sorted(key for key in self.hub.buckets[bucket] if key.startswith(prefix))
        begin = int(self.entry.query.get("continuation-token", ["0"])[0])
        text = "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
        for key in keys[begin : begin + PAGE]:
            content = self.hub.buckets[bucket][key]
            etag = f"&quot;{sha256(content)[:32]}&quot;"
            text += f"<Contents><Key>{key}</Key><Size>{len(content)}</Size><ETag>{etag}</ETag></Contents>"
        more = begin + PAGE < len(keys)
        text += f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        if more:
            text += f"<NextContinuationToken>{begin + PAGE}</NextContinuationToken>"
        self.answer(200, (text + "</ListBucketResult>").encode())
