"""Fixtures on top of a cluster: our kinds installed, a namespace of one's own, and the auditor."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from auditor import Auditor
from taskoffer_lab.cluster import Cluster
from taskoffer_lab.local_provider import LocalCluster
from taskoffer_lab.process_table import wait_until

CRDS = Path(__file__).resolve().parent.parent / "crds"
_numbers = itertools.count(1)


def apply_crds(cluster: Cluster) -> None:
    """Install our kinds from crds/ and wait until they are served."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(CRDS))


@pytest.fixture(scope="session")
def crds(controlplane: LocalCluster) -> LocalCluster:
    """The shared control plane with our kinds installed."""
    apply_crds(controlplane)
    return controlplane


@pytest.fixture
def namespace(crds: LocalCluster) -> Iterator[str]:
    """A new namespace; what a test leaves in it is deleted."""
    name = f"test-{next(_numbers)}"
    crds.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    for path in (
        f"/apis/taskoffer.dev/v1alpha1/namespaces/{name}/taskoffers",
        f"/apis/taskoffer.dev/v1alpha1/namespaces/{name}/trainingjobs",
        f"/apis/batch/v1/namespaces/{name}/jobs",
        f"/api/v1/namespaces/{name}/pods",
    ):
        # Pods have no kubelet here that would end them, so nothing waits for one.
        options = {"propagationPolicy": "Background", "gracePeriodSeconds": 0}
        crds.api.request("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", **options})
        wait_until(functools.partial(_is_empty, crds, path), f"{path} empty", 30)
    crds.api.request("DELETE", f"/api/v1/namespaces/{name}")


def _is_empty(cluster: Cluster, path: str) -> bool:
    return not cluster.api.request("GET", path)["items"]


@pytest.fixture
def auditor(crds: LocalCluster) -> Iterator[Auditor]:
    """The auditor over the shared control plane; the test ends with an error when the ledger was not true.

    Ask for it before the fixture that starts the operator.
    """
    with Auditor(crds.kubeconfig) as audit:
        yield audit


def create(cluster: Cluster, obj: dict[str, Any]) -> dict[str, Any]:
    """Create an object with kubectl and return it as stored."""
    made: dict[str, Any] = json.loads(cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(obj)))
    return made
