"""The fault proxy itself, on a real API server: each fault does to requests what it says, and nothing else."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fault_proxy import FaultProxy
from fault_requests import OWN_WRITES, WRITES, Match, Record, read_request
from faults import Answer, Barrier, Call, Delay, Drop, Hang, Hold, Stall, Storm, Then
from operator_bench import Bench
from operator_process import OperatorProcess
from proxied_client import BROKEN, SECONDS, Client, aside, client, proxy
from taskoffer_lab.process_table import wait_until

__all__ = ["aside", "client", "proxy"]

CREATES = Match(("create",), "configmaps")
OFFER_WRITES = Match(("patch",), "taskoffers", "status")


def last(proxy: FaultProxy) -> Record:
    """Return the newest request."""
    return proxy.requests[-1]


def test_without_a_fault_a_request_and_its_answer_pass_unchanged(client: Client) -> None:
    reply = client.create("plain")
    assert reply.status == 201
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.content["data"] == {"key": "plain"}
    found = client.send("GET", f"{client.path}/plain")
    assert found.content["metadata"]["uid"] == reply.content["metadata"]["uid"]
    patch = {"metadata": {"resourceVersion": "1"}, "data": {"key": "late"}}
    assert client.send("PATCH", f"{client.path}/plain", patch).content["reason"] == "Conflict"
    assert [(r.verb, r.name, r.status, r.committed, r.revision) for r in client.proxy.requests] == [
        ("create", "plain", 201, True, None),
        ("get", "plain", 200, False, None),
        ("patch", "plain", 409, False, "1"),
    ]


PATHS = {
    ("GET", "/api/v1/pods"): ("list", "pods", "", "", ""),
    ("GET", "/api/v1/namespaces/a/pods/b"): ("get", "pods", "", "a", "b"),
    ("GET", "/api/v1/namespaces/a/pods/b/log"): ("get", "pods", "log", "a", "b"),
    ("GET", "/api/v1/namespaces/a"): ("get", "namespaces", "", "", "a"),
    ("PUT", "/api/v1/namespaces/a/finalize"): ("update", "namespaces", "finalize", "", "a"),
    ("POST", "/apis/batch/v1/namespaces/a/jobs"): ("create", "jobs", "", "a", ""),
    ("DELETE", "/apis/batch/v1/namespaces/a/jobs"): ("deletecollection", "jobs", "", "a", ""),
    ("DELETE", "/apis/batch/v1/namespaces/a/jobs/b"): ("delete", "jobs", "", "a", "b"),
    ("PATCH", "/apis/taskoffer.dev/v1alpha1/namespaces/a/taskoffers/b/status"): (
        ("patch", "taskoffers", "status", "a", "b")
    ),
    ("GET", "/readyz"): ("get", "", "", "", ""),
    ("GET", "/apis/batch/v1"): ("get", "", "", "", ""),
}


@pytest.mark.parametrize(("request_line", "expected"), PATHS.items())
def test_what_a_request_is_about_is_read_off_its_path(request_line: tuple[str, str], expected: tuple[str, ...]) -> None:
    read = read_request(1, *request_line, {}, None)
    assert (read.verb, read.plural, read.subresource, read.namespace, read.name) == expected
    assert read.write == (expected[0] in WRITES)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(409, "AlreadyExists"), (429, "TooManyRequests"), (500, "InternalError"), (503, "ServiceUnavailable")],
)
def test_an_answer_of_the_proxy_is_a_status_and_nothing_is_stored(client: Client, status: int, reason: str) -> None:
    with client.proxy.fault(CREATES, Answer(status, retry_after=3), times=1) as fault:
        reply = client.create("refused")
    assert (reply.status, reply.headers["Retry-After"]) == (status, "3")
    assert reply.content["kind"] == "Status"
    assert (reply.content["code"], reply.content["reason"]) == (status, reason)
    assert reply.content["details"]["retryAfterSeconds"] == 3
    assert not client.stored("refused")
    record = last(client.proxy)
    assert (record.status, record.committed, record.fault) == (status, False, fault.name)


def test_a_request_that_is_dropped_before_it_is_forwarded_changes_nothing(client: Client) -> None:
    with client.proxy.fault(CREATES, Drop()), pytest.raises(ConnectionResetError) as seen:
        client.create("dropped")
    # The other kind of it is a connection that was closed in an orderly way.
    assert not isinstance(seen.value, http.client.RemoteDisconnected)
    assert not client.stored("dropped")
    assert (last(client.proxy).status, last(client.proxy).committed) == (None, False)


def test_a_reply_that_is_dropped_leaves_the_object_stored(client: Client) -> None:
    with client.proxy.fault(CREATES, Drop(after_commit=True)), pytest.raises(http.client.RemoteDisconnected):
        client.create("committed")
    assert client.stored("committed")
    assert (last(client.proxy).status, last(client.proxy).committed) == (None, True)


def test_a_write_that_is_held_is_committed_after_its_client_has_gone_away(client: Client) -> None:
    with client.proxy.fault(CREATES, Hold(4)) as fault:
        with pytest.raises(TimeoutError):
            client.create("late", seconds=0.3)
        fault.wait_struck(SECONDS)
    assert not client.stored("late")
    wait_until(lambda: last(client.proxy).committed is True, "committed", SECONDS)
    assert client.stored("late")
    assert last(client.proxy).status is None


@pytest.mark.parametrize("drop", [False, True])
def test_a_client_that_waits_for_a_held_write_gets_its_reply_unless_it_is_dropped(client: Client, drop: bool) -> None:
    with client.proxy.fault(CREATES, Hold(0.3, drop=drop)):
        if drop:
            with pytest.raises(BROKEN):
                client.create("held")
        else:
            assert client.create("held").status == 201
    assert client.stored("held")
    record = last(client.proxy)
    assert record.answered is not None
    assert record.answered - record.at >= 0.3


def test_the_list_of_one_kind_is_delayed_and_no_other(client: Client) -> None:
    with client.proxy.fault(Match(("list",), "configmaps"), Delay(0.5)) as fault:
        for kind, slow in (("configmaps", True), ("secrets", False), ("configmaps", True)):
            assert client.send("GET", client.path.replace("configmaps", kind)).status == 200
            record = last(client.proxy)
            # On a busy machine any answer may take half a second; without a fault it has none that is meant.
            assert record.fault == (fault.name if slow else None)
            assert not slow or (record.answered or 0) - record.at >= 0.5


def test_a_delayed_write_is_lost_when_its_client_goes_away(client: Client) -> None:
    with client.proxy.fault(CREATES, Delay(3)) as fault:
        with pytest.raises(TimeoutError):
            client.create("lost", seconds=0.2)
        fault.wait_struck(SECONDS)
    wait_until(lambda: time.monotonic() - last(client.proxy).at > 3.5, "the delay is over", SECONDS)
    assert not client.stored("lost")


def test_a_request_hangs_until_the_fault_is_removed(client: Client, aside: Callable[..., Future[Any]]) -> None:
    with client.proxy.fault(CREATES, Hang()) as fault:
        hanging = aside(client.create, "hangs")
        fault.reached(SECONDS)
        with pytest.raises(TimeoutError):
            client.create("hangs", seconds=0.3)
        assert not hanging.done()
    with pytest.raises(BROKEN):
        hanging.result(SECONDS)
    assert not client.stored("hangs")


def test_a_barrier_before_the_write_lets_the_test_act_first(client: Client, aside: Callable[..., Future[Any]]) -> None:
    with client.proxy.fault(CREATES, Barrier()) as fault:
        writing = aside(client.create, "raced")
        assert fault.reached(SECONDS).name == "raced"
        client.make("raced")
        assert fault.release() == 1
        assert writing.result(SECONDS).content["reason"] == "AlreadyExists"


def test_a_barrier_after_the_write_holds_back_the_reply(client: Client, aside: Callable[..., Future[Any]]) -> None:
    with client.proxy.fault(CREATES, Barrier(after_commit=True)) as fault:
        for name, then in (("goes-on", Then.GO_ON), ("dropped", Then.DROP), ("reset", Then.RESET)):
            writing = aside(client.create, name)
            assert fault.reached(SECONDS).committed is True
            assert client.stored(name)
            assert not writing.done()
            fault.release(then)
            if then is Then.GO_ON:
                assert writing.result(SECONDS).status == 201
            else:
                with pytest.raises(BROKEN):
                    writing.result(SECONDS)
    assert fault.struck == 3


def test_a_request_at_a_barrier_goes_on_when_the_fault_is_removed(
    client: Client, aside: Callable[..., Future[Any]]
) -> None:
    with client.proxy.fault(CREATES, Barrier()) as fault:
        writing = aside(client.create, "goes-on")
        fault.reached(SECONDS)
    assert writing.result(SECONDS).status == 201


def test_a_barrier_lets_a_write_be_committed_whose_client_has_gone_away(client: Client) -> None:
    with client.proxy.fault(CREATES, Barrier()) as fault:
        with pytest.raises(TimeoutError):
            client.create("late", seconds=0.2)
        fault.reached(SECONDS)
        assert not client.stored("late")
        fault.release()
        wait_until(lambda: last(client.proxy).committed is True, "committed", SECONDS)
    assert client.stored("late")


def test_a_barrier_at_which_nothing_arrives_says_so(client: Client) -> None:
    with client.proxy.fault(CREATES, Barrier()) as fault, pytest.raises(TimeoutError, match="nothing came"):
        fault.reached(0.05)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("then", [Then.GO_ON, Then.DROP])
def test_a_function_of_the_test_is_called_at_the_write_boundary(client: Client, after: bool, then: Then) -> None:
    stored = []

    def look(record: Record) -> Then:
        stored.append(client.stored(record.name))
        return then

    with client.proxy.fault(CREATES, Call(look, after_commit=after)):
        if then is Then.GO_ON:
            assert client.create("seen").status == 201
        else:
            with pytest.raises(BROKEN):
                client.create("seen")
    assert stored == [after]
    assert client.stored("seen") == (after or then is Then.GO_ON)


def test_a_fault_lets_the_first_ones_pass_and_strikes_so_often(client: Client) -> None:
    fault = client.proxy.fault(CREATES, Answer(503), skip=1, times=2)
    assert [client.create(f"n{n}").status for n in range(5)] == [201, 503, 503, 201, 201]
    assert (fault.matched, fault.struck) == (5, 2)
    fault.remove()
    assert client.create("n5").status == 201
    assert fault.matched == 5


MATCHES: dict[str, tuple[Match, list[str]]] = {
    "name": (Match(("create",), name="a.*"), ["aa", "ab"]),
    "body": (Match(body=lambda o: o["data"]["key"] == "bb"), ["bb"]),
    "no subresource": (Match(WRITES, subresource=""), ["aa", "ab", "bb"]),
    "another subresource": (Match(WRITES, subresource="status"), []),
    "another kind": (Match(WRITES, "pods"), []),
    "one of several kinds": (Match(WRITES, "pods|configmaps"), ["aa", "ab", "bb"]),
    "all but some kinds": (Match(WRITES, "(?!configmaps).*"), []),
    "all but leases and events": (OWN_WRITES, ["aa", "ab", "bb"]),
    "another namespace": (Match(WRITES, namespace="other"), []),
    "only watches": (Match(watch=True), []),
}


@pytest.mark.parametrize("case", MATCHES)
def test_a_fault_strikes_only_what_matches(client: Client, case: str) -> None:
    on, struck = MATCHES[case]
    with client.proxy.fault(on, Answer(503)):
        answered = {name: client.create(name).status for name in ("aa", "ab", "bb")}
    assert [name for name, status in answered.items() if status == 503] == struck


def test_what_has_passed_cannot_be_found_by_its_body(client: Client) -> None:
    with pytest.raises(ValueError, match="not kept"):
        client.proxy.seen(Match(body=lambda _body: True))


def test_a_storm_strikes_the_same_requests_again_with_the_same_seed(client: Client) -> None:
    rates = {Answer(503): 0.3, Drop(after_commit=True): 0.2}

    def run(seed: int, prefix: str) -> list[tuple[int | None, bool | None]]:
        with client.proxy.place(Storm(random.Random(seed), rates, CREATES)) as storm:
            for number in range(20):
                try:
                    client.create(f"{prefix}-{number}")
                except BROKEN:
                    assert last(client.proxy).status is None
        assert {record.fault for record in client.proxy.seen(CREATES)} == {
            *(None, "storm: Answer(status=503)", "storm: Drop(after_commit=True)"),
        }
        seen = [(r.status, r.committed) for r in client.proxy.seen(Match(("create",), name=f"{prefix}-.*"))]
        assert storm.counts[str(Answer(503))] == seen.count((503, False))
        assert storm.struck == 20 - seen.count((201, True))
        return seen

    first = run(1, "first")
    assert run(1, "again") == first
    assert run(2, "other") != first
    assert len(set(first)) == 3


def test_a_storm_of_more_than_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1"):
        Storm(random.Random(0), {Drop(): 0.6, Hold(1): 0.6})
    for action in (Barrier(), Stall()):
        with pytest.raises(ValueError, match="place it as a fault"):
            Storm(random.Random(0), {action: 0.1})


def test_what_goes_wrong_in_a_function_of_the_test_is_raised_at_the_end(client: Client) -> None:
    def broken(_record: Record) -> Then:
        raise ZeroDivisionError("in the test")

    proxy = FaultProxy(client.direct.config, as_user=True).__enter__()
    own = Client(proxy, client.direct, client.namespace)
    with proxy.fault(CREATES, Call(broken)), pytest.raises(BROKEN):
        own.create("unseen")
    with pytest.raises(ExceptionGroup, match="in faults of the test") as caught:
        proxy.__exit__(None, None, None)
    assert caught.group_contains(ZeroDivisionError, match="in the test")
    assert not client.stored("unseen")


def test_the_proxy_ends_although_requests_stand_and_watches_are_open(
    client: Client, aside: Callable[..., Future[Any]]
) -> None:
    before = set(threading.enumerate())
    stand = [(Hang(), "hangs"), (Barrier(), "stands"), (Hold(60), "held"), (Delay(60), "delayed")]
    with ExitStack() as ends:
        proxy = ends.enter_context(FaultProxy(client.direct.config, as_user=True))
        own = Client(proxy, client.direct, client.namespace)
        faults = [proxy.fault(Match(("create",), name=name), action) for action, name in stand]
        waiting = [aside(own.create, name) for _, name in stand]
        for fault in faults:
            fault.wait_struck(SECONDS)
        with own.watch() as open_watch:
            started = time.monotonic()
            ends.close()
            assert time.monotonic() - started < 30  # Of the minute that two of them would stand.
            assert open_watch.next() is None
        for one in waiting:
            with pytest.raises(BROKEN):
                one.result(SECONDS)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "fault-proxy"]
    assert not any(client.stored(name) for _, name in stand)


def test_an_operator_behind_the_proxy_takes_an_offer_to_its_end_although_a_reply_is_lost(
    bench: Bench, operator_directory: Path
) -> None:
    bench.node()
    with FaultProxy(bench.cluster.client_config) as proxy:
        with OperatorProcess(bench.cluster, operator_directory, through=proxy) as operator:
            bench.policy()
            with proxy.fault(OFFER_WRITES, Drop(after_commit=True), times=1) as lost:
                bench.run_through("one")
            assert operator.terminate() == 0
        assert lost.struck == 1
        assert "Traceback" not in operator.log()
    writes = proxy.seen(OFFER_WRITES)
    assert (writes[0].name, writes[0].committed, writes[0].status) == ("one", True, None)
    assert all(record.revision for record in writes)
    # What the proxy calls committed is what the server has stored, as the auditor saw it past the proxy.
    assert sum(record.committed is True for record in writes) == len(bench.status_writes("one"))
    created = {record.plural for record in proxy.seen(Match(("create",))) if record.committed}
    assert {"trainingjobs", "jobs"} <= created
    watched = {record.plural for record in proxy.seen(Match(watch=True))}
    assert watched == {"taskoffers", "trainingjobs", "capacitypolicies", "jobs", "pods", "nodes"}


@pytest.mark.parametrize("after", [False, True])
def test_an_operator_is_killed_at_a_write_boundary(bench: Bench, operator_directory: Path, after: bool) -> None:
    bench.node()
    with FaultProxy(bench.cluster.client_config) as proxy:
        operator = OperatorProcess(bench.cluster, operator_directory, through=proxy)

        def kill(_record: Record) -> Then:
            operator.kill(forget_lease=True)
            return Then.DROP

        with operator:
            bench.policy()
            with bench.audit.excused():
                with proxy.fault(OFFER_WRITES, Call(kill, after_commit=after), times=1) as boundary:
                    bench.offer("one")
                    boundary.wait_struck(SECONDS)
                    wait_until(lambda: not operator.running, "killed", SECONDS)
                assert ("admission" in bench.get("one").get("status", {})) == after
                operator.start()
            bench.run("one")
            assert operator.terminate() == 0
    verdicts = [record for record in proxy.seen(OFFER_WRITES) if record.committed]
    assert len(verdicts) == 1
