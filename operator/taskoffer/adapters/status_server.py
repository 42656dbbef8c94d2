"""The replica's own HTTP port: liveness, readiness, metrics, and answers to questions. Nothing here writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import generate_latest

from taskoffer.adapters.metrics import REGISTRY
from taskoffer.api.base import WireModel
from taskoffer.api.inquiry import OfferAnswer, QueueAnswer

_LISTED = 50
"""Offers that a question about the queue lists unless it says otherwise."""
MOST_LISTED = 1000


class UnansweredError(Exception):
    """A question that cannot be answered, with the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class QueueQuery:
    """Which part of the queue is asked for."""

    policy: str | None = None
    namespace: str | None = None
    limit: int = _LISTED


@dataclass(frozen=True, slots=True)
class Answers:
    """Who answers questions. Both raise :class:`UnansweredError` where they cannot."""

    queue: Callable[[QueueQuery], Awaitable[QueueAnswer]]
    offer: Callable[[str, str], Awaitable[OfferAnswer]]


class StatusServer:
    """Serves /healthz, /readyz, /metrics, /v1/queue and /v1/offers on one port."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        healthy: Callable[[], str | None],
        ready: Callable[[], str | None],
        answers: Answers,
    ) -> None:
        """Take two probes, each of which returns None when all is well, else what is not; and who answers questions."""
        self._host, self._port = host, port
        self._healthy, self._ready, self._answers = healthy, ready, answers
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return what is served."""
        app = web.Application()
        app.router.add_get("/healthz", self._probe(self._healthy))
        app.router.add_get("/readyz", self._probe(self._ready))
        app.router.add_get("/metrics", _metrics)
        app.router.add_get("/v1/queue", self._queue)
        app.router.add_get("/v1/offers/{namespace}/{name}", self._offer)
        return app

    async def start(self) -> None:
        """Start listening."""
        self._runner = web.AppRunner(self.application(), access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    @staticmethod
    def _probe(check: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_request: web.Request) -> web.Response:
            problem = check()
            return web.Response(text=problem or "ok", status=503 if problem else 200)

        return answer

    async def _queue(self, request: web.Request) -> web.Response:
        try:
            return _answer(await self._answers.queue(_query(request)))
        except UnansweredError as error:
            return _unanswered(error)

    async def _offer(self, request: web.Request) -> web.Response:
        try:
            return _answer(await self._answers.offer(request.match_info["namespace"], request.match_info["name"]))
        except UnansweredError as error:
            return _unanswered(error)


def _query(request: web.Request) -> QueueQuery:
    unknown = sorted(set(request.query) - {"policy", "namespace", "limit"})
    if unknown:
        raise UnansweredError(400, f"unknown parameter {unknown[0]}: policy, namespace and limit are known")
    limit = request.query.get("limit", str(_LISTED))
    short = len(limit) <= len(str(MOST_LISTED))
    if not short or not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= MOST_LISTED:
        raise UnansweredError(400, f"limit {limit[:20]} is not a whole number from 1 to {MOST_LISTED}")
    return QueueQuery(request.query.get("policy"), request.query.get("namespace"), int(limit))


def _answer(made: WireModel) -> web.Response:
    return web.Response(text=made.model_dump_json(by_alias=True, exclude_none=True), content_type="application/json")


def _unanswered(error: UnansweredError) -> web.Response:
    return web.json_response({"message": error.message}, status=error.status)


async def _metrics(_request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), content_type="text/plain", charset="utf-8")
