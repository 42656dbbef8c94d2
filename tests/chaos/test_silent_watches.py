"""A watch that goes silent: found, and its process replaced; a quiet cluster is not mistaken for one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from operator_bench import Bench
from operator_process import OperatorProcess
from taskoffer_lab.process_table import wait_until

WINDOW = 10
KINDS = {"Node", "Pod", "Job", "TrainingJob", "CapacityPolicy", "TaskOffer"}


@pytest.fixture
def replica(bench: Bench, operator_directory: Path) -> Iterator[OperatorProcess]:
    """A replica with a short window that is not started yet."""
    made = OperatorProcess(bench.cluster, operator_directory, "--watch-window", str(WINDOW))
    yield made
    if made.running:
        assert made.terminate() == 0
    print(made.log()[-8000:])  # noqa: T201
    assert "Traceback" not in made.log()


def test_neither_leader_nor_standby_takes_a_quiet_cluster_for_a_silent_watch(
    bench: Bench, replica: OperatorProcess, operator_directory: Path
) -> None:
    with bench.audit.excused():
        replica.start()
    standby = OperatorProcess(bench.cluster, operator_directory, "--watch-window", str(WINDOW))
    standby.start(leading=False)
    try:
        since = time.time()
        # Several times as long as a silent watch would be borne.
        for each in (replica, standby):
            for kind in KINDS:
                wait_until(
                    lambda each=each, kind=kind: (  # type: ignore[misc]
                        (each.metric("taskoffer_watch_heard_timestamp_seconds", kind=kind) or 0) > since + 3 * WINDOW
                    ),
                    f"a word on the watch of {kind}",
                    60,
                )
        assert replica.running
        assert standby.running
        assert standby.metric("taskoffer_leader") == 0
    finally:
        if standby.running:
            standby.kill()
    assert "silent" not in replica.log() + standby.log()
