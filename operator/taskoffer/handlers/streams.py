"""kopf's HTTP session, with an ear on each stream: what arrives there is told before kopf has looked at it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
import kopf

from taskoffer.adapters.metrics import WATCH_GAPS, WATCH_HEARD, WATCH_STREAMS
from taskoffer.reconcile.flow import Flow

if TYPE_CHECKING:
    from aiohttp.connector import Connection

logger = logging.getLogger(__name__)

_ERROR_START = b'{"type":"ERROR"'
_GONE = (
    b'{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410}}\n'
)
"""What the API server usually says when it no longer has the history that a watch asks for: kopf lists again."""
_EVENT_STARTS = tuple(b'{"type":"' + kind for kind in (b"ADDED", b"MODIFIED", b"DELETED"))


class _Heard:
    """A response's content whose chunks are announced; all else is the content's own.

    kopf knows one error of a watch after which it lists again, and ends on all others; so it hears of that one only.
    """

    def __init__(self, content: aiohttp.StreamReader, flow: Flow, kind: str, *, refused: bool) -> None:
        self._content, self._flow, self._kind, self._refused = content, flow, kind, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """Yield what arrives; kopf reads its streams this way."""
        if self._refused:
            logger.warning("watch refused by the server", extra={"kind": self._kind, "error": "410 Gone"})
            yield _GONE
            return
        before = b"\n"
        async for chunk in self._content.iter_chunked(size):
            # The text of an object cannot be mistaken for this: it holds no line breaks.
            events, failed, error = (before[-1:] + chunk).partition(b"\n" + _ERROR_START)
            if failed:
                told = error[:500].decode(errors="replace")
                logger.warning("watch ended by the server", extra={"kind": self._kind, "error": told})
                yield (events[1:] + b"\n" if events else b"") + _GONE
                return
            before = chunk
            self._flow.heard(self._kind, event=chunk.startswith(_EVENT_STARTS))
            WATCH_HEARD.labels(self._kind).set_to_current_time()
            yield chunk


def listening(info: kopf.ConnectionInfo, flow: Flow, kinds: dict[str, str]) -> kopf.AiohttpSession:
    """Return kopf's session for a login, one that tells what it hears.

    Args:
        info: Where to connect and how to log in.
        flow: Where it is told.
        kinds: The kind of each plural that is watched.
    """

    class Response(aiohttp.ClientResponse):
        """A response to kopf."""

        async def start(self, connection: Connection) -> aiohttp.ClientResponse:
            await super().start(connection)
            kind = kinds.get(self.url.path.rpartition("/")[2])
            if kind is None or self.method != "GET":
                return self
            watch = self.url.query.get("watch") == "true"
            refused = watch and self.status == 410
            if refused:
                self.status = 200
            if self.status != 200:
                return self
            if watch:
                WATCH_STREAMS.labels(kind).inc()
                self.content = _Heard(self.content, flow, kind, refused=refused)  # type: ignore[assignment]
            elif "continue" in self.url.query:
                flow.heard(kind, event=False)
            elif flow.listed(kind):
                # kopf lists again only when the server no longer has the history that it missed.
                WATCH_GAPS.labels(kind).inc()
            return self

    return kopf.AiohttpSession(
        server=info.server,
        default_namespace=info.default_namespace,
        priority=info.priority,
        expiration=info.expiration,
        aiohttp_session=aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers=info.as_http_headers(),
            proxy=info.proxy_url,
            trust_env=info.trust_env,
            response_class=Response,
        ),
    )
