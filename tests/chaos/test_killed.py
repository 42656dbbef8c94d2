"""SIGKILL, before and after each single write and at random moments: nothing is lost and nothing is booked twice."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from campaign import Campaign
from fake_node import Object, Script
from fault_proxy import FaultProxy
from fault_requests import OWN_WRITES, Match, Record
from faults import Call, Then
from offer_trails import Trails
from operator_bench import Bench, condition
from operator_process import OperatorProcess, until_its_end
from taskoffer_lab.process_table import wait_until

RESTART_SECONDS = 60.0
ANSWERS = Match(("patch",), "taskoffers", "status")
OFFERS_OF_A_ROUND = ("rejected", "runs", "waits")


@pytest.fixture
def proxy(bench: Bench) -> Iterator[FaultProxy]:
    """What stands between the operator and the API server."""
    with FaultProxy(bench.cluster.client_config) as made:
        yield made


@pytest.fixture
def replica(bench: Bench, proxy: FaultProxy, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A leading replica behind the proxy that is killed now and then; it must end well nevertheless."""
    made = OperatorProcess(bench.cluster, operator_directory, through=proxy)
    with bench.audit.excused():
        made.start()
    yield from until_its_end(made)


# Every boundary


@dataclass(frozen=True)
class Boundary:
    """A moment right before or right after one write, found again in a round by what the write is about."""

    verb: str
    plural: str
    subresource: str
    name: str
    nth: int
    committed: bool

    def match(self, round_: str) -> Match:
        """Return what describes the writes of this kind in a round."""
        return Match((self.verb,), self.plural, self.subresource, name=self.name.replace("ROUND", round_))

    def __str__(self) -> str:
        when = "after" if self.committed else "before"
        kind = "/".join(part for part in (self.plural, self.subresource) if part)
        return f"{when} {self.verb} {kind} {self.name}, time {self.nth + 1}"


class Killer:
    """Kills a replica in the midst of a request and starts it again at once."""

    def __init__(self, bench: Bench, replica: OperatorProcess) -> None:
        self._bench, self._replica = bench, replica
        self._leads_again = threading.Event()

    def __call__(self, _record: Record) -> Then:
        since = time.monotonic()
        self._replica.kill(forget_lease=True)
        self._replica.start()
        self._bench.audit.excuse(since, time.monotonic())
        self._leads_again.set()
        return Then.DROP

    def wait(self) -> None:
        """Wait until it leads again."""
        assert self._leads_again.wait(RESTART_SECONDS), self._replica.log()[-4000:]


def play(bench: Bench, round_: str) -> None:
    """Take three offers to their ends: refused, run through at the second attempt, and cancelled after a wait."""
    rejected, runs, waits = (f"{round_}-{name}" for name in OFFERS_OF_A_ROUND)
    bench.offer(rejected, hours=40)
    bench.finished(rejected, "Rejected")
    bench.admitted(runs, 2)
    bench.end(bench.run(runs), 1)
    pod = bench.run(runs, attempt=2)
    bench.offer(waits, 4)
    bench.decided(waits, "WaitingForCapacity")
    bench.end(pod)
    bench.finished(runs, "Succeeded")
    bench.decided(waits, "Admitted")
    pod = bench.run(waits)
    bench.patch(waits, {"active": False})
    bench.asked_to_stop(pod)
    bench.end(pod, 143)
    bench.finished(waits, "Cancelled")
    bench.booked(bench.nodes[0], 0)


OFFERS_OF_A_PREEMPTION = ("makesroom", "urgent")
PREEMPTION: dict[str, Any] = {
    "queue": {"priorities": ["low", "high"]},
    "preemption": {"rules": [{"by": ["high"], "of": ["low"]}], "minRunSeconds": 0, "resumeSeconds": 1},
    "estimation": {"gpuMemory": "80G", "duration": {"startSeconds": 1, "reserveSeconds": 0}},
}


def play_preemption(bench: Bench, round_: str) -> None:
    """Have a running job stop for another offer, and go on after it."""
    makes_room, urgent = (f"{round_}-{name}" for name in OFFERS_OF_A_PREEMPTION)
    bench.admitted(makes_room, 4, seconds=36_000, rows=1000, priority_class="low")
    pod = bench.run(makes_room)
    bench.offer(urgent, 4, seconds=3600, rows=100, priority_class="high")
    bench.decided(urgent, "WaitingForPreemption")
    bench.asked_to_stop(pod)
    bench.end(pod, 143)
    bench.decided(urgent, "Admitted")
    bench.end(bench.run(urgent))
    bench.finished(urgent, "Succeeded")
    bench.end(bench.run(makes_room, 2))
    bench.finished(makes_room, "Succeeded")
    bench.booked(bench.nodes[0], 0)


def boundaries(records: list[Record], round_: str) -> list[Boundary]:
    """Return the moments before and after each write of a round."""
    found: list[Boundary] = []
    numbers: dict[tuple[str, str, str, str], int] = {}
    for record in records:
        if not record.committed:
            continue
        # Behind an offer's name comes a piece of its UID.
        name = re.sub(r"-[0-9a-f]{8}(?=-|$)", "-[0-9a-f]{8}", record.name).replace(round_, "ROUND")
        kind = record.verb, record.plural, record.subresource, name
        nth = numbers[kind] = numbers.get(kind, -1) + 1
        found += [Boundary(*kind, nth, committed) for committed in (False, True)]
    return found


def end_state(bench: Bench, name: str) -> tuple[Any, ...]:
    """Return what has become of an offer: its answers, the outcomes of its attempts, and its Jobs."""
    offer = bench.get(name)
    admission = offer["status"].get("admission")
    outcomes: list[str] = []
    if admission is not None:
        job = bench.api.request("GET", bench.path("trainingjobs", admission["jobName"]))
        outcomes = [attempt["outcome"] for attempt in job["status"]["attempts"]]
    batch = [job["metadata"]["labels"]["taskoffer.dev/attempt"] for job in bench.batch_jobs(offer)]
    return condition(offer, "Admitted").get("reason"), condition(offer, "Finished")["reason"], outcomes, batch


@pytest.mark.parametrize(
    ("played", "offers", "jobs", "policy", "sample"),
    [
        (play, OFFERS_OF_A_ROUND, [0, 2, 1], {}, 6),
        (play_preemption, OFFERS_OF_A_PREEMPTION, [1, 1], PREEMPTION, 4),
    ],
    ids=["plain", "preemption"],
)
def test_a_replica_killed_at_any_write_leaves_the_same_end(
    bench: Bench,
    replica: OperatorProcess,
    proxy: FaultProxy,
    campaign: Campaign,
    played: Callable[[Bench, str], None],
    offers: tuple[str, ...],
    jobs: list[int],
    policy: dict[str, Any],
    sample: int,
) -> None:
    bench.node(gpus=4)
    bench.policy(**policy)
    before = len(proxy.requests)
    played(bench, "r0")
    there = boundaries([r for r in proxy.requests[before:] if OWN_WRITES.fits(r, None)], "r0")
    wanted = {name: end_state(bench, f"r0-{name}") for name in offers}
    assert [len(wanted[name][3]) for name in offers] == jobs
    campaign.counts["boundaries"] = len(there)
    chosen = campaign.random.sample(there, campaign.size(sample, len(there)))
    for number, boundary in enumerate(chosen, 1):
        round_ = f"r{number}"
        killer = Killer(bench, replica)
        call = Call(killer, after_commit=boundary.committed)
        try:
            with proxy.fault(boundary.match(round_), call, skip=boundary.nth, times=1) as kill:
                played(bench, round_)
            if kill.struck:
                killer.wait()
            for name in offers:
                assert end_state(bench, f"{round_}-{name}") == wanted[name], name
        except Exception as error:
            error.add_note(f"killed {boundary}")
            raise
        # How often a policy's status is written is a matter of time; everything else has to come.
        assert kill.struck or boundary.plural == "capacitypolicies", f"no kill {boundary}"
        campaign.counts["kills" if kill.struck else "not reached"] += 1
    trails = Trails(bench)
    for name in offers:
        for number in range(len(chosen) + 1):
            trail = trails.of(f"r{number}-{name}")
            assert trail == trails.of(f"r0-{name}"), f"{name}, killed {chosen[number - 1]}"
    assert trails.repeated == 0


# Random moments


def test_kills_at_random_moments_lose_nothing_and_book_nothing_twice(
    bench: Bench, replica: OperatorProcess, proxy: FaultProxy, campaign: Campaign
) -> None:
    offers, kills = campaign.size(60, 500), campaign.size(6, 200)
    script = Script(run_seconds=0.1, exit_code=fails_first)
    for name in ("a", "b", "c"):
        bench.kubelet.automate(bench.node(name), script)
    bench.policy()
    for round_ in range(kills):
        for number in range(offers * round_ // kills, offers * (round_ + 1) // kills):
            create(bench, number)
        wait_for_events(bench, campaign.random.randint(1, 60))
        kill_and_restart(bench, replica, campaign)
    ends = {number: condition(finished(bench, number), "Finished")["reason"] for number in range(offers)}
    assert ends == {number: "Rejected" if is_too_long(number) else "Succeeded" for number in range(offers)}
    # Nothing was run twice: an attempt more only where a pod had failed.
    for number in range(offers):
        jobs = bench.batch_jobs(bench.get(f"offer-{number}"))
        assert len(jobs) == (0 if is_too_long(number) else 2 if number % 10 == 7 else 1), number
    for node in bench.nodes:
        bench.booked(node, 0)
    trails = Trails(bench)
    for number in range(offers):
        name = f"offer-{number}"
        assert (trails.admissions(name), trails.ends(name)) == (not is_too_long(number), 1), trails.of(name)
    campaign.counts["offers decided"] = offers
    campaign.counts["status writes"] = trails.writes
    campaign.counts["status writes that said nothing new"] = trails.repeated
    campaign.counts["status writes sent again"] = sum(not record.committed for record in proxy.seen(ANSWERS))
    assert trails.repeated == 0


def kill_and_restart(bench: Bench, replica: OperatorProcess, campaign: Campaign) -> None:
    """Kill a replica now and start it again, sometimes killing it once more while it starts."""
    with bench.audit.excused():
        replica.kill(forget_lease=True)
        campaign.counts["kills"] += 1
        if campaign.random.random() < 0.3:
            # Somewhere between its first line and its first decision.
            replica.start(leading=False)
            wait_for_events(bench, campaign.random.randint(1, 20))
            replica.kill(forget_lease=True)
            campaign.counts["kills while starting"] += 1
        replica.start()


def is_too_long(number: int) -> bool:
    """Tell which offers are to be refused."""
    return number % 5 == 3


def fails_first(pod: Object) -> int:
    """Let the first attempt of some offers fail."""
    labels = pod["metadata"]["labels"]
    number = int(labels["taskoffer.dev/job"].split("-")[1])
    return int(number % 10 == 7 and labels["taskoffer.dev/attempt"] == "1")


def create(bench: Bench, number: int) -> None:
    """Create one of many offers."""
    bench.offer(f"offer-{number}", (1, 2, 4)[number % 3], hours=40 if is_too_long(number) else 1)


def finished(bench: Bench, number: int) -> Object:
    """Wait until one of many offers has ended."""
    return bench.until(f"offer-{number}", lambda o: condition(o, "Finished") != {}, "finished", 120)


def wait_for_events(bench: Bench, count: int) -> None:
    """Wait until so many things have happened in the cluster, or nothing more does."""
    wanted = len(bench.audit.events) + count
    quiet = time.monotonic() + 1.0
    wait_until(lambda: len(bench.audit.events) >= wanted or time.monotonic() >= quiet, "something", 5.0, interval=0.005)
