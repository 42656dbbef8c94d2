"""How the fault proxy passes things on: single requests to the API server, and the events of watches from it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from fault_requests import Record
from faults import Fault, Stall, Swallow
from taskoffer_lab.api_client import ClientConfig

CLOSE_SECONDS = 5.0
CONNECT_SECONDS = 5.0

# They belong to one connection (RFC 9110, 7.6.1) or are made anew by the client or the server of the next one.
_NOT_PASSED_ON = frozenset(
    ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "date")
)


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers that go to the other side."""
    return CIMultiDict((key, value) for key, value in headers.items() if key.lower() not in _NOT_PASSED_ON)


class Upstream:
    """The connections to the API server."""

    def __init__(self, config: ClientConfig, as_user: bool) -> None:
        self._server = config.server.rstrip("/")
        trusted = config if as_user else ClientConfig(config.server, config.authority)
        self._headers = config.headers if as_user else {}
        self._sockets: list[socket.socket] = []
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=trusted.ssl_context(), socket_factory=self._socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    def send(self, request: web.BaseRequest, body: bytes) -> aiohttp.client._RequestContextManager:
        """Send a request on as it came."""
        headers = passed_on(request.headers)
        headers.update(self._headers)
        if "watch" in request.query:
            # Events are looked at one by one.
            headers.popall("Accept-Encoding", None)
        target = URL(self._server + request.raw_path, encoded=True)
        return self._session.request(request.method, target, data=body or None, headers=headers, allow_redirects=False)

    async def close(self) -> None:
        """Close all connections; TLS takes a little longer for it, and Python warns of sockets left open."""
        await self._session.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        while any(one.fileno() >= 0 for one in self._sockets) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _socket(self, address: tuple[int | socket.AddressFamily, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, _ = address
        self._sockets = [one for one in self._sockets if one.fileno() >= 0]
        made = socket.socket(family, kind, protocol)
        self._sockets.append(made)
        return made


class Exchange:
    """A request and, once it was forwarded, the server's answer."""

    def __init__(self, request: web.BaseRequest, body: bytes, record: Record, upstream: Upstream) -> None:
        self.request = request
        self.record = record
        self._body = body
        self._upstream = upstream
        self._answer: tuple[int, CIMultiDict[str], bytes] | None = None

    @property
    def client_gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.request.transport is None

    def send(self) -> aiohttp.client._RequestContextManager:
        """Send the request on; a context that holds the answer."""
        if self.record.write:
            self.record.committed = None
        return self._upstream.send(self.request, self._body)

    async def forward(self) -> None:
        """Send the request on, once, and wait for the server's answer."""
        if self._answer is not None:
            return
        try:
            async with self.send() as answer:
                content = await answer.read()
        except aiohttp.ClientConnectorError:
            self.record.committed = False
            raise
        self.record.answered = time.monotonic()
        # A server that ran into a timeout of its own may have stored the object nevertheless.
        if self.record.write:
            self.record.committed = None if answer.status >= 500 else answer.status < 300
        self._answer = (answer.status, passed_on(answer.headers), content)

    def reply(self) -> web.Response:
        """Return the server's answer."""
        assert self._answer is not None
        status, headers, content = self._answer
        return web.Response(status=status, headers=headers, body=content)


class Stream:
    """An open watch: passes events on, but for those that a fault takes."""

    def __init__(self, record: Record, response: web.StreamResponse, faults: list[Fault]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.record = record
        self.task = task
        self._response = response
        self._stalls: list[Fault] = []
        self._swallows: list[Fault] = []
        for fault in faults:
            self.consider(fault)

    def consider(self, fault: Fault) -> None:
        """Take a fault into account that was placed before or after this watch was opened."""
        if not fault.fits(self.record, None):
            return
        if isinstance(fault.action, Swallow):
            self._swallows.append(fault)
        elif isinstance(fault.action, Stall) and fault.strike():
            self.record.fault = fault.name
            self._stalls.append(fault)

    async def pass_on(self, upstream: aiohttp.ClientResponse) -> None:
        """Pass on events until the server ends the watch; a stalled one is not seen to end."""
        try:
            await self._pass_lines(upstream)
        except aiohttp.ClientError:
            await self._stand()
            raise
        await self._stand()

    async def _pass_lines(self, upstream: aiohttp.ClientResponse) -> None:
        rest = b""
        async for chunk in upstream.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            if any(stall.active for stall in self._stalls):
                continue
            if self._swallows:
                lines = [line for line in lines if not self._swallowed(line)]
            if lines:
                await self._response.write(b"\n".join(lines) + b"\n")

    async def _stand(self) -> None:
        for stall in self._stalls:
            await stall.stand(self.record)

    def _swallowed(self, line: bytes) -> bool:
        event = json.loads(line)
        for fault in self._swallows:
            action = fault.action
            meant = isinstance(action, Swallow) and action.matches(event["type"], event["object"])
            if meant and fault.active and fault.strike():
                self.record.fault = fault.name
                return True
        return False

    async def end_with(self, event: bytes) -> None:
        """Send a last event and end the answer as a server does."""
        await self._response.write(event)
        await self._response.write_eof()
