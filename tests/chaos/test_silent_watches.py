"""A watch that goes silent: found, and its process replaced; a quiet cluster is not mistaken for one."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from campaign import Campaign
from fault_proxy import FaultProxy
from fault_requests import Match
from faults import Fault, Stall
from operator_bench import GROUP, SECONDS, Bench
from operator_process import OperatorProcess, until_its_end
from taskoffer_lab.process_table import wait_until

WINDOW = 10
KINDS = {"Node", "Pod", "Job", "TrainingJob", "CapacityPolicy", "TaskOffer"}
PLURALS = {
    "Node": "nodes",
    "Pod": "pods",
    "Job": "jobs",
    "TrainingJob": "trainingjobs",
    "CapacityPolicy": "capacitypolicies",
    "TaskOffer": "taskoffers",
}
LIMIT = 2.25 * WINDOW
"""Seconds of silence that are borne."""
SHORT = 1.0 * WINDOW


@pytest.fixture
def replica(bench: Bench, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A replica with a short window that is not started yet."""
    yield from until_its_end(OperatorProcess(bench.cluster, operator_directory, "--watch-window", str(WINDOW)))


def test_neither_leader_nor_standby_takes_a_quiet_cluster_for_a_silent_watch(
    bench: Bench, replica: OperatorProcess, operator_directory: Path
) -> None:
    with bench.audit.excused():
        replica.start()
    standby = OperatorProcess(bench.cluster, operator_directory, "--watch-window", str(WINDOW))
    standby.start(leading=False)
    try:
        since = time.time()
        # Several times as long as a silent watch would be borne.
        for each in (replica, standby):
            for kind in KINDS:
                wait_until(
                    lambda each=each, kind=kind: (  # type: ignore[misc]
                        (each.metric("taskoffer_watch_heard_timestamp_seconds", kind=kind) or 0) > since + 3 * WINDOW
                    ),
                    f"a word on the watch of {kind}",
                    60,
                )
        assert replica.running
        assert standby.running
        assert standby.metric("taskoffer_leader") == 0
    finally:
        if standby.running:
            standby.kill()
    assert "silent" not in replica.log() + standby.log()


class Watched:
    """A replica behind a proxy of its own.

    Args:
        bench: Whose cluster it works on.
        directory: For its log.
        stack: Ends both.
    """

    def __init__(self, bench: Bench, directory: Path, stack: ExitStack) -> None:
        self.proxy = stack.enter_context(FaultProxy(bench.cluster.client_config))
        self.replica = OperatorProcess(bench.cluster, directory, "--watch-window", str(WINDOW), through=self.proxy)
        stack.callback(lambda: self.replica.running and self.replica.kill())
        self.unwell: str | None = None

    def stall(self, kind: str) -> Fault:
        """Let the watch of a kind be silent from now on."""
        return self.proxy.fault(Match(("watch",), PLURALS[kind]), Stall(), name=f"{kind} stalled")

    def look(self) -> bool:
        """Ask the replica how it is, and remember when it was not well; tell whether it still runs."""
        connection = http.client.HTTPConnection("127.0.0.1", self.replica.port, timeout=2)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            said = answer.read().decode()
            if answer.status == 503:
                self.unwell = said
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        return self.replica.running

    def stands_by(self) -> bool:
        """Tell whether it runs and does not lead."""
        return self.replica.metric("taskoffer_leader") == 0

    def leaves(self, kind: str) -> None:
        """Wait until it has left by itself because the watch of a kind was silent, and has said so before."""
        what = f"the end of a replica that hears nothing of {kind}"
        wait_until(lambda: not self.look(), what, LIMIT + 20, interval=0.02)
        assert self.replica.wait_ended(10) == 1
        assert f"watch silent, leaving: the watch of {kind} has been silent" in self.replica.log()
        assert self.unwell is not None, "the kubelet was never told"
        assert f"the watch of {kind} has been silent" in self.unwell


@contextmanager
def two_replicas(bench: Bench, directory: Path) -> Iterator[tuple[Watched, Watched]]:
    """Run a leader and a standby with a warm cache."""
    with ExitStack() as stack:
        leader, standby = Watched(bench, directory, stack), Watched(bench, directory, stack)
        with bench.audit.excused():
            leader.replica.start()
        standby.replica.start(leading=False)
        wait_until(standby.stands_by, "a standby", SECONDS)
        try:
            yield leader, standby
        finally:
            for each in (leader, standby):
                print(each.replica.log()[-6000:])  # noqa: T201
        for each in (leader, standby):
            if each.replica.running:
                assert each.replica.terminate() == 0
            assert "Traceback" not in each.replica.log()


def test_a_leader_that_hears_nothing_of_a_kind_is_replaced_and_the_work_goes_on(
    bench: Bench, operator_directory: Path, campaign: Campaign
) -> None:
    for kind, other in drawn(campaign):
        with two_replicas(bench, operator_directory) as (leader, standby), bench.audit.excused():
            bench.node()
            bench.policy()
            bench.admitted("before")
            with leader.stall(kind), standby.stall(other) as short:
                after_a_while(short)
                leader.leaves(kind)
            # A standby that heard nothing for a while, and then did again, takes over.
            standby.replica.wait_leading()
            bench.admitted("after")
            bench.run_through("through")
            leader.replica.start(leading=False)
            wait_until(leader.stands_by, "a new standby", SECONDS)
            assert standby.replica.running
            assert "silent" not in standby.replica.log()
            campaign.counts[f"leader without {kind}"] += 1
            campaign.counts[f"standby without {other} for {SHORT:.0f} s"] += 1
        start_over(bench)


def test_a_standby_that_hears_nothing_of_a_kind_is_replaced_and_the_leader_is_not(
    bench: Bench, operator_directory: Path, campaign: Campaign
) -> None:
    for kind, other in drawn(campaign):
        with two_replicas(bench, operator_directory) as (leader, standby):
            bench.node()
            bench.policy()
            with standby.stall(kind), leader.stall(other) as short:
                bench.offer("meanwhile")
                after_a_while(short)
                standby.leaves(kind)
            bench.decided("meanwhile", "Admitted")
            bench.run_through("through")
            assert leader.replica.leads
            assert "silent" not in leader.replica.log()
            standby.replica.start(leading=False)
            wait_until(
                lambda standby=standby: standby.replica.metric("taskoffer_leader") == 0, "a new standby", SECONDS
            )  # type: ignore[misc]
            campaign.counts[f"standby without {kind}"] += 1
            campaign.counts[f"leader without {other} for {SHORT:.0f} s"] += 1
        start_over(bench)


def after_a_while(silence: Fault) -> None:
    """End a silence that is too short to be held against anybody."""
    end = time.monotonic() + SHORT
    wait_until(lambda: time.monotonic() > end, "the end of a short silence", SHORT + 5)
    silence.remove()


def drawn(campaign: Campaign) -> list[tuple[str, str]]:
    """Return which kinds are silent for good and for a while, in each round."""
    kinds = sorted(KINDS)
    campaign.random.shuffle(kinds)
    return list(zip(kinds, [*kinds[1:], kinds[0]], strict=True))[: campaign.size(1, len(kinds))]


def start_over(bench: Bench) -> None:
    """Remove what a round has left, for the next one."""
    bench.api.request("DELETE", bench.path("taskoffers"))
    bench.api.request("DELETE", f"{GROUP}/capacitypolicies/{bench.policy_name}")
    bench.gone(f"{GROUP}/capacitypolicies/{bench.policy_name}")
    for name in list(bench.nodes):
        bench.kubelet.remove_node(name)
    bench.nodes.clear()
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
    bench.api.request("DELETE", bench.path("pods", api="/api/v1"), options)
