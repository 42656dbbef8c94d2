"""Runs of many offers whose jobs run through while a campaign attacks; at their end the whole ledger is checked."""

from __future__ import annotations

from collections.abc import Callable

from auditor_history import JOB, labels, offer_uid_of
from campaign import Campaign
from fake_node import Object, Script
from fault_proxy import FaultProxy
from fault_requests import Match
from offer_trails import Trails
from operator_bench import Bench, condition
from operator_process import OperatorProcess
from patient_client import PatientClient
from taskoffer_lab.api_client import ApiError

NODES = 3
GPUS = 8
END_SECONDS = 180.0
_TOO_LONG = 40
"""Hours: more than the policy allows."""

_ANSWERS = Match(("patch",), "taskoffers", "status")


class OfferRun:
    """Offers of all sizes; some are rejected, and the first pod of some fails.

    Args:
        bench: Where they are; its client becomes patient.
        campaign: What is counted goes there.
        run_seconds: How long a pod runs.
    """

    def __init__(self, bench: Bench, campaign: Campaign, run_seconds: float = 0.3) -> None:
        self.bench = bench
        self.campaign = campaign
        self.created = 0
        bench.api.close()
        bench.api = PatientClient(bench.cluster.client_config)
        for name in ("a", "b", "c"):
            bench.kubelet.automate(bench.node(name, GPUS), Script(run_seconds=run_seconds, exit_code=_fails_first))

    def create(self, count: int, before_each: Callable[[int], object] = lambda _number: None) -> None:
        """Create so many more offers."""
        for number in range(self.created, self.created + count):
            before_each(number)
            try:
                self.bench.offer(_name(number), (1, 2, 4)[number % 3], hours=_TOO_LONG if _is_long(number) else 1)
            except ApiError as error:
                # The answer to an earlier try was lost.
                if error.status != 409:
                    raise
            self.created = number + 1

    def finish(self) -> None:
        """Wait until every offer has ended in the way that it has to."""
        for number in range(self.created):
            wanted = "Rejected" if _is_long(number) else "Succeeded"
            ended = self.bench.until(_name(number), lambda o: condition(o, "Finished") != {}, "its end", END_SECONDS)
            assert condition(ended, "Finished")["reason"] == wanted, ended["status"]["conditions"]

    def check(self, replica: OperatorProcess, proxy: FaultProxy | None = None) -> None:
        """Every offer was decided once, with one write for each answer; nothing ran twice, and no GPU is lost."""
        trails = Trails(self.bench)
        assert trails.repeated == 0, "an answer was written twice"
        jobs = self._jobs()
        for number in range(self.created):
            name = _name(number)
            long = _is_long(number)
            assert trails.ends(name) == 1, (name, trails.of(name))
            assert trails.admissions(name) == (0 if long else 1), (name, trails.of(name))
            assert len(jobs.get(name, ())) == (0 if long else 2 if _is_flaky(number) else 1), (name, jobs.get(name))
        for node in self.bench.nodes:
            self.bench.booked(node, 0)
        counts = self.campaign.counts
        counts["offers"] += self.created
        counts["answers"] += trails.writes
        counts["status writes"] += trails.writes
        retries = replica.metric("taskoffer_api_write_retries_total")
        counts["writes that the last process repeated"] += int(retries or 0)
        if proxy is not None:
            counts["tries of answers"] += len(proxy.seen(_ANSWERS))

    def _jobs(self) -> dict[str, set[str]]:
        """Return the UIDs of all Jobs that there ever were, by the offer's name."""
        made: dict[str, set[str]] = {}
        for event in self.bench.audit.events:
            if event.kind == JOB and event.object["metadata"]["namespace"] == self.bench.namespace:
                assert offer_uid_of(JOB, event.object)
                name = labels(event.object)["taskoffer.dev/job"].rpartition("-")[0]
                made.setdefault(name, set()).add(event.uid)
        return made


def _name(number: int) -> str:
    return f"offer-{number}"


def _is_long(number: int) -> bool:
    return number % 10 == 3


def _is_flaky(number: int) -> bool:
    return number % 10 == 7


def _fails_first(pod: Object) -> int:
    """Let the first attempt of some offers fail; pods of others end well."""
    marks = pod["metadata"].get("labels", {})
    number = int(marks.get("taskoffer.dev/job", "foreign-0").split("-")[1])
    return int(_is_flaky(number) and marks["taskoffer.dev/attempt"] == "1")
