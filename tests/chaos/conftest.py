"""Fixtures of the chaos rung: a campaign per test, on the shared control plane."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from campaign import BASE_SEED, Campaign
from operator_fixtures import bench, caretaker, kubelet, operator, operator_directory, operator_home

__all__ = ["bench", "caretaker", "kubelet", "operator", "operator_directory", "operator_home"]

_reports = pytest.StashKey[list[str]]()


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """The test's campaign, named like the test; its line is printed at the end of the run."""
    made = Campaign(request.node.name.removeprefix("test_"))
    failures = request.session.testsfailed
    yield made
    failed = request.session.testsfailed > failures
    made.record("failed" if failed else "passed")
    request.config.stash.setdefault(_reports, []).append(("FAILED " if failed else "") + made.report())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what each campaign did, and with which seed to repeat it."""
    lines = config.stash.get(_reports, [])
    if lines:
        terminalreporter.write_line(f"campaigns (repeat with TASKOFFER_CHAOS_SEED={BASE_SEED}):")
    for line in lines:
        terminalreporter.write_line(f"  {line}")
