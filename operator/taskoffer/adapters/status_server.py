"""The replica's own HTTP port: liveness, readiness, metrics, and answers to questions. Nothing here writes.

Whatever is not answered is told in one shape, :class:`~taskoffer.api.inquiry.Unanswered`, also by the routes that do
not exist and to what is no HTTP. Only the probes and the metrics are plain text, because those who read them want it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from prometheus_client import generate_latest

from taskoffer.adapters.metrics import REGISTRY
from taskoffer.api.base import WireModel
from taskoffer.api.inquiry import LISTED, MOST_LISTED, OfferAnswer, QueueAnswer, Unanswered
from taskoffer.api.v1alpha1.meta import name_problem

_SHOWN = 60
"""Characters that are repeated of a name that cannot be one."""
_EXPLAINED = 200
"""Characters of the server library's own words about what is no HTTP."""
_FAILED = "this replica failed over the question: its log says why"
_SERVED = "/v1/queue, /v1/offers/{namespace}/{name}, /healthz, /readyz and /metrics"

logger = logging.getLogger(__name__)


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
    limit: int = LISTED


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
        app = web.Application(middlewares=[_tell_in_one_shape])
        app.router.add_get("/healthz", self._probe(self._healthy))
        app.router.add_get("/readyz", self._probe(self._ready))
        app.router.add_get("/metrics", _metrics)
        app.router.add_get("/v1/queue", self._queue)
        app.router.add_get("/v1/offers/{namespace}/{name}", self._offer)
        return app

    async def start(self) -> None:
        """Start listening."""
        self._runner = _Runner(self.application())
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    @property
    def port(self) -> int:
        """The port that is listened on, also where the system was asked to choose one."""
        if self._runner is None or not self._runner.addresses:
            raise RuntimeError("nothing is listened on: start first")
        return int(self._runner.addresses[0][1])

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
        return _answer(await self._answers.queue(_query(request)))

    async def _offer(self, request: web.Request) -> web.Response:
        names = [_name(part, request.match_info[part]) for part in ("namespace", "name")]
        return _answer(await self._answers.offer(*names))


def _query(request: web.Request) -> QueueQuery:
    given = request.query
    unknown = sorted(set(given) - {"policy", "namespace", "limit"})
    if unknown:
        raise UnansweredError(400, f"unknown parameter {unknown[0][:_SHOWN]}: policy, namespace and limit are known")
    for parameter in given:
        if len(given.getall(parameter)) > 1:
            raise UnansweredError(400, f"{parameter} is given more than once: give it once")
    limit = given.get("limit", str(LISTED))
    short = len(limit) <= len(str(MOST_LISTED))
    if not short or not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= MOST_LISTED:
        what = f"limit {limit[:20]!r} is not" if limit else "limit is empty, it is to be"
        raise UnansweredError(400, f"{what} a whole number from 1 to {MOST_LISTED}")
    policy, namespace = (_name(part, given[part]) if part in given else None for part in ("policy", "namespace"))
    return QueueQuery(policy, namespace, int(limit))


def _name(part: str, text: str) -> str:
    """Return a name that an object can have; the others are refused before anything is looked for."""
    problem = name_problem(text)
    if problem is not None:
        raise UnansweredError(400, f"{part} {repr(text[:_SHOWN]) + ' ' if text else ''}{problem}")
    return text


def _answer(made: WireModel) -> web.Response:
    return web.Response(text=made.model_dump_json(by_alias=True, exclude_none=True), content_type="application/json")


def _unanswered(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response(Unanswered(error=message).to_wire(), status=status, headers=headers)


@web.middleware
async def _tell_in_one_shape(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn what a handler or the router raises into one shape."""
    try:
        return await handler(request)
    except UnansweredError as error:
        return _unanswered(error.status, error.message)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.method[:_SHOWN]} is not taken: nothing is written here, ask with GET"
        return _unanswered(error.status, message, {"Allow": allowed})
    except web.HTTPNotFound as error:
        return _unanswered(error.status, f"nothing is served at {request.path[:_SHOWN]}: there are {_SERVED}")
    except web.HTTPException as error:
        return _unanswered(error.status, error.text or error.reason)
    except Exception:
        logger.exception("a question could not be answered", extra={"path": request.path[:_SHOWN]})
        return _unanswered(500, _FAILED)


class _Connection(web.RequestHandler):
    """A connection on which also what is no HTTP is answered in the one shape: no middleware sees that."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read as a request."""
        failed = status >= 500
        logger.log(logging.ERROR if failed else logging.DEBUG, "a request could not be read", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already, so that none can say what went wrong")
        why = (message or "").partition("\n")[0].rstrip(":")[:_EXPLAINED]
        told = _unanswered(status, _FAILED if failed else f"the request could not be read as HTTP: {why}")
        told.force_close()
        return told


class _Runner(web.AppRunner):
    """Runs the application behind connections of our own."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(app, access_log=None)

    @property
    def server(self) -> Any:
        """Return what makes a connection, None before the runner is set up."""
        made = super().server
        loop = asyncio.get_running_loop()
        # None switches the log of requests off, as it does in AppRunner.
        return made and (lambda: _Connection(made, loop=loop, access_log=None))  # type: ignore[arg-type]


async def _metrics(_request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), content_type="text/plain", charset="utf-8")
