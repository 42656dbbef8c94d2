"""Two replicas of the operator, each behind a fault proxy of its own: one leads, the other stands by."""

from __future__ import annotations

import itertools
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from fault_proxy import FaultProxy
from fault_requests import OWN_WRITES, Match, Record
from kept_client import KeptClient
from operator_bench import Bench
from operator_process import START_SECONDS, OperatorProcess
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.process_table import wait_until

PRODUCT = ("-m", "taskoffer")
CRASHING = Path(__file__).with_name("crashing_operator.py")
LEASE_CALLS = Match(plural="leases")

_numbers = itertools.count()


class Member:
    """One of the two: a proxy that stays, and a process that is started again and again."""

    def __init__(self, cluster: Cluster, directory: Path, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._cluster, self._directory = cluster, directory
        self.process = self._made(PRODUCT)

    def _made(self, program: Sequence[str]) -> OperatorProcess:
        return OperatorProcess(self._cluster, self._directory, through=self.proxy, program=program)

    def start(self, program: Sequence[str] = PRODUCT) -> None:
        """Start a new process that need not lead."""
        self.process = self._made(program)
        self.process.start(leading=False)

    @property
    def stands_by(self) -> bool:
        """Whether it is ready and does not lead."""
        return self.process.metric("taskoffer_leader") == 0 and self._is_ready()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.process.port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def writes(self, since: float) -> list[Record]:
        """Return what it has sent since a moment: its writes but for the election and Events."""
        return [record for record in self.proxy.seen(OWN_WRITES) if record.at >= since]


class Pair:
    """Two members, of which one leads after `ready`."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self._stack = ExitStack()
        self._cluster, self._directory = cluster, directory
        self.members: list[Member] = []
        self.crash_file = directory / "crash"

    def __enter__(self) -> Self:
        for number in (1, 2):
            proxy = self._stack.enter_context(FaultProxy(self._cluster.client_config))
            self.members.append(Member(self._cluster, self._directory / str(number), proxy))
        self.leader, self.standby = self.members
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._stack.close()

    def stop(self) -> None:
        """End both."""
        for member in self.members:
            if member.process.running:
                member.process.terminate()

    def ready(self, *, crashing: bool = False) -> None:
        """Start what does not run, and wait until one leads and the other stands by.

        Args:
            crashing: Start both anew, with a leader whose next cycle fails once `crash_file` is there.
        """
        self.crash_file.unlink(missing_ok=True)
        if crashing:
            self.stop()
            self.members[0].start((str(CRASHING), str(self.crash_file)))
            self.members[0].process.wait_leading()
        for member in self.members:
            if not member.process.running:
                member.start()
        wait_until(self._in_order, "one of two leads, the other stands by", START_SECONDS)

    def _in_order(self) -> bool:
        self.leader, self.standby = sorted(self.members, key=lambda member: not member.process.leads)
        return self.leader.process.leads and self.standby.stands_by

    def logs(self) -> str:
        """Return the end of what both have logged."""
        return "\n".join(f"replica {m.process.log_file}:\n{m.process.log()[-6000:]}" for m in self.members)


class Probes:
    """Offers that come one after the other and are to be refused: how long they wait shows for how long nobody led.

    Args:
        bench: Where they are created.
        interval: Seconds between two.
    """

    def __init__(self, bench: Bench, interval: float = 0.2) -> None:
        self._bench = bench
        self._interval = interval
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._create, name="probes", daemon=True)
        self.names: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _create(self) -> None:
        api = KeptClient(self._bench.cluster.client_config)
        try:
            while True:
                name = f"probe-{next(_numbers)}"
                api.request("POST", self._bench.path("taskoffers"), self._bench.make_offer(name, hours=40))
                self.names.append(name)
                if self._stopping.wait(self._interval):
                    return
        finally:
            api.close()


def last_write(records: Sequence[Record]) -> float:
    """Return when the last of these writes was carried out."""
    return max((r.answered for r in records if r.committed and r.answered is not None), default=float("-inf"))
