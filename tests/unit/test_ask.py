"""The commands that ask a running operator: what they show, and what they say when there is no answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from core_builders import NOW, at, claim, condition, node, offer, policy, snapshot
from taskoffer.api.inquiry import OfferAnswer, QueueAnswer
from taskoffer.api.v1alpha1.meta import Assignment, PolicyRef
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.cli.main import main
from taskoffer.cli.told import explanation, table, waiting
from taskoffer.decision.explain import explain, explain_admitted, explain_finished
from taskoffer.decision.ledger import Release
from taskoffer.decision.queue import queue
from taskoffer.decision.snapshot import OfferView

HOURLY = {"gpuMemory": "80G", "duration": {"startSeconds": 60, "reserveSeconds": 0}}
ALL = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
RULES = policy(estimation=HOURLY, size_classes=[ALL])
TASK: dict[str, Any] = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "rows": 300_000}
WORLD: dict[str, Any] = {
    "policies": [RULES],
    "nodes": [node(gpus=4)],
    "claims": [claim("x", count=2)],
    "releases": [Release("x", "node-a", 2, at(5400), "lab", None, "default", "default/first")],
}
ADMISSION = Admission(
    policy_ref=PolicyRef(name="lab", uid="u", generation=1),
    job_name="runs-0123abcd",
    decided_at=NOW,
    deadline=at(7200),
    assignments=(Assignment(node_name="node-a", resource_name="nvidia.com/gpu", count=2),),
)


def answer(view: OfferView, *, leading: bool = True, **world: Any) -> OfferAnswer:
    return OfferAnswer(leading=leading, now=NOW, offer=explain(snapshot([view], **{**WORLD, **world}), view))


WAITING = """\
default/second: WAITING (accepted, WaitingForCapacity) needs 4 x nvidia.com/gpu on one node; node-a has the most free, \
2 of 4
  policy lab, size class All, 4 GPU(s), score 0.6450
  number 1 in the queue; predicted to start 13:30:00Z (in 90 min), between 13:17:27Z and 13:44:33Z

WHAT STANDS AGAINST IT
  WaitingForCapacity: needs 4 x nvidia.com/gpu on one node; node-a has the most free, 2 of 4
      admitted once 2 more are free on node-a

WHAT WOULD CHANGE THE ANSWER (each tried by deciding again)
     admitted      after default/first ends, predicted for 2026-01-31T13:30:00Z
  *  admitted now  with gpuCount 2
  *  admitted now  with gpuCount 1
  * takes a new offer: a refusal is final, and only active, expiresAt and priorityClassName ever change

SCORE
  TERM              POINTS  HOW
  TaskWeight        0.1225  0.35 x 0.35
  ModelPerformance  0.2375  0.25 x 0.95
  TaskSuccessRate   0.1800  0.20 x 0.9
  TimeEfficiency    0.0050  0.10 x 0.05
  SizeEfficiency    0.0500  0.05 x 1
  Bonus             0.0500  0.05 x 1
  sum               0.6450

ESTIMATES
  PeakMemory  20.9GiB   20.9 of 63.3 GiB on each GPU with 1 row(s) at a time (4 GPUs, DDP, layers estimated from the \
size)
  Duration    73.4 min  73.4 min of 19 h on 4 GPU(s): 300000 rows, 1 epoch(s) of 400 tokens, MFU 0.35"""


def test_a_waiting_offer_is_shown_with_verdict_place_remedies_terms_and_estimates() -> None:
    assert explanation(answer(offer("second", **TASK, gpus=4))) == WAITING


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (offer("o", **TASK, gpus=8), ["default/o: REFUSED (GpuCountNotAllowed) 8 x nvidia.com/gpu is not allowed"]),
        (offer("o", **TASK, gpus=1), ["default/o: ABOUT TO BE ADMITTED  score 0.6450; 1 x nvidia.com/gpu on node-a"]),
        (
            offer("o", **{**TASK, "hours": 40}, gpus=4),
            ["*  accepted, then WaitingForCapacity  with timeLimitSeconds at most 71999"],
        ),
        (offer("o", active=False), ["WAITING (accepted, Suspended)", "     admitted now  with active true"]),
        (offer("o", policy="nope"), ["WAITING (PolicyNotFound) CapacityPolicy nope does not exist: create it"]),
        (offer("o", **TASK, gpus=4, waits="WaitingForLane"), ["  its status still says WaitingForLane"]),
    ],
)
def test_the_first_line_is_the_verdict(view: OfferView, words: list[str]) -> None:
    shown = explanation(answer(view))
    assert shown.startswith("default/o: ")
    for text in words:
        assert text in shown


def test_an_answer_of_a_replica_that_does_not_lead_says_so() -> None:
    assert "answered by a replica that does not lead" in explanation(answer(offer(), leading=False))
    assert "does not lead" in waiting(queue(snapshot([offer(gpus=4)], **WORLD), 9, leading=False))


def test_an_admitted_offer_is_shown_with_its_place_and_its_end() -> None:
    view = offer("runs")
    told = replace_conditions(view, condition("Admitted", True, "Admitted", "score 0.7; 2 x nvidia.com/gpu on node-a"))
    for ends, said in ((5400, "predicted to end 13:30:00Z (in 90 min)"), (-600, "11:50:00Z (10 min overdue)")):
        made = explain_admitted(told, None, ADMISSION, at(ends))
        shown = explanation(OfferAnswer(leading=True, now=NOW, offer=made)).splitlines()
        assert shown[0] == "default/runs: ADMITTED  score 0.7; 2 x nvidia.com/gpu on node-a"
        assert shown[2] == "  2 on node-a; job runs-0123abcd, due 14:00:00Z"
        assert said in shown[3]


def replace_conditions(view: OfferView, *conditions: Any) -> OfferView:
    return replace(view, conditions=conditions)


def test_a_finished_offer_is_shown_with_its_end_and_a_refused_one_with_what_it_would_be_now() -> None:
    done = replace_conditions(offer("o"), condition("Finished", True, "Failed", "exit code 66"))
    shown = explanation(OfferAnswer(leading=True, now=NOW, offer=explain_finished(done, None)))
    assert shown == "default/o: FINISHED (Failed) exit code 66"
    refused = replace_conditions(offer("o"), condition("Admitted", False, "Expired", "not admitted in time"))
    again = answer(refused).offer
    shown = explanation(OfferAnswer(leading=True, now=NOW, offer=explain_finished(refused, again)))
    assert shown.splitlines()[:2] == [
        "default/o: REFUSED (Expired) not admitted in time",
        "  offered again now it would be admitted (Admitted): score 0.7350; 1 x nvidia.com/gpu on node-a, where 3 of 4 "
        "are booked now",
    ]


def test_an_offer_that_would_be_refused_for_the_same_again_is_told_so_once() -> None:
    again = answer(offer("o", **TASK, gpus=8)).offer
    refused = replace_conditions(offer("o"), condition("Admitted", False, again.reason, again.message))
    shown = explanation(OfferAnswer(leading=True, now=NOW, offer=explain_finished(refused, again)))
    assert shown.splitlines()[1] == "  offered again now it would be refused again"


def test_the_queue_is_shown_as_a_table() -> None:
    pending = [offer(f"o{i}", **TASK, gpus=4, created=at(-600 * i)) for i in range(2)]
    pending.append(offer("paused", active=False))
    assert waiting(queue(snapshot(pending, **WORLD), 9)).splitlines() == [
        "#  OFFER           POLICY  GPUS   SCORE   WAITS  REASON              START      BETWEEN",
        "1  default/o1      lab        4  0.6450  10 min  WaitingForCapacity  13:30:00Z  13:17:27Z .. 13:44:33Z",
        "2  default/o0      lab        4  0.6450     0 s  WaitingForCapacity  14:43:21Z  14:20:36Z .. 15:09:47Z",
        "-  default/paused  lab        1  0.7350     0 s  Suspended           -          -",
        "",
        "3 wait, all shown",
        "- starts assume that no further offers come; earliest and latest are remaining times off by 15 %",
    ]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"limit": 9, "namespace": "nobody"}, "none of the 2 waiting offer(s) matches"),
        ({"limit": 1}, "2 wait, 1 of 2 shown"),
        ({"limit": 1, "namespace": "team"}, "2 wait (1 match), all shown"),
    ],
)
def test_a_part_of_the_queue_says_of_how_many_it_is(query: dict[str, Any], words: str) -> None:
    pending = [offer("a", **TASK, gpus=4), offer("b", **TASK, gpus=4, namespace="team")]
    assert words in waiting(queue(snapshot(pending, **WORLD), **query))


def test_an_empty_queue_is_said_in_words() -> None:
    assert waiting(queue(snapshot([], **WORLD), 9)) == "nobody waits"


def test_a_table_of_nothing_has_no_lines() -> None:
    assert table([]) == []


# How it is asked


class Server:
    """An HTTP server that answers what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                status, body = outer.answers.get(self.path.partition("?")[0], (404, "nothing here"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_given: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


QUEUE = queue(snapshot([offer("a", **TASK, gpus=4)], **WORLD), 9)
PROXY = "/api/v1/namespaces/taskoffer-system/services/taskoffer:http/proxy"


def kubeconfig(folder: Path, server: str, namespace: str | None = "team") -> Path:
    context: dict[str, str] = {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "c", "context": context}],
    }
    path = folder / "config"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def status_of(code: int, message: str) -> tuple[int, str]:
    return code, json.dumps({"kind": "Status", "code": code, "message": message})


def test_at_an_address_the_parts_of_the_queue_are_asked_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["/v1/queue"] = (200, QUEUE.model_dump_json(by_alias=True))
    assert main(["queue", "-n", "team", "--policy", "lab", "--limit", "3", "--server", server.url + "/"]) == 0
    assert server.asked == [("/v1/queue?limit=3&policy=lab&namespace=team", None)]
    assert capsys.readouterr().out == waiting(QUEUE) + "\n"
    assert main(["queue", "-o", "json", "--server", server.url]) == 0
    assert QueueAnswer.model_validate_json(capsys.readouterr().out) == QUEUE


def test_an_offer_is_asked_for_in_the_default_namespace_or_the_given_one(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answer(offer("a", **TASK, gpus=4))
    for namespace in ("default", "team"):
        server.answers[f"/v1/offers/{namespace}/a"] = (200, made.model_dump_json(by_alias=True))
    assert main(["explain", "a", "--server", server.url]) == 0
    assert main(["explain", "a", "-n", "team", "-o", "json", "--server", server.url]) == 0
    assert [path for path, _ in server.asked] == ["/v1/offers/default/a", "/v1/offers/team/a"]
    assert capsys.readouterr().out.startswith("default/a: WAITING")


def test_without_an_address_the_api_servers_proxy_is_asked_with_the_kubeconfigs_rights_and_namespace(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = answer(offer("a", **TASK, gpus=4))
    server.answers[f"{PROXY}/v1/offers/team/a"] = (200, made.model_dump_json(by_alias=True))
    server.answers[f"{PROXY}/v1/queue"] = (200, QUEUE.model_dump_json(by_alias=True))
    config = str(kubeconfig(tmp_path, server.url))
    assert main(["explain", "a", "--kubeconfig", config]) == 0
    assert main(["queue", "--limit", "2", "--kubeconfig", config]) == 0
    assert server.asked == [
        (f"{PROXY}/v1/offers/team/a", "Bearer secret"),
        (f"{PROXY}/v1/queue?limit=2", "Bearer secret"),
    ]
    capsys.readouterr()


def test_a_context_without_a_namespace_means_default(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(kubeconfig(tmp_path, server.url, namespace=None))
    assert main(["explain", "a", "--kubeconfig", config, "--context", "c"]) == 1
    assert server.asked[0][0] == f"{PROXY}/v1/offers/default/a"
    assert "nothing here" in capsys.readouterr().err


GONE = (404, '{"error": "there is no TaskOffer a in namespace x"}')


@pytest.mark.parametrize(
    ("named", "arguments", "asked", "why"),
    [
        ("team", [], f"{PROXY}/v1/offers/team/a", " (the kubeconfig's context c names that namespace: -n changes it)"),
        (
            None,
            [],
            f"{PROXY}/v1/offers/default/a",
            " (the kubeconfig's context c names no namespace, so it is default: give -n)",
        ),
        ("team", ["-n", "mine"], f"{PROXY}/v1/offers/mine/a", ""),
        (
            "team",
            ["--server"],
            "/v1/offers/team/a",
            " (the kubeconfig's context c names that namespace: -n changes it)",
        ),
    ],
)
def test_where_the_namespace_of_an_offer_that_is_not_there_came_from_is_said(
    named: str | None,
    arguments: list[str],
    asked: str,
    why: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answers[asked] = GONE
    config = str(kubeconfig(tmp_path, server.url, namespace=named))
    where = [*arguments, server.url] if arguments == ["--server"] else arguments
    assert main(["explain", "a", "--kubeconfig", config, *where]) == 1
    assert [path for path, _ in server.asked] == [asked]
    assert capsys.readouterr().err == f"taskoffer: there is no TaskOffer a in namespace x{why}\n"


def test_with_an_address_alone_it_is_said_that_no_kubeconfig_was_read(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["/v1/offers/default/a"] = GONE
    assert main(["explain", "a", "--server", server.url]) == 1
    assert "(--server alone reads no kubeconfig, so the namespace is default: give -n)" in capsys.readouterr().err


@pytest.mark.parametrize("server_too", [False, True])
def test_a_context_that_the_kubeconfig_does_not_have_is_told_with_those_that_it_has(
    server_too: bool, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(kubeconfig(tmp_path, server.url))
    where = ["--server", server.url] if server_too else []
    assert main(["explain", "a", "--kubeconfig", config, "--context", "typo", *where]) == 1
    assert "the kubeconfig has no context typo; it has c" in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            status_of(403, "services is forbidden"),
            "forbidden; get on services/proxy of Service taskoffer in",
        ),
        (
            status_of(404, 'services "taskoffer" not found'),
            "not there: apply deploy/operator.yaml, or give --server",
        ),
        (status_of(503, "no endpoints available"), "has no replica that is ready: no endpoints available"),
        (status_of(500, "etcd is gone"), "taskoffer: etcd is gone"),
        ((404, '{"error": "there is no TaskOffer a in namespace team"}'), "taskoffer: there is no TaskOffer a in"),
        ((503, '{"error": "not listed every kind yet"}'), "taskoffer: not listed every kind yet"),
        ((502, ""), "taskoffer: HTTP status 502"),
        ((502, "[]"), "taskoffer: []"),
        ((200, "{}"), "the answer is not one that this version understands (leading: is missing)"),
        ((200, "not JSON"), "the answer is not one that this version understands"),
    ],
)
def test_what_is_no_answer_says_what_helps(
    server: Server, tmp_path: Path, status: tuple[int, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers[f"{PROXY}/v1/queue"] = status
    assert main(["queue", "--kubeconfig", str(kubeconfig(tmp_path, server.url))]) == 1
    taken = capsys.readouterr()
    assert words in taken.err
    assert taken.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kubeconfig", "/nonexistent/config"], "no usable kubeconfig"),
        (["--server", "127.0.0.1:8080"], "is not an address: write for example http://127.0.0.1:8080"),
        (["--server", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["--server", "http://[::1"], "--server http://[::1 is not an address"),
        (["--server", "http://127.0.0.1:abc"], "http://127.0.0.1:abc does not answer"),
        (["--server", "http://x y"], "http://x y does not answer"),
    ],
)
def test_where_nobody_can_be_asked_it_is_said_why(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["queue"], ["explain", "a"]):
        assert main([*command, *arguments]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "a b"], "argument NAME: 'a b' is no name: use lower-case letters, digits, '-' and '.'"),
        (["explain", "a/../b"], "argument NAME: 'a/../b' is no name"),
        (["explain", "%"], "argument NAME: '%' is no name"),
        (["explain", ""], "argument NAME: '' is empty: give a name"),
        (["explain", "a", "-n", ""], "argument --namespace/-n: '' is empty: give a name"),
        (["explain", "a", "-n", "x\ny"], r"argument --namespace/-n: 'x\ny' is no name"),
        (["explain", "a", "--operator-namespace", "a/b"], "argument --operator-namespace: 'a/b' is no name"),
        (["queue", "-n", "Team"], "argument --namespace/-n: 'Team' is no name"),
        (["queue", "--policy", ""], "argument --policy: '' is empty: give a name"),
        (["queue", "--limit", "0"], "argument --limit: 0 is not a number of offers to list: give 1 to 1000"),
    ],
)
def test_what_no_object_can_be_called_is_told_before_anybody_is_asked(
    server: Server, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--server", server.url])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert server.asked == []


def test_an_api_server_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["queue", "--kubeconfig", str(kubeconfig(tmp_path, "http://127.0.0.1:9"))]) == 1
    assert "the API server http://127.0.0.1:9 does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"x: [", b"[1]", b"\xff\xfe\x00", b"2026-99-99"])
def test_a_damaged_kubeconfig_is_told_and_ends_with_1(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config"
    config.write_bytes(content)
    for command in (["queue"], ["explain", "a"]):
        assert main([*command, "--kubeconfig", str(config)]) == 1
        assert "no usable kubeconfig" in capsys.readouterr().err


def test_ctrl_c_while_nobody_answers_ends_quietly_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("urllib.request.urlopen", interrupted)
    assert main(["queue", "--server", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == "taskoffer: interrupted\n"
