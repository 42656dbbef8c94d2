"""The replica's own HTTP port: liveness, readiness and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import generate_latest

from taskoffer.adapters.metrics import REGISTRY


class StatusServer:
    """Serves /healthz, /readyz and /metrics on one port."""

    def __init__(
        self, host: str, port: int, *, healthy: Callable[[], str | None], ready: Callable[[], str | None]
    ) -> None:
        """Take two probes; each returns None when all is well, else what is not."""
        self._host, self._port = host, port
        self._healthy, self._ready = healthy, ready
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Start listening."""
        app = web.Application()
        app.router.add_get("/healthz", self._probe(self._healthy))
        app.router.add_get("/readyz", self._probe(self._ready))
        app.router.add_get("/metrics", _metrics)
        self._runner = web.AppRunner(app, access_log=None)
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


async def _metrics(_request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), content_type="text/plain", charset="utf-8")
