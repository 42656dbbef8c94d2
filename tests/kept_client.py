"""The lab's client with connections that are kept: a test that polls would spend its time on TLS otherwise."""

from __future__ import annotations

import http.client
import json
import select
import threading
import time
import urllib.parse
from typing import Any

from taskoffer_lab.api_client import ApiClient, ClientConfig

_IDLE_SECONDS = 20.0
"""The server hangs up on connections that are idle for long; one that is about to be is not used for a write."""


class KeptClient(ApiClient):
    """As `ApiClient`, with one connection per thread that is used again."""

    def __init__(self, config: ClientConfig, timeout: float = 10.0) -> None:
        super().__init__(config, timeout)
        parts = urllib.parse.urlsplit(config.server)
        self._address = (parts.hostname or "", parts.port or 443)
        self._seconds = timeout
        self._tls = config.ssl_context()
        self._kept = threading.local()
        self._all: list[http.client.HTTPSConnection] = []

    def raw(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, bytes]:
        """Send one request; returns status and body. A connection that the server has closed is opened anew."""
        headers = {"Accept": "application/json", **self.config.headers}
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body).encode(), kind
        if time.monotonic() - getattr(self._kept, "used", 0.0) > _IDLE_SECONDS or self._hung_up():
            self._drop()
        self._kept.used = time.monotonic()
        fresh = getattr(self._kept, "connection", None) is None
        connection = self._connection()
        try:
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (http.client.HTTPException, OSError) as error:
            self._drop()
            # Sent again only where nothing can have come of it: the server hung up before it answered a read.
            if not fresh and method == "GET" and isinstance(error, http.client.HTTPException | ConnectionError):
                return self.raw(method, path, body, kind)
            raise ConnectionError(f"{method} {path}: {error!r}") from error

    def _connection(self) -> http.client.HTTPSConnection:
        found: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if found is None:
            found = http.client.HTTPSConnection(*self._address, timeout=self._seconds, context=self._tls)
            self._kept.connection = found
            self._all.append(found)
        return found

    def _hung_up(self) -> bool:
        """Tell whether the server has closed the kept connection: nothing is to be read on one that is idle."""
        found: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if found is None or found.sock is None:
            return False
        poll = select.poll()
        poll.register(found.sock, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    def _drop(self) -> None:
        found: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if found is not None:
            found.close()
        self._kept.connection = None

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._all:
            connection.close()
        self._kept = threading.local()
