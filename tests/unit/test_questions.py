"""Questions to a replica: answered over HTTP from its cache, also by one that does not lead. Nothing is written."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from builders import make_admission, make_condition, make_node, make_offer, make_policy
from core_builders import ONE_GPU
from fake_kube import FakeKube
from fake_replica import make_replica
from taskoffer.adapters.clock import utcnow
from taskoffer.adapters.kube import NODES, OFFERS, POLICIES, ApiError, Object
from taskoffer.adapters.status_server import Answers, StatusServer
from taskoffer.api.inquiry import OfferAnswer, QueueAnswer
from taskoffer.decision.cycle import plan
from taskoffer.reconcile import questions as module
from taskoffer.reconcile.questions import Questions
from taskoffer.reconcile.replica import Replica
from taskoffer.render.offers import decision_patch

LONG_AGO = "2026-01-01T00:00:00Z"


@dataclass
class Desk:
    """A replica with a server before it, and a client of its status port."""

    kube: FakeKube = field(default_factory=FakeKube)
    leading: bool = True
    ready: str | None = None

    def __post_init__(self) -> None:
        self.kube.put(NODES, make_node(gpus=4), uid="node-uid")
        self.kube.put(POLICIES, make_policy(), uid="lab-uid")
        self.replica: Replica = make_replica(self.kube)
        self.questions = Questions(self.replica.session, lambda: self.leading)
        answers = Answers(queue=self.questions.queue, offer=self.questions.offer)
        server = StatusServer("", 0, healthy=lambda: None, ready=lambda: self.ready, answers=answers)
        self.client: TestClient[Any, Any] = TestClient(TestServer(server.application()))

    async def list(self) -> None:
        """Have the replica list everything; from then on it watches."""
        await self.replica.resync()
        self.kube.observer = self.replica.observe

    async def decide(self) -> None:
        """Write what a cycle of the leader decides."""
        made = plan(self.replica.session.world.snapshot(utcnow()))
        for decision in made.decisions:
            key = decision.offer.key
            await self.kube.patch_status(OFFERS, key.namespace, key.name, decision_patch(decision, utcnow()))

    def offer(self, name: str, **fields: Any) -> Object:
        return self.kube.put(OFFERS, make_offer(**{"name": name, "parameters": ONE_GPU, **fields}), uid=f"{name}-uid")

    async def get(self, path: str) -> tuple[int, Object]:
        """Ask; nothing may be written meanwhile."""
        version = self.kube.version
        answer = await self.client.get(path)
        assert answer.content_type == "application/json", await answer.text()
        body = await answer.json()
        assert self.kube.version == version
        assert {request.verb for request in self.kube.requests[-3:]} <= {"list", "get", "status"}
        return answer.status, body

    async def explained(self, name: str) -> OfferAnswer:
        status, body = await self.get(f"/v1/offers/default/{name}")
        assert status == 200, body
        return OfferAnswer.model_validate(body)

    async def queue(self, query: str = "") -> QueueAnswer:
        status, body = await self.get(f"/v1/queue{query}")
        assert status == 200, body
        return QueueAnswer.model_validate(body)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    async with made.client:
        yield made


async def test_before_every_kind_was_listed_there_is_no_answer(desk: Desk) -> None:
    for path in ("/v1/queue", "/v1/offers/default/x"):
        status, body = await desk.get(path)
        assert status == 503
        assert "not listed every kind yet" in body["error"]


async def test_the_queue_is_told_in_order_with_what_the_statuses_say(desk: Desk) -> None:
    for name in ("a", "b", "c"):
        desk.offer(name, gpus=4)
    await desk.list()
    await desk.decide()
    made = await desk.queue()
    assert [(one.name, one.position, one.reason) for one in made.offers] == [
        ("b", 1, "WaitingForCapacity"),
        ("c", 2, "WaitingForCapacity"),
    ]
    assert made.leading
    first = made.offers[0].start
    assert first is not None
    # What runs is predicted to take its time limit of an hour.
    assert 3500 < (first.expected - made.now).total_seconds() <= 3600


async def test_a_replica_that_does_not_lead_gives_the_same_answer_and_says_so(desk: Desk) -> None:
    for name in ("a", "b"):
        desk.offer(name, gpus=4)
    await desk.list()
    await desk.decide()
    desk.leading = False
    standby = await desk.queue()
    assert not standby.leading
    assert not (await desk.explained("b")).leading
    desk.leading = True
    leader = await desk.queue()
    assert [one.name for one in leader.offers] == [one.name for one in standby.offers] == ["b"]
    assert (await desk.explained("b")).leading


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["b", "c", "d"]),
        ("?limit=2", ["b", "c"]),
        ("?namespace=team", ["d"]),
        ("?policy=lab&namespace=default&limit=9", ["b", "c"]),
        ("?namespace=nobody", []),
    ],
)
async def test_a_part_of_the_queue_can_be_asked_for(desk: Desk, query: str, names: list[str]) -> None:
    for name in ("a", "b", "c"):
        desk.offer(name, gpus=4)
    desk.offer("d", gpus=4, namespace="team")
    await desk.list()
    assert [one.name for one in (await desk.queue(query)).offers] == names


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/queue?limit=0", 400, "limit '0' is not a whole number from 1 to 1000"),
        ("/v1/queue?limit=many", 400, "limit 'many' is not"),
        (f"/v1/queue?limit={'0' * 4400}5", 400, "limit '00000000000000000000' is not a whole number"),
        ("/v1/queue?limit=1001", 400, "limit '1001' is not"),
        ("/v1/queue?polici=lab", 400, "unknown parameter polici"),
        ("/v1/queue?limit=", 400, "limit is empty, it is to be a whole number from 1 to 1000"),
        ("/v1/queue?limit=1&limit=2", 400, "limit is given more than once: give it once"),
        ("/v1/queue?namespace=", 400, "namespace is empty: give a name"),
        ("/v1/queue?namespace", 400, "namespace is empty: give a name"),
        ("/v1/queue?policy=", 400, "policy is empty: give a name"),
        ("/v1/queue?policy=Lab", 400, "policy 'Lab' is no name: use lower-case letters"),
        ("/v1/queue?namespace=%00", 400, r"namespace '\x00' is no name"),
        ("/v1/queue?policy=nope", 404, "there is no CapacityPolicy nope"),
        ("/v1/offers/default/a%2Fb", 400, "name 'a/b' is no name"),
        ("/v1/offers/de%0Afault/a", 400, r"namespace 'de\nfault' is no name"),
        ("/v1/offers/default/%FF", 400, "name '%FF' is no name"),
        (f"/v1/offers/default/{'a' * 300}", 400, "has 300 characters, and a name has 253 at most"),
        ("/v1/offers/default", 404, "nothing is served at /v1/offers/default: there are /v1/queue, /v1/offers/"),
        ("/", 404, "nothing is served at /: there are"),
        ("/v1/offers/default/nobody", 404, "there is no TaskOffer nobody in namespace default"),
    ],
)
async def test_what_cannot_be_answered_says_why(desk: Desk, path: str, status: int, words: str) -> None:
    await desk.list()
    got, body = await desk.get(path)
    assert got == status
    assert set(body) == {"error"}
    assert words in body["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_the_port_takes_no_writes(desk: Desk, method: str) -> None:
    for path in ("/v1/queue", "/v1/offers/default/x", "/healthz", "/metrics"):
        answer = await desk.client.request(method, path)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert await answer.json() == {"error": f"{method} is not taken: nothing is written here, ask with GET"}


async def test_a_fault_of_the_replica_is_told_in_the_same_shape_and_logged(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await desk.list()
    monkeypatch.setattr(module, "queue", lambda *_, **__: 1 / 0)
    assert await desk.get("/v1/queue") == (
        500,
        {"error": "this replica failed over the question: its log says why"},
    )
    assert "ZeroDivisionError" in caplog.text


@pytest.fixture
async def address(desk: Desk) -> AsyncIterator[tuple[str, int]]:
    """A port that is listened on as a replica does it."""
    answers = Answers(queue=desk.questions.queue, offer=desk.questions.offer)
    server = StatusServer("127.0.0.1", 0, healthy=lambda: None, ready=lambda: None, answers=answers)
    await server.start()
    yield "127.0.0.1", server.port
    await server.stop()


async def raw(address: tuple[str, int], request: bytes) -> tuple[int, str, bytes]:
    """Send bytes as they are; return status, content type and body."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers["content-type"].partition(";")[0], body


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (b"garbage\r\n\r\n", "Invalid method encountered"),
        (b"GET /v1/queue HTTP/1.1\r\nno header\r\n\r\n", "Invalid header token"),
        (b"GET /v1/offers/default/" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", "more than 8190 bytes"),
    ],
)
async def test_what_is_no_http_is_told_in_the_same_shape(address: tuple[str, int], request_: bytes, words: str) -> None:
    status, kind, body = await raw(address, request_)
    assert (status, kind) == (400, "application/json")
    told = json.loads(body)
    assert set(told) == {"error"}
    assert told["error"].startswith("the request could not be read as HTTP: ")
    assert words in told["error"]
    assert len(told["error"]) < 300


async def test_probes_and_metrics_are_plain_text_and_what_is_asked_for_comes_as_json(
    desk: Desk, address: tuple[str, int]
) -> None:
    await desk.list()
    found = {
        path: await raw(address, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        for path in ("/healthz", "/metrics", "/v1/queue", "/v2")
    }
    assert found["/healthz"] == (200, "text/plain", b"ok")
    assert found["/metrics"][:2] == (200, "text/plain")
    assert found["/v1/queue"][:2] == (200, "application/json")
    assert found["/v2"][:2] == (404, "application/json")


def test_a_server_that_was_not_started_has_no_port(desk: Desk) -> None:
    answers = Answers(queue=desk.questions.queue, offer=desk.questions.offer)
    with pytest.raises(RuntimeError, match="start first"):
        _ = StatusServer("", 0, healthy=lambda: None, ready=lambda: None, answers=answers).port


async def test_a_waiting_offer_is_explained_with_its_place_and_what_would_admit_it(desk: Desk) -> None:
    desk.offer("runs", gpus=2)
    desk.offer("waits", gpus=4)
    await desk.list()
    await desk.decide()
    told = (await desk.explained("waits")).offer
    assert (told.state, told.verdict, told.reason, told.accepted) == ("Pending", "Wait", "WaitingForCapacity", True)
    assert told.stored_reason is None
    assert told.queued is not None
    assert told.queued.position == 1
    assert {c.change.split(",")[0] for c in told.counterfactuals} == {
        "with gpuCount 2",
        "with gpuCount 1",
        "after default/runs ends",
    }


async def test_an_admitted_offer_is_explained_with_its_booking_and_its_end(desk: Desk) -> None:
    desk.offer("runs", gpus=2)
    await desk.list()
    await desk.decide()
    told = (await desk.explained("runs")).offer
    assert (told.state, told.verdict, told.gpus) == ("Admitted", "Admit", 2)
    assert told.message.startswith("score 0.7350; 2 x nvidia.com/gpu on node-a")
    assert told.admission is not None
    assert told.ends is not None
    assert 3599 < (told.ends - told.admission.decided_at).total_seconds() <= 3600
    assert told.score == "0.7350"
    assert told.counterfactuals == ()


async def test_an_admission_that_is_on_its_way_counts_as_one(desk: Desk) -> None:
    desk.offer("fresh")
    await desk.list()
    world = desk.replica.session.world
    (decision,) = plan(world.snapshot(utcnow())).decisions
    world.send("fresh-uid", decision.answer.admission)
    told = (await desk.explained("fresh")).offer
    assert (told.state, told.message) == ("Admitted", "the admission is being written")
    made = await desk.queue()
    assert made.offers == ()
    assert "answers to 1 offer(s) are being written; these are not in the list" in made.notes


async def test_a_refused_offer_is_read_again_and_told_what_it_would_be_now(desk: Desk) -> None:
    desk.offer("long", hours=40)
    await desk.list()
    await desk.decide()
    told = (await desk.explained("long")).offer
    assert (told.state, told.verdict, told.stored_reason) == ("Finished", "Reject", "TimeLimitTooLong")
    assert told.stored_message is not None
    assert "144000" in told.stored_message
    assert [c.change for c in told.counterfactuals] == ["with timeLimitSeconds at most 71999"]


async def test_an_offer_that_was_too_old_would_be_admitted_if_it_were_offered_again(desk: Desk) -> None:
    desk.kube.change(POLICIES, "lab", {"spec": {"filters": {"offerTtlSeconds": 60}}}, namespace="")
    made = make_offer(name="old", parameters=ONE_GPU)
    made["metadata"]["creationTimestamp"] = LONG_AGO
    desk.kube.put(OFFERS, made, uid="old-uid")
    await desk.list()
    await desk.decide()
    told = (await desk.explained("old")).offer
    assert (told.stored_reason, told.verdict) == ("Expired", "Admit")


@pytest.mark.parametrize(("reason", "message"), [("Succeeded", "done"), ("Failed", "exit code 66")])
async def test_a_finished_offer_is_told_how_it_ended(desk: Desk, reason: str, message: str) -> None:
    conditions = [make_condition("Admitted", True, "Admitted"), make_condition("Finished", True, reason, message)]
    status = {"conditions": conditions, "admission": make_admission()}
    desk.kube.put(OFFERS, make_offer(name="done", status=status), uid="done-uid")
    await desk.list()
    told = (await desk.explained("done")).offer
    assert (told.state, told.reason, told.message) == ("Finished", reason, message)


async def test_a_finished_offer_that_cannot_be_read_is_no_answer(desk: Desk) -> None:
    conditions = [make_condition("Finished", True, "Rejected")]
    desk.kube.put(OFFERS, make_offer(name="done", status={"conditions": conditions}), uid="done-uid")
    await desk.list()
    desk.kube.fail("get", OFFERS, ApiError(403, "Forbidden", "not yours"))
    status, body = await desk.get("/v1/offers/default/done")
    assert status == 503
    assert "not yours" in body["error"]
    desk.kube.observer = None
    desk.kube.remove(OFFERS, "done")
    status, body = await desk.get("/v1/offers/default/done")
    assert (status, body["error"]) == (404, "TaskOffer default/done is gone")


async def test_an_admission_that_cannot_be_read_is_told_as_that(desk: Desk) -> None:
    status = {"admission": {"jobName": "odd"}}
    desk.kube.put(OFFERS, make_offer(name="odd", status=status), uid="odd-uid")
    await desk.list()
    got, body = await desk.get("/v1/offers/default/odd")
    assert got == 409
    assert "status.admission of default/odd cannot be read" in body["error"]


async def test_an_offer_whose_spec_cannot_be_read_is_explained_as_invalid(desk: Desk) -> None:
    made = make_offer(name="odd")
    del made["spec"]["model"]
    desk.kube.put(OFFERS, made, uid="odd-uid")
    await desk.list()
    told = (await desk.explained("odd")).offer
    assert (told.verdict, told.reason) == ("Reject", "InvalidOffer")
    assert "model" in told.message


async def test_the_event_loop_goes_on_while_the_queue_is_run_ahead(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        desk.offer(f"o{number}", gpus=2)
    await desk.list()
    threads: list[int] = []
    real = module.queue
    monkeypatch.setattr(
        module, "queue", lambda *given, **named: (threads.append(threading.get_ident()), real(*given, **named))[1]
    )
    # Offers that nobody has evaluated yet, as on a replica that does not lead, are evaluated a few at a time.
    monkeypatch.setattr(module, "_SLICE", 0.0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await desk.queue()
    counting.cancel()
    assert turns > 30
    assert threads
    assert threading.get_ident() not in threads


async def test_no_more_than_some_questions_wait_for_their_turn(desk: Desk) -> None:
    await desk.list()
    desk.questions._asked = 8
    status, body = await desk.get("/v1/queue")
    assert status == 503
    assert "ask again" in body["error"]
