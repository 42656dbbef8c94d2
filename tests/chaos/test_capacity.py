"""Nodes that come, go, close, shrink and are shared with others, while offers are decided: nothing is booked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from campaign import Campaign
from offer_runs import OfferRun
from operator_bench import Bench
from operator_process import OperatorProcess, until_its_end

TEN_MINUTES = 600


@pytest.fixture
def replica(bench: Bench, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A replica that is not started yet."""
    yield from until_its_end(OperatorProcess(bench.cluster, operator_directory))


class Weather:
    """What happens to the nodes of a bench, drawn from a campaign's randomness; every change is undone at the end."""

    def __init__(self, bench: Bench, campaign: Campaign) -> None:
        self.bench, self.campaign = bench, campaign
        self.foreign: dict[str, str] = {}
        self._number = 0

    def strike(self) -> None:
        """Let one thing happen."""
        draw = self.campaign.random
        node = draw.choice(self.bench.nodes)
        happens: Callable[[str], None] = draw.choice(
            [self.not_ready, self.ready, self.cordon, self.uncordon, self.resize, self.share, self.share, self.leave]
        )
        self.campaign.counts[happens.__name__.replace("_", " ")] += 1
        happens(node)

    def not_ready(self, node: str) -> None:
        self.bench.kubelet.set_ready(node, False)

    def ready(self, node: str) -> None:
        self.bench.kubelet.set_ready(node, True)

    def cordon(self, node: str) -> None:
        self.bench.kubelet.cordon(node)

    def uncordon(self, node: str) -> None:
        self.bench.kubelet.cordon(node, False)

    def resize(self, node: str) -> None:
        self.bench.kubelet.set_gpus(node, self.campaign.random.choice([0, 2, 4, 8, 8]))

    def share(self, node: str) -> None:
        """Let a pod of somebody else take GPUs that are free; the kubelet would refuse one that does not fit."""
        policy = self.bench.get_policy()
        found = {n["name"]: n for n in policy.get("status", {}).get("capacity", {}).get("nodes") or ()}.get(node)
        if found is None or found["allocatable"] - found["booked"] < 1:
            return
        self._number += 1
        name = f"foreign-{self._number}"
        self.bench.foreign_pod(name, node, 1)
        self.foreign[name] = node

    def leave(self, node: str) -> None:
        """Let one of those pods end."""
        mine = [name for name, at in self.foreign.items() if at == node]
        if mine:
            del self.foreign[mine[0]]
            self.bench.kubelet.release(self.bench.namespace, mine[0])

    def clear(self) -> None:
        """Undo all of it."""
        for name in self.foreign:
            self.bench.kubelet.release(self.bench.namespace, name)
        self.foreign.clear()
        for node in self.bench.nodes:
            self.bench.kubelet.set_gpus(node, 8)
            self.bench.kubelet.cordon(node, False)
            self.bench.kubelet.set_ready(node, True)


def test_nodes_change_all_the_time(bench: Bench, campaign: Campaign, replica: OperatorProcess) -> None:
    run = OfferRun(bench, campaign, run_seconds=0.5)
    with bench.audit.excused():
        replica.start()
    # A node that is away for long would cost attempts; here it is to cost time only.
    bench.policy(attempts={"nodeLostSeconds": 3600, "startTimeoutSeconds": 3600})
    weather = Weather(bench, campaign)
    run.create(Campaign.size(40, 400), before_each=lambda _number: weather.strike())
    weather.clear()
    run.finish()
    run.check(replica)


@pytest.mark.parametrize("seconds", [TEN_MINUTES, -TEN_MINUTES], ids=["ahead", "behind"])
def test_a_clock_that_is_ten_minutes_off_costs_no_gpu_and_no_attempt(
    bench: Bench, campaign: Campaign, operator_directory: Path, seconds: int
) -> None:
    run = OfferRun(bench, campaign)
    program = (str(Path(__file__).parent.parent / "shifted_operator.py"), str(seconds))
    replica = OperatorProcess(bench.cluster, operator_directory, program=program)
    with bench.audit.excused():
        replica.start()
    try:
        bench.policy(attempts={"nodeLostSeconds": 30, "startTimeoutSeconds": 30})
        run.create(Campaign.size(15, 150))
        run.finish()
        run.check(replica)
        # A node that is away for a moment is not away for ten minutes.
        for node in bench.nodes:
            bench.kubelet.automate(node, None)
        offer = bench.admitted("short-absence", 1)
        node = offer["status"]["admission"]["assignments"][0]["nodeName"]
        bench.bound_pod("short-absence")
        bench.kubelet.set_ready(node, False)
        bench.job_condition("short-absence", "Running", "NodeLost")
        bench.kubelet.set_ready(node, True)
        bench.end(bench.run("short-absence"))
        bench.finished("short-absence", "Succeeded")
        (_,) = bench.training_job("short-absence")["status"]["attempts"]
    finally:
        assert replica.terminate() == 0
