"""Rungs: the folders of tests, skipped loudly where their means are missing, and reported at the end."""

import functools
import os
import signal
from pathlib import Path

import pytest

from cluster_fixtures import auditor, crds, namespace
from lab_fixtures import controlplane, image_tools, node_cluster
from rungs import EARLIER, TESTS, Climb, height, rung_of, turn
from taskoffer_lab.go_toolchain import find_go
from taskoffer_lab.node_requirements import why_no_nodes
from taskoffer_lab.toolchain import missing_tool_names

__all__ = ["auditor", "controlplane", "crds", "image_tools", "namespace", "node_cluster"]

_MARKED = ("apiserver", "chaos", "node", "trainer")
_REQUIRED = "TASKOFFER_REQUIRE_RUNGS"

_climb = Climb()


@functools.cache
def why_not(rung: str) -> str:
    """Return why the rung cannot run on this machine, "" if it can."""
    if rung not in ("apiserver", "chaos", "node"):
        return ""
    missing = missing_tool_names(["controlplane", "node"] if rung == "node" else ["controlplane"])
    if missing and find_go() is None and os.environ.get("TASKOFFER_OFFLINE"):
        return f"no Go toolchain to build {', '.join(missing)} with, and TASKOFFER_OFFLINE is set"
    return why_no_nodes() if rung == "node" else ""


def pytest_configure() -> None:
    """Let SIGINT end what the tests start, also where a shell began the run in its background and so ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its rung, skip those of a rung whose means are missing, and climb rung by rung."""
    shared = hasattr(config, "workerinput")
    items.sort(key=lambda item: (height(item.path), turn(item.path) if shared else 0))
    for item in items:
        rung = rung_of(item.path)
        if rung in _MARKED:
            item.add_marker(rung)
        if rung and (reason := why_not(rung)):
            if rung in os.environ.get(_REQUIRED, "").split(","):
                pytest.exit(f"rung {rung} is required ({_REQUIRED}) but cannot run: {reason}", returncode=1)
            _climb.reasons[rung] = reason
            item.add_marker(pytest.mark.skip(reason=f"rung {rung}: {reason}"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test once: by its call, or by the phase that kept it from being called."""
    rung = rung_of(TESTS.parent / report.nodeid.partition("::")[0])
    if rung and (report.when == "call" or report.outcome != "passed"):
        _climb.outcomes[rung][report.outcome] += 1


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which rungs ran, in this run and in those before it that it is to go on from."""
    if hasattr(config, "workerinput"):
        # Whoever shares the files out among such processes hears of each test and counts for all.
        return
    if file := os.environ.get(EARLIER):
        _climb.add_earlier(Path(file))
    terminalreporter.write_line(_climb.line())
