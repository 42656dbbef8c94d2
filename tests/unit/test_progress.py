"""Reports of trainers, older and newer ones, as the operator reads them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from taskoffer.adapters import progress
from taskoffer.api.contract import ExitCode, ProgressReport
from taskoffer.decision.trainer_words import parse_termination
from taskoffer.reconcile import replica

RUNNING: dict[str, Any] = {
    "state": "Training",
    "step": 3,
    "totalSteps": 9,
    "jobName": "job",
    "lastUpdatedTime": "2026-01-01T00:00:00Z",
}
CLAMP = {"field": "lora.r", "requested": "9", "effective": "8", "reason": "RankClamped", "message": "no room"}


def changed(fields: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**fields, **changes})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Awaitable[ProgressReport | None]]:
    """Ask a trainer that answers with a text."""

    async def ask(text: str) -> ProgressReport | None:
        async def answer(_request: web.Request) -> web.Response:
            return web.Response(text=text)

        app = web.Application()
        app.router.add_get("/progress", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            monkeypatch.setattr(progress, "PROGRESS_PORT", server.port)
            return await progress.fetch_report(session, "127.0.0.1")

    return ask


async def test_a_report_of_a_newer_trainer_is_read_without_what_is_new(asked: Any) -> None:
    report = await asked(changed(RUNNING, mood="good", clamps=[{**CLAMP, "since": 7}]))
    assert report is not None
    assert (report.step, report.clamps[0].effective) == (3, "8")


@pytest.mark.parametrize(
    "text", ["no JSON", changed(RUNNING, step="some"), " " * progress.MAX_REPORT_BYTES + changed(RUNNING)]
)
async def test_an_answer_that_is_no_report_is_an_error(asked: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r"ProgressReport|more than 262144 bytes"):
        await asked(text)


async def test_a_trainer_that_does_not_answer_has_nothing_to_say() -> None:
    async with aiohttp.ClientSession() as session:
        assert await progress.fetch_report(session, "127.0.0.1", seconds=0.5) is None


async def test_a_report_that_is_not_understood_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fetch(_session: object, _ip: str) -> None:
        raise ValueError("step: not a number")

    monkeypatch.setattr(replica, "fetch_report", fetch)
    taken: Any = SimpleNamespace(_unreadable=set())
    pod: Any = SimpleNamespace(uid="u", ip="10.0.0.1", namespace="ns", training_job="job")
    for _ in range(3):
        await replica.Replica._ask(taken, object(), pod)  # type: ignore[arg-type]
    (told,) = caplog.records
    assert (told.job, told.error) == ("ns/job", "step: not a number")  # type: ignore[attr-defined]


def test_last_words_of_a_newer_trainer_are_read_without_what_is_new() -> None:
    said = {"exitCode": 0, "reason": "Completed", "message": "m", "adapterSha256": "a" * 64, "mood": "good"}
    found = parse_termination(json.dumps({**said, "clamps": [{**CLAMP, "since": 7}]}))
    assert found is not None
    assert (found.exit_code, found.adapter_sha256, found.clamps[0].field) == (ExitCode.DONE, "a" * 64, "lora.r")
