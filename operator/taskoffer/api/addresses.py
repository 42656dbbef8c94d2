"""What an address says of itself: until when its signature lasts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from urllib.parse import parse_qsl, urlsplit

__all__ = ["SIGNATURE_PREFIXES", "expiry"]

SIGNATURE_PREFIXES = ("x-amz-", "x-goog-")
"""How the parameters of a signature begin, in lower case, with S3 and with Google."""


@lru_cache(maxsize=1024)
def expiry(url: str) -> datetime | None:
    """Read from an address when its signature ends; None where it does not say.

    Known are S3 (``X-Amz-Date`` + ``X-Amz-Expires``, AWS "Authenticating Requests: Using Query Parameters"), Google
    (``X-Goog-Date`` + ``X-Goog-Expires``), S3 version 2 and CloudFront (``Expires``), and Azure (``se``).
    """
    try:
        query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
        for prefix in SIGNATURE_PREFIXES:
            if f"{prefix}date" in query and f"{prefix}expires" in query:
                begin = datetime.strptime(query[f"{prefix}date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return begin + timedelta(seconds=int(query[f"{prefix}expires"]))
        if "signature" in query and "expires" in query:
            return datetime.fromtimestamp(int(query["expires"]), UTC)
        if "sig" in query and "se" in query:
            end = datetime.fromisoformat(query["se"].replace("Z", "+00:00"))
            return end if end.tzinfo else end.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        # What cannot be read is for the server to judge.
        return None
    return None
