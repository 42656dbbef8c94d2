"""A proxy between the operator and the API server on which a test places faults while both are running.

    with FaultProxy(cluster.client_config) as proxy, OperatorProcess(cluster, folder, through=proxy):
        with proxy.fault(Match(("patch",), "taskoffers", "status"), Drop(after_commit=True), times=1) as lost:
            bench.offer("some")
            lost.wait_struck(10)
        proxy.cut_watches("pods")

It forwards everything, with the client's credentials, and passes watches on event by event. It speaks plain HTTP/1.1
on the loopback device, since what is to be tested begins behind the TLS; upgraded connections (exec, port-forward)
are not served. ``faults`` says what there is to place.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import yaml
from aiohttp import web

from fault_forwarding import Exchange, Stream, Upstream, passed_on
from fault_requests import Match, Object, Record, read_request
from faults import GONE_IN_STREAM, Action, Answer, Fault, Stall, Swallow, Then
from taskoffer_lab.api_client import ClientConfig

START_SECONDS = 10.0
CALL_SECONDS = 30.0

_RESET = struct.pack("ii", 1, 0)
"""For SO_LINGER: closing discards what is not sent yet and resets the connection."""

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Fault)


class _Connections(web.Server):
    """Tells watches when their client goes away; other requests are carried out to their end, as a server does it."""

    def __init__(self, handler: Any) -> None:
        super().__init__(handler, access_log=None, auto_decompress=False)
        self.watching: dict[web.RequestHandler, asyncio.Task[Any]] = {}
        self._transports: dict[web.RequestHandler, asyncio.Transport] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._transports[handler] = transport

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._transports.pop(handler, None)
        if task := self.watching.pop(handler, None):
            task.cancel()

    def abort(self) -> None:
        """End all connections, also of clients that do not read, for which closing would wait."""
        for transport in self._transports.values():
            transport.abort()


class FaultProxy:
    """Passes requests on to an API server from ``__enter__`` to ``__exit__``, but for those that a fault strikes.

    What goes wrong in a test's own predicates and functions breaks off the request and is raised at the end.

    Args:
        config: How to reach the server.
        as_user: Forward everything as this user; by default with the credentials that the client sends.
    """

    def __init__(self, config: ClientConfig, *, as_user: bool = False) -> None:
        self._config = config
        self._as_user = as_user
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fault-proxy", daemon=True)
        self._started: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._records: list[Record] = []
        self._faults: list[Fault] = []
        self._streams: set[Stream] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._problems: list[Exception] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result(START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CALL_SECONDS)
        assert not self._thread.is_alive(), "the fault proxy does not end: does a function of a Call fault still run?"
        if self._problems and error is None:
            raise ExceptionGroup("in faults of the test", self._problems)

    @property
    def address(self) -> str:
        """Where clients reach the proxy, without a slash at the end."""
        return f"http://127.0.0.1:{self._started.result(0)}"

    @property
    def requests(self) -> list[Record]:
        """All requests so far, in the order in which they came."""
        return list(self._records)

    def seen(self, on: Match) -> list[Record]:
        """Return the requests so far that match; bodies are not kept, so none can be asked for."""
        if on.body is not None:
            raise ValueError("the bodies of requests that have passed are not kept: match by something else")
        return [record for record in self.requests if on.fits(record, None)]

    @property
    def watches(self) -> list[Record]:
        """The watches that are open now."""
        return self._call(self._open_watches())

    def kubeconfig(self, source: Path, folder: Path) -> Path:
        """Write a kubeconfig as `source` that goes through this proxy, and return its path.

        Raises:
            ValueError: when its user has a client certificate, which no proxy can pass on.
        """
        config = yaml.safe_load(source.read_text())
        context = next(c["context"] for c in config["contexts"] if c["name"] == config["current-context"])
        user = next(u["user"] for u in config["users"] if u["name"] == context["user"])
        if not self._as_user and "token" not in user:
            raise ValueError(f"{source}: user {context['user']} has no token, and a certificate ends at the proxy")
        config["users"] = [{"name": context["user"], "user": {"token": user["token"]} if "token" in user else {}}]
        config["clusters"] = [{"name": context["cluster"], "cluster": {"server": self.address}}]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{source.stem}-through-{self._started.result(0)}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def fault(self, on: Match, action: Action, *, skip: int = 0, times: int | None = None, name: str = "") -> Fault:
        """Place a fault (see `Fault`); of several that match, the one placed first strikes."""
        return self.place(Fault(on, action, skip=skip, times=times, name=name))

    def place(self, fault: _F) -> _F:
        """Place a fault or a storm that was made elsewhere."""
        self._call(self._place(fault))
        return fault

    def cut_watches(self, plural: str = "", *, gone: bool = False) -> int:
        """Break off all open watches, of one kind if it is given; returns how many there were.

        Args:
            plural: A regular expression for the kind.
            gone: Send them an event of type ERROR with code 410 first and end them in an orderly way.
        """
        return self._call(self._cut(plural, gone))

    # Everything below runs on the proxy's own event loop.

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._upstream = Upstream(self._config, self._as_user)
        self._server = _Connections(self._handle)
        runner = web.ServerRunner(self._server, shutdown_timeout=1.0)
        try:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._started.set_result(runner.addresses[0][1])
            await self._stop.wait()
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server.abort()
            await runner.cleanup()
            await self._upstream.close()

    async def _open_watches(self) -> list[Record]:
        return [stream.record for stream in self._streams]

    async def _place(self, fault: Fault) -> None:
        fault.bind(asyncio.get_running_loop())
        self._faults = [*(old for old in self._faults if old.active), fault]
        for stream in self._streams:
            stream.consider(fault)

    async def _cut(self, plural: str, gone: bool) -> int:
        on = Match(plural=plural, watch=True)
        meant = [stream for stream in self._streams if on.fits(stream.record, None)]
        for stream in meant:
            if gone:
                with suppress(ConnectionError):  # The client is free to go away just now.
                    await stream.end_with(_error_event(GONE_IN_STREAM, stream.record))
            stream.task.cancel()
        if meant:
            await asyncio.wait([stream.task for stream in meant])
        return len(meant)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            response = await self._serve(request)
        except (aiohttp.ClientError, web.RequestPayloadError, OSError):
            # Either side has hung up; the other one is to see the same.
            response = None
        except Exception as error:  # noqa: BLE001 - raised again by __exit__
            self._problems.append(error)
            response = None
        finally:
            self._tasks.discard(task)
        if response is None:
            # It makes the server close the connection without an answer.
            raise asyncio.CancelledError
        return response

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse | None:
        """Return the answer, or None where the connection is to be closed."""
        body = await request.content.read()
        content = _object(body)
        record = read_request(len(self._records) + 1, request.method, request.path, request.query, content)
        self._records.append(record)
        exchange = Exchange(request, body, record, self._upstream)
        outcome = await self._struck(exchange, content)
        if isinstance(outcome, Answer):
            return await self._refuse(exchange, outcome)
        if outcome is not Then.GO_ON:
            if outcome is Then.RESET:
                _reset(request)
            return None
        if record.watch:
            return await self._watch(exchange)
        await exchange.forward()
        response = exchange.reply()
        if not exchange.client_gone:
            record.status = response.status
        return response

    async def _struck(self, exchange: Exchange, content: Object | None) -> Then | Answer:
        for fault in self._faults:
            if isinstance(fault.action, Stall | Swallow) or not fault.fits(exchange.record, content):
                continue
            if action := fault.strike():
                exchange.record.fault = fault.name if action is fault.action else f"{fault.name}: {action}"
                return await action.perform(exchange, fault)
        return Then.GO_ON

    async def _refuse(self, exchange: Exchange, answer: Answer) -> web.Response:
        record = exchange.record
        record.status = 200 if answer.in_stream else answer.status
        headers = {"Content-Type": "application/json"}
        if answer.retry_after is not None:
            headers["Retry-After"] = str(answer.retry_after)
        content = _error_event(answer, record) if answer.in_stream else json.dumps(answer.content(record)).encode()
        return web.Response(status=record.status, headers=headers, body=content)

    async def _watch(self, exchange: Exchange) -> web.StreamResponse | None:
        record, request = exchange.record, exchange.request
        task = asyncio.current_task()
        assert task is not None
        if exchange.client_gone:
            return None
        self._server.watching[request.protocol] = task
        try:
            async with exchange.send() as upstream:
                record.answered, record.status = time.monotonic(), upstream.status
                headers = passed_on(upstream.headers)
                if upstream.status != 200:
                    return web.Response(status=upstream.status, headers=headers, body=await upstream.read())
                response = web.StreamResponse(headers=headers)
                await response.prepare(request)
                stream = Stream(record, response, self._faults)
                self._streams.add(stream)
                try:
                    await stream.pass_on(upstream)
                finally:
                    self._streams.discard(stream)
                return response
        finally:
            self._server.watching.pop(request.protocol, None)


def _object(body: bytes) -> Object | None:
    """Read a JSON object; None for anything else."""
    try:
        content = json.loads(body) if body else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _error_event(answer: Answer, record: Record) -> bytes:
    return json.dumps({"type": "ERROR", "object": answer.content(record)}).encode() + b"\n"


def _reset(request: web.BaseRequest) -> None:
    """Let the connection be reset when it is closed."""
    if request.transport is not None:
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
