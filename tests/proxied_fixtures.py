"""Fixtures of campaigns with one replica behind a fault proxy for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from auditor import Auditor
from fault_proxy import FaultProxy
from operator_process import Caretaker, OperatorProcess
from taskoffer_lab.local_provider import LocalCluster


@dataclass
class Proxied:
    """A leading replica, and the proxy between it and the API server."""

    replica: OperatorProcess
    proxy: FaultProxy
    caretaker: Caretaker


@pytest.fixture(scope="module")
def proxied_module(operator_home: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """One leading replica behind a proxy for a module; it must end well and meet nothing that it did not expect."""
    with FaultProxy(operator_home.client_config) as proxy:
        replica = OperatorProcess(operator_home, tmp_path_factory.mktemp("operator"), through=proxy)
        with replica:
            with Caretaker(replica) as watched:
                yield Proxied(replica, proxy, watched)
            assert replica.terminate() == 0
    assert "Traceback" not in replica.log(), replica.log()


@pytest.fixture
def proxied(proxied_module: Proxied, auditor: Auditor) -> Iterator[Proxied]:
    """The module's replica; what it logs during a failed test is shown with the failure."""
    start, seen = proxied_module.replica.log_size(), len(proxied_module.caretaker.absences)
    yield proxied_module
    for absence in proxied_module.caretaker.absences[seen:]:
        auditor.excuse(*absence)
    print(proxied_module.replica.log(start)[-12000:])  # noqa: T201
