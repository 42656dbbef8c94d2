"""The operator as its users run it: `taskoffer run` in a process of its own, under the ServiceAccount that ships."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fault_proxy import FaultProxy
from taskoffer_lab.api_client import MERGE_PATCH, ApiError
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.errors import LabError
from taskoffer_lab.install import operator_kubeconfig
from taskoffer_lab.process_table import wait_until

LEASE = "/apis/coordination.k8s.io/v1/namespaces/taskoffer-system/leases/taskoffer"
START_SECONDS = 90.0
_UNNOTICED = 10.0
"""Seconds before its end in which a leader that cannot reach the server has done nothing any more."""

_SAMPLE = re.compile(r"^(\w+)(\{.*\})? ([-+0-9.eE]+|NaN)$", re.MULTILINE)
_numbers = itertools.count(1)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_its_end(replica: OperatorProcess) -> Iterator[OperatorProcess]:
    """Hand out a replica that a test may start and end as it likes; what is left of it at last must end well."""
    yield replica
    if replica.running:
        assert replica.terminate() == 0
    print(replica.log()[-8000:])  # noqa: T201
    assert "Traceback" not in replica.log()


class Caretaker:
    """Starts a replica again that left because it had lost its lease, as a Deployment does; nothing else is excused.

    An API server that is starved of CPU for seconds makes a leader leave. That is right, and not what most tests
    are about.
    """

    def __init__(self, replica: OperatorProcess) -> None:
        self._replica = replica
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="caretaker", daemon=True)
        self.absences: list[tuple[float, float]] = []
        self.problem: str | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(START_SECONDS + 5)
        assert self.problem is None, self.problem

    def _watch(self) -> None:
        while not self._stopping.wait(0.1):
            code = self._replica.unasked_end()
            if code is None:
                continue
            last = self._replica.log()[-2000:]
            if code != 1 or "leadership lost, leaving" not in last:
                self.problem = f"the operator ended with {code}:\n{last}"
                return
            since = time.monotonic()
            try:
                self._replica.start()
            except (AssertionError, LabError) as error:
                self.problem = f"the operator could not be started again: {error}"
                return
            self.absences.append((since - _UNNOTICED, time.monotonic()))


class OperatorProcess:
    """One replica of the operator outside the cluster.

    CRDs and RBAC have to be installed. The Role names one lease, so all replicas of a cluster stand for election
    against each other. When whoever started it is killed, the lab takes the API server down, and a replica that
    cannot renew its lease leaves by itself.

    Args:
        cluster: The cluster that it works on.
        directory: Where its kubeconfig and its log go.
        arguments: Further arguments of `taskoffer run`.
        through: A proxy that stands between it and the API server.
        program: What Python runs in place of the product's own entry point.
    """

    def __init__(
        self,
        cluster: Cluster,
        directory: Path,
        *arguments: str,
        through: FaultProxy | None = None,
        program: Sequence[str] = ("-m", "taskoffer"),
    ) -> None:
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._number = next(_numbers)
        self._arguments = arguments
        self._program = program
        self._kubeconfig = operator_kubeconfig(cluster, directory)
        if through is not None:
            self._kubeconfig = through.kubeconfig(self._kubeconfig, directory)
        self.log_file = directory / f"operator-{self._number}.log"
        self.port = free_port()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.terminate()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, leading: bool = True) -> Self:
        """Start it; by default wait until it leads and has decided what was there."""
        assert not self.running, "it runs already"
        self._close()
        # The end of the one before is nobody's business any more, from before this one's log is open.
        self._process = None
        self._log = self.log_file.open("ab")
        self._process = subprocess.Popen(
            [
                *(sys.executable, *self._program, "run", "-v", "--listen", "127.0.0.1"),
                *("--kubeconfig", str(self._kubeconfig), "--port", str(self.port), *self._arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        if leading:
            try:
                self.wait_leading()
            except Exception:
                # Nobody else would end it: it may never have led, and then it has no lease to lose.
                if self.running:
                    self.kill()
                raise
        return self

    def wait_leading(self, seconds: float = START_SECONDS) -> float:
        """Wait until it leads; returns the seconds that took."""
        return wait_until(lambda: self.leads, f"operator {self._number} leads", seconds, check=self._still_there)

    def _still_there(self) -> None:
        assert self.running, f"the operator ended with {self._code()}:\n{self.log()[-4000:]}"

    def _code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def leads(self) -> bool:
        """Whether it says that it leads."""
        return self.metric("taskoffer_leader") == 1

    def kill(self, *, forget_lease: bool = False) -> None:
        """End it with SIGKILL, at once and without a word.

        Args:
            forget_lease: Give its lease up too, so that the next one need not wait until it has run out.
        """
        assert self._process is not None
        self._close()
        self._process.kill()
        self._process.wait(10)
        self._close()
        if forget_lease:
            try:
                self._cluster.api.request("PATCH", LEASE, {"spec": {"holderIdentity": ""}}, MERGE_PATCH)
            except ApiError as error:
                if error.status != 404:
                    raise

    def terminate(self, seconds: float = 40.0) -> int:
        """Ask it to end by SIGTERM; returns its exit code."""
        assert self._process is not None
        # Closing the log says that the end is wanted.
        self._close()
        self._process.terminate()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._close()
        return code

    def wait_ended(self, seconds: float) -> int:
        """Wait until it has ended by itself; returns its exit code."""
        assert self._process is not None
        code = self._process.wait(seconds)
        self._close()
        return code

    def unasked_end(self) -> int | None:
        """Return the exit code of a process that ended although nobody asked it to; None while there is none."""
        return self._process.poll() if self._process is not None and self._log is not None else None

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def log(self, start: int = 0) -> str:
        """Return what it has logged, from a byte offset on."""
        if not self.log_file.exists():
            return ""
        return self.log_file.read_bytes()[start:].decode(errors="replace")

    def log_size(self) -> int:
        """Return the present end of the log, for `log`."""
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def metric(self, name: str, **labels: str) -> float | None:
        """Return the sum of a metric's samples that carry these labels; None when there is none or no answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            float(value)
            for sample, given, value in _SAMPLE.findall(text)
            if sample == name and all(one in given for one in wanted)
        ]
        return sum(found) if found else None
