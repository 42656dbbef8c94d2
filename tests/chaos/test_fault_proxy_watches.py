"""What the fault proxy does to watches, on a real API server."""

from __future__ import annotations

import queue

import pytest

from fault_proxy import FaultProxy
from fault_requests import Match
from faults import GONE, GONE_IN_STREAM, Barrier, Drop, Stall, Swallow
from proxied_client import BROKEN, SECONDS, Client, aside, client, proxy
from taskoffer_lab.process_table import wait_until

__all__ = ["aside", "client", "proxy"]

WATCHES = Match(("watch",), "configmaps")


def secrets(client: Client) -> str:
    """Return the path of another kind."""
    return client.path.replace("configmaps", "secrets")


def no_watch_is_open(proxy: FaultProxy) -> None:
    """Wait until the proxy has closed all watches."""
    wait_until(lambda: not proxy.watches, "no watch is open", SECONDS)


def test_events_pass_one_by_one_as_they_happen(client: Client) -> None:
    with client.watch() as watch:
        for number in range(3):
            client.make(f"n{number}")
            # Nothing comes after it yet that could push it through.
            assert watch.next() == ("ADDED", f"n{number}")
        client.remove("n1")
        assert watch.next() == ("DELETED", "n1")
        assert [(r.plural, r.status, r.write) for r in client.proxy.watches] == [("configmaps", 200, False)]
    no_watch_is_open(client.proxy)


def test_an_event_larger_than_any_buffer_passes_whole(client: Client) -> None:
    content = {"metadata": {"name": "large"}, "data": {"key": "x" * 900_000}}
    with client.watch() as watch:
        client.direct.request("POST", client.path, content)
        assert watch.next() == ("ADDED", "large")


def test_the_watches_of_one_kind_are_cut_and_can_be_opened_again(client: Client) -> None:
    with client.watch() as cut, client.watch(secrets(client)) as kept:
        assert client.proxy.cut_watches("configmaps") == 1
        assert cut.next() is None
        with client.watch() as again:
            client.make("new")
            client.make("new", secrets(client))
            assert again.next() == ("ADDED", "new")
            assert kept.next() == ("ADDED", "new")
            assert client.proxy.cut_watches() == 2
            assert again.next() is None
            assert kept.next() is None
    assert client.proxy.cut_watches() == 0


def test_a_stalled_watch_is_open_and_silent_and_what_happens_meanwhile_is_lost_to_it(client: Client) -> None:
    with client.watch() as old, client.watch(secrets(client)) as other:
        with client.proxy.fault(WATCHES, Stall()) as stall:
            with client.watch() as new:
                assert new.status == 200
                client.make("lost")
                client.make("seen", secrets(client))
                assert other.next() == ("ADDED", "seen")
                assert new.silent(0.5)
                assert old.silent(0.1)
            assert stall.struck == 2
        client.make("after")
        assert old.next() == ("ADDED", "after")


def test_a_stalled_watch_is_not_even_seen_to_end(client: Client) -> None:
    # The server ends it after a second.
    with client.watch(query="timeoutSeconds=1") as ends:
        assert ends.next(SECONDS) is None
    with client.proxy.fault(WATCHES, Stall()):
        with client.watch(query="timeoutSeconds=1") as stalled:
            assert stalled.silent(2.5)
            stalled_is_open = bool(client.proxy.watches)
        assert stalled_is_open
        no_watch_is_open(client.proxy)


def test_history_that_is_gone_is_said_with_a_status_or_within_the_stream(client: Client) -> None:
    with client.proxy.fault(WATCHES, GONE), client.watch() as refused:
        assert refused.status == 410
    with client.proxy.fault(WATCHES, GONE_IN_STREAM), client.watch() as told:
        assert told.status == 200
        assert told.next() == ("ERROR", "410")
        assert told.next() is None
    with client.watch() as opened:
        assert client.proxy.cut_watches("configmaps", gone=True) == 1
        assert opened.next() == ("ERROR", "410")
        assert opened.next() is None


def test_single_events_are_swallowed(client: Client) -> None:
    swallow = Swallow(lambda kind, obj: kind == "DELETED" and obj["metadata"]["name"] == "ghost")
    with client.watch() as old, client.proxy.fault(WATCHES, swallow) as fault, client.watch() as new:
        for name in ("ghost", "other"):
            client.make(name)
            client.remove(name)
        for watch in (old, new):
            seen = [watch.next() for _ in range(3)]
            assert seen == [("ADDED", "ghost"), ("ADDED", "other"), ("DELETED", "other")]
        assert fault.struck == 2


def test_events_are_swallowed_as_often_as_asked_for(client: Client) -> None:
    with client.proxy.fault(WATCHES, Swallow(lambda _kind, _obj: True), skip=1, times=2), client.watch() as watch:
        for number in range(5):
            client.make(f"n{number}")
        assert [watch.next() for _ in range(3)] == [("ADDED", f"n{number}") for number in (0, 3, 4)]


def test_a_watch_can_be_kept_from_being_opened(client: Client) -> None:
    with client.proxy.fault(WATCHES, Drop()), pytest.raises(BROKEN), client.watch():
        pass
    assert client.proxy.requests[-1].status is None


def test_faults_that_need_a_commit_leave_watches_alone(client: Client) -> None:
    everything = Match()
    with (
        client.proxy.fault(everything, Barrier(after_commit=True)) as barrier,
        client.proxy.fault(everything, Drop(after_commit=True)) as drop,
        client.watch() as watch,
    ):
        client.make("seen")
        assert watch.next() == ("ADDED", "seen")
        with pytest.raises(queue.Empty):
            watch.next(0.1)
    assert (barrier.matched, drop.matched) == (0, 0)
