"""Fixtures of the operator's tests: the control plane with its rights, fake nodes, a running replica, a bench."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from auditor import Auditor
from fake_node import FakeKubelet
from operator_bench import Bench
from operator_process import Caretaker, OperatorProcess
from taskoffer_lab.install import install
from taskoffer_lab.local_provider import LocalCluster


@pytest.fixture(scope="session")
def operator_home(crds: LocalCluster) -> LocalCluster:
    """The shared control plane with our kinds and the RBAC that ships."""
    install(crds)
    return crds


@pytest.fixture(scope="session")
def kubelet(operator_home: LocalCluster) -> Iterator[FakeKubelet]:
    """The kubelets of all fake nodes."""
    with FakeKubelet(operator_home) as played:
        yield played


@pytest.fixture(scope="module")
def caretaker(
    operator_home: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OperatorProcess, Caretaker]]:
    """One leading replica for a module; it must end well, and must not have met anything that it did not expect."""
    # Tests that exchange CRDs cut the watches' history, so the full list comes more often than by default.
    options = ("--progress-interval", "1", "--resync", "15")
    replica = OperatorProcess(operator_home, tmp_path_factory.mktemp("operator"), *options)
    with replica:
        with Caretaker(replica) as watched:
            yield replica, watched
        assert replica.terminate() == 0
    assert "Traceback" not in replica.log(), replica.log()


@pytest.fixture
def operator(caretaker: tuple[OperatorProcess, Caretaker], auditor: Auditor) -> Iterator[OperatorProcess]:
    """The module's replica; what it logs during a failed test is shown with the failure."""
    replica, watched = caretaker
    start = replica.log_size()
    seen = len(watched.absences)
    yield replica
    for absence in watched.absences[seen:]:
        auditor.excuse(*absence)
    print(replica.log(start)[-8000:])  # noqa: T201


@pytest.fixture
def bench(
    operator_home: LocalCluster, kubelet: FakeKubelet, auditor: Auditor, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    """A bench of its own, watched by the auditor from before its first object to after its last."""
    made = Bench(operator_home, kubelet, auditor)
    failures = request.session.testsfailed
    yield made
    try:
        if request.session.testsfailed > failures:
            print(made.report())  # noqa: T201
        made.clear()
    finally:
        made.api.close()


@pytest.fixture
def operator_directory(tmp_path: Path) -> Path:
    """A folder for the kubeconfigs and logs of a test's own replicas."""
    return tmp_path / "operators"
