"""Talks to object stores that speak S3: lists, reads and writes, signed or anonymous.

No S3 client is among the trainer's libraries, and three requests do not ask for one. The signature is AWS's
"Signature Version 4", https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html; the tests hold it
against the examples there.
"""

from __future__ import annotations

import configparser
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

import httpx2

from taskoffer.api.contract import BucketFiles, Credentials, ExitCode
from taskoffer_trainer.clock import now
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.listing import secret

__all__ = ["EMPTY_SHA256", "Bucket", "Keys", "Listed", "read_keys", "sign"]

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"
_OF_REGIONS = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
"""S3's error codes for a request that another region has to answer, or that is signed for another one."""


@dataclass(frozen=True)
class Keys:
    """An access key; never printed."""

    access_key: str
    secret_key: str
    session_token: str | None = None

    def __repr__(self) -> str:
        return "Keys(…)"


@dataclass(frozen=True)
class Listed:
    """An object below a prefix."""

    key: str
    size: int
    etag: str


def read_keys(credentials: Credentials) -> Keys | None:
    """Read the section ``default`` of a credentials file; None without one, for buckets that anybody may read.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the file is not one.
    """
    text = secret("s3CredentialsFile", credentials.s3_credentials_file)
    if text is None:
        return None
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
        section = parser["default"]
        return Keys(
            section["aws_access_key_id"], section["aws_secret_access_key"], section.get("aws_session_token", None)
        )
    except (configparser.Error, KeyError) as error:
        # The parser's own message would quote the line.
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "SecretUnreadable",
            f"credentials.s3CredentialsFile: {credentials.s3_credentials_file} needs a section [default] with "
            "aws_access_key_id and aws_secret_access_key",
        ) from error


def sign(
    method: str,
    url: str,
    headers: dict[str, str],
    payload_sha256: str,
    keys: Keys,
    region: str,
    moment: datetime,
    service: str = "s3",
) -> dict[str, str]:
    """Return the headers with which a request is signed, those given included.

    Args:
        method: HTTP method.
        url: address with its query, percent-encoded.
        headers: headers to send and sign; ``host`` is added.
        payload_sha256: SHA-256 of the body as hexadecimal digits, or ``UNSIGNED-PAYLOAD``.
        keys: the access key.
        region: region that the service runs in.
        moment: when the request is sent; it counts for 15 minutes.
        service: ``s3``.
    """
    parts = urlsplit(url)
    stamp = moment.strftime("%Y%m%dT%H%M%SZ")
    signed = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    signed |= {"host": parts.netloc, "x-amz-date": stamp}
    if service == "s3":
        signed["x-amz-content-sha256"] = payload_sha256
    if keys.session_token is not None:
        signed["x-amz-security-token"] = keys.session_token
    names = ";".join(sorted(signed))
    query = "&".join(sorted(part if "=" in part else f"{part}=" for part in parts.query.split("&") if part))
    canonical = "\n".join(
        (
            method,
            parts.path or "/",
            query,
            *(f"{name}:{signed[name]}" for name in sorted(signed)),
            "",
            names,
            payload_sha256,
        )
    )
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{keys.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    signed["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return signed


@dataclass(frozen=True)
class Bucket:
    """A bucket of a store, and how to talk to it."""

    name: str
    prefix: str
    base: str
    region: str
    keys: Keys | None

    @classmethod
    def of(cls, files: BucketFiles, keys: Keys | None) -> Bucket:
        """Build from an s3 address: AWS by host name, any other store by path.

        A bucket with a dot in its name is addressed by path at AWS as well, whose certificate covers one name before
        its own (AWS, "Bucket naming rules").
        """
        parts = urlsplit(files.url)
        name = parts.netloc
        if files.endpoint is not None:
            base = f"{files.endpoint.rstrip('/')}/{name}"
        elif "." in name:
            base = f"https://s3.{files.region}.amazonaws.com/{name}"
        else:
            base = f"https://{name}.s3.{files.region}.amazonaws.com"
        return cls(name, files.url.removeprefix(f"s3://{name}/"), base, files.region, keys)

    def url(self, key: str) -> str:
        """Return the address of an object."""
        return f"{self.base}/{quote(key, safe='/~')}"

    def headers(
        self, method: str, url: str, payload: str = EMPTY_SHA256, more: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Return the headers for a request that is sent now."""
        if self.keys is None:
            return dict(more or {})
        return sign(method, url, more or {}, payload, self.keys, self.region, now())

    def wrong_region(self, response: httpx2.Response, document: Mapping[str, str]) -> TrainerError | None:
        """Return the error for a bucket of another region than requests are signed for; None for other answers.

        AWS sends to the region's own address (301 without one, 307) or refuses the signature's region (400), and names
        the bucket's region in a header: https://docs.aws.amazon.com/AmazonS3/latest/userguide/Redirects.html. Other
        stores name it in the error document or in its words alone.
        """
        answers = [*response.history, response]
        found = next((r for one in answers if (r := one.headers.get("x-amz-bucket-region"))), None)
        words = re.search(r"expecting '([a-z0-9-]+)'", document.get("Message", ""))
        found = found or document.get("Region") or (words[1] if words else None)
        if document.get("Code") not in _OF_REGIONS and not (found and found != self.region and not response.is_success):
            return None
        where = f"in region {found[:63]}" if found else "in another region or at another endpoint"
        return TrainerError(
            ExitCode.BAD_CONFIG,
            "WrongRegion",
            f"bucket {self.name} is {where}, and requests are signed for {self.region} and sent to "
            f"{urlsplit(self.base).netloc}: set steps.s3Region of the policy to {found[:63] if found else 'its region'}"
            + ("" if found else ", or steps.s3Endpoint for a store other than AWS"),
        )

    def list_objects(self, client: httpx2.Client) -> list[Listed]:
        """List all objects below the prefix (ListObjectsV2), folders' own empty objects left out.

        Raises:
            httpx2.HTTPStatusError: when the store refuses.
            ValueError: when the answer is not the one of S3.
        """
        found: list[Listed] = []
        token: str | None = None
        while True:
            query = {"list-type": "2", "prefix": self.prefix, **({"continuation-token": token} if token else {})}
            url = f"{self.base}/?{urlencode(sorted(query.items()), quote_via=quote, safe='~')}"
            answer = client.get(url, headers=self.headers("GET", url))
            answer.raise_for_status()
            page, token = _parse_page(answer.content)
            found += page
            if token is None:
                return [one for one in found if not one.key.endswith("/")]


def _parse_page(document: bytes) -> tuple[list[Listed], str | None]:
    if b"<!DOCTYPE" in document or b"<!ENTITY" in document:
        raise ValueError("the list of objects is not XML as S3 writes it")
    try:
        root = ElementTree.fromstring(document)  # noqa: S314 - entities were refused above.
    except ElementTree.ParseError as error:
        raise ValueError("the list of objects is not XML") from error
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
    found = []
    for entry in root.findall(f"{space}Contents"):
        values = {name: entry.findtext(f"{space}{name}", "") for name in ("Key", "Size", "ETag")}
        if not values["Key"] or not values["Size"].isdecimal():
            raise ValueError("an entry of the list of objects lacks its key or size")
        found.append(Listed(values["Key"], int(values["Size"]), values["ETag"]))
    if root.findtext(f"{space}IsTruncated", "false") != "true":
        return found, None
    token = root.findtext(f"{space}NextContinuationToken")
    if not token:
        # As of a store that knows only the first version of such lists; a part must not pass for all.
        raise ValueError("the list of objects goes on and does not say where (ListObjectsV2 is needed)")
    return found, token
