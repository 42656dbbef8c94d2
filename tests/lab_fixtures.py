"""Clusters for tests, one of each kind for the whole run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from taskoffer_lab.debian import IMAGE_TOOLS, ensure_programs
from taskoffer_lab.errors import LabError
from taskoffer_lab.local_provider import LocalCluster, LocalProvider
from taskoffer_lab.paths import package_root
from taskoffer_lab.progress import say
from taskoffer_lab.spec import ClusterSpec


@pytest.fixture(scope="session")
def controlplane(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """A real control plane without nodes; shared, so use namespaces of your own."""
    yield from _lend(ClusterSpec(name=f"test-{os.getpid()}-cp"), request)


@pytest.fixture(scope="session")
def node_cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """A real cluster with one real node, `node-a`, with 8 simulated GPUs; leave it as you found it."""
    yield from _lend(ClusterSpec(name=f"test-{os.getpid()}-n", nodes=1), request)


def _lend(spec: ClusterSpec, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    cluster = LocalProvider().up(spec)
    failed_before = request.session.testsfailed
    try:
        yield cluster
    finally:
        kept = cluster.down(keep_logs=request.session.testsfailed > failed_before)
        if kept is not None:
            say(f"tests failed; the logs of cluster {cluster.name} are in {kept}")


@pytest.fixture(scope="session")
def image_tools() -> None:
    """Have the programs that build and serve images, installed where that is allowed, or skip."""
    try:
        ensure_programs(tool.program for tool in IMAGE_TOOLS)
    except LabError as error:
        pytest.skip(str(error))


@contextmanager
def owner_of_a_cluster(program: str, name: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs `program` with the name of its cluster and has said "up"; killed at the latest here."""
    environment = {**os.environ, "PYTHONPATH": str(package_root())}
    command = [sys.executable, "-c", program, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        try:
            assert owner.stdout is not None
            assert "up\n" in iter(owner.stdout.readline, "")
            yield owner
        finally:
            owner.kill()
