"""Fixtures of the node rung: an operator on the shared cluster with one real node, and a bench whose pods are real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditor import Auditor
from node_bench import NodeBench, bring_image
from operator_fixtures import caretaker, operator
from operator_process import OperatorProcess
from taskoffer_lab.install import install
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.paths import state_root

__all__ = ["caretaker", "operator"]


@pytest.fixture(scope="session")
def operator_home(node_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> LocalCluster:
    """The shared cluster with our kinds, the RBAC that ships, and the image that stands in for the trainer's."""
    install(node_cluster)
    bring_image(node_cluster, tmp_path_factory.mktemp("stand-in"))
    return node_cluster


@pytest.fixture
def auditor(operator_home: LocalCluster) -> Iterator[Auditor]:
    """The auditor over the shared cluster; the test ends with an error when the ledger was not true."""
    with Auditor(operator_home.kubeconfig) as audit:
        yield audit


@pytest.fixture
def bench(
    operator_home: LocalCluster, operator: OperatorProcess, auditor: Auditor, request: pytest.FixtureRequest
) -> Iterator[NodeBench]:
    """A bench of its own, watched by the auditor from before its first object to after its last."""
    # Nodes hide the temporary folders of this machine behind their own.
    made = NodeBench(operator_home, auditor, state_root() / operator_home.name)
    failures = request.session.testsfailed
    yield made
    try:
        if request.session.testsfailed > failures:
            print(made.report())  # noqa: T201
        made.clear()
    finally:
        made.api.close()
