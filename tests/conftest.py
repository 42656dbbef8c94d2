"""Rungs: the folders of tests, skipped loudly where their means are missing, and reported at the end."""

import collections
import functools
import os
from pathlib import Path

import pytest

from cluster_fixtures import auditor, crds, namespace
from lab_fixtures import controlplane, image_tools, node_cluster
from taskoffer_lab.go_toolchain import find_go
from taskoffer_lab.node_requirements import why_no_nodes
from taskoffer_lab.toolchain import missing_tool_names

__all__ = ["auditor", "controlplane", "crds", "image_tools", "namespace", "node_cluster"]

RUNGS = ("unit", "kmock", "lab", "apiserver", "chaos", "trainer", "node")
_MARKED = ("apiserver", "chaos", "node", "trainer")
_TESTS = Path(__file__).parent
_REQUIRED = "TASKOFFER_REQUIRE_RUNGS"

_outcomes: dict[str, collections.Counter[str]] = {rung: collections.Counter() for rung in RUNGS}
_reasons: dict[str, str] = {}


def rung_of(path: Path) -> str | None:
    """Return the rung of a test file, None for one outside of all rungs."""
    parts = path.relative_to(_TESTS).parts if path.is_relative_to(_TESTS) else ()
    return parts[0] if parts and parts[0] in RUNGS else None


@functools.cache
def why_not(rung: str) -> str:
    """Return why the rung cannot run on this machine, "" if it can."""
    if rung not in ("apiserver", "chaos", "node"):
        return ""
    missing = missing_tool_names(["controlplane", "node"] if rung == "node" else ["controlplane"])
    if missing and find_go() is None and os.environ.get("TASKOFFER_OFFLINE"):
        return f"no Go toolchain to build {', '.join(missing)} with, and TASKOFFER_OFFLINE is set"
    return why_no_nodes() if rung == "node" else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its rung, skip those of a rung whose means are missing, and climb rung by rung."""
    items.sort(key=lambda item: RUNGS.index(rung) if (rung := rung_of(item.path)) else -1)
    for item in items:
        rung = rung_of(item.path)
        if rung in _MARKED:
            item.add_marker(rung)
        if rung and (reason := why_not(rung)):
            if rung in os.environ.get(_REQUIRED, "").split(","):
                pytest.exit(f"rung {rung} is required ({_REQUIRED}) but cannot run: {reason}", returncode=1)
            _reasons[rung] = reason
            item.add_marker(pytest.mark.skip(reason=f"rung {rung}: {reason}"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test once: by its call, or by the phase that kept it from being called."""
    rung = rung_of(_TESTS.parent / report.nodeid.partition("::")[0])
    if rung and (report.when == "call" or report.outcome != "passed"):
        _outcomes[rung][report.outcome] += 1


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which rungs ran."""
    terminalreporter.write_line("rungs: " + " · ".join(_line(rung) for rung in RUNGS))


def _line(rung: str) -> str:
    counts = _outcomes[rung]
    ran = counts["passed"] + counts["failed"]
    if rung in _reasons:
        return f"{rung} SKIPPED: {_reasons[rung]}"
    if not ran:
        return f"{rung} not run" if not counts["skipped"] else f"{rung} skipped ({counts['skipped']} tests)"
    details = [f"{ran} tests"] + [f"{counts[key]} {key}" for key in ("failed", "skipped") if counts[key]]
    return f"{rung} ran ({', '.join(details)})"
