"""What kopf gets to hear of a watch that the server refuses or ends with an error: that it has to list again."""

from __future__ import annotations

import json
from collections.abc import Callable

import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from taskoffer.handlers.streams import listening
from taskoffer.reconcile.flow import Flow

PATH = "/apis/taskoffer.dev/v1alpha1/taskoffers"
EVENT = b'{"type":"ADDED","object":{"metadata":{"name":"ERROR"},"text":"{\\"type\\":\\"ERROR\\""}}\n'
BROKEN = b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcd event received with PrevKv=nil"}}\n'
EXPIRED = BROKEN.replace(b"500", b"410")

STREAMS: dict[str, tuple[list[bytes], list[str]]] = {
    "nothing is wrong": ([EVENT, EVENT], ["ADDED", "ADDED"]),
    "an event in two pieces": ([EVENT[:30], EVENT[30:]], ["ADDED"]),
    "the usual end of a history": ([EVENT, EXPIRED], ["ADDED", "ERROR 410"]),
    "an error of the server": ([EVENT, BROKEN], ["ADDED", "ERROR 410"]),
    "an error right away": ([BROKEN], ["ERROR 410"]),
    "an error behind events of the same piece": ([EVENT + EVENT + BROKEN], ["ADDED", "ADDED", "ERROR 410"]),
    "an error after a line in two pieces": ([EVENT[:30], EVENT[30:] + BROKEN], ["ADDED", "ERROR 410"]),
    "an error whose line comes later": ([EVENT[:-1], b"\n" + BROKEN], ["ADDED", "ERROR 410"]),
    "what follows an error": ([BROKEN, EVENT], ["ERROR 410"]),
}


async def heard(answer: Callable[[web.Request], object], *, watch: bool = True) -> tuple[int, list[str]]:
    """Return the status and the events that kopf would get for an answer of the server."""
    app = web.Application()
    app.router.add_get(PATH, answer)  # type: ignore[arg-type]
    async with TestServer(app) as server:
        session = listening(kopf.ConnectionInfo(server=str(server.make_url(""))), _flow(), {"taskoffers": "TaskOffer"})
        async with session.aiohttp_session as http:
            query = {"watch": "true"} if watch else {}
            response = await http.get(server.make_url(PATH), params=query)
            text = b"".join([chunk async for chunk in response.content.iter_chunked(65536)])
            # kopf does so when it has had enough, also before the end.
            response.close()
    return response.status, [_name(line) for line in text.splitlines()]


def _flow() -> Flow:
    return Flow(["TaskOffer"], 20, lambda: 0.0)


def _name(line: bytes) -> str:
    event = json.loads(line)
    return event["type"] if event["type"] != "ERROR" else f"ERROR {event['object']['code']}"


@pytest.mark.parametrize("case", STREAMS)
async def test_an_error_in_a_watch_has_kopf_list_again_and_never_end(case: str) -> None:
    pieces, expected = STREAMS[case]

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    assert await heard(answer) == (200, expected)


async def test_a_watch_that_is_refused_because_its_history_is_gone_has_kopf_list_again() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response({"kind": "Status", "code": 410}, status=410)

    assert await heard(answer) == (200, ["ERROR 410"])


async def test_other_refusals_stay_what_they_are() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response({"type": "Status"}, status=503)

    assert (await heard(answer))[0] == 503
