"""What is read from a history of pods, on histories made by hand: each disturbance is found, and peace is none."""

from __future__ import annotations

from typing import Any

import pytest

from auditor_history import NODE, POD, Event
from builders import make_node, make_pod, merged, stored
from pod_history import disturbed, overbooked

Object = dict[str, Any]
STARTED = {"running": {"startedAt": "2026-01-31T12:00:00Z"}}


def seen(revision: int, kind: str, obj: Object, type_: str = "MODIFIED", **meta: Any) -> Event:
    """Return an event about an object whose UID is its name."""
    whole = stored(obj, uid=obj["metadata"]["name"], resource_version=str(revision), **meta)
    return Event(kind, type_, whole, float(revision), revision)


def pod(name: str, gpus: int = 4, state: Object | None = None, restarts: int = 0, phase: str = "Running") -> Object:
    """Return a pod on node-a with one container."""
    container = {"containerID": f"of-{name}-{restarts}", "restartCount": restarts, "state": state or STARTED}
    return merged(make_pod(name, gpus=gpus, phase=phase), {"status": {"containerStatuses": [container]}})


def test_pods_that_fill_a_node_one_after_the_other_overbook_nothing() -> None:
    events = [
        seen(1, NODE, make_node(gpus=8)),
        seen(2, POD, pod("a")),
        seen(3, POD, pod("b")),
        seen(4, POD, pod("a", phase="Succeeded")),
        seen(5, POD, pod("c")),
        seen(6, POD, pod("b"), "DELETED"),
        seen(7, POD, pod("d")),
        seen(8, POD, merged(pod("elsewhere"), {"spec": {"nodeName": "node-b"}})),
    ]
    assert overbooked(events) == []


@pytest.mark.parametrize(
    "last",
    [seen(4, POD, pod("c", gpus=1)), seen(4, NODE, make_node(gpus=7))],
    ids=["a pod too many", "a GPU too few"],
)
def test_a_moment_of_overbooking_is_found_even_when_it_has_passed(last: Event) -> None:
    events = [seen(1, NODE, make_node(gpus=8)), seen(2, POD, pod("a")), seen(3, POD, pod("b")), last]
    events.append(seen(5, POD, pod("a"), "DELETED"))
    (found,) = overbooked(events)
    assert found.startswith("r4: ")


def test_a_pod_that_starts_and_runs_on_is_not_disturbed_and_others_may_go() -> None:
    waiting = pod("a", state={"waiting": {"reason": "ContainerCreating"}}, phase="Pending")
    running = seen(2, POD, pod("a"))
    events = [seen(1, POD, waiting), running, seen(3, POD, merged(pod("a"), {"metadata": {"labels": {"new": "1"}}}))]
    events.append(seen(4, POD, pod("b"), "DELETED"))
    assert disturbed(events, [running.object]) == []


@pytest.mark.parametrize(
    "after",
    [
        seen(3, POD, pod("a"), deleted="2026-01-31T12:00:30Z"),
        seen(3, POD, pod("a"), "DELETED"),
        seen(3, POD, pod("a", restarts=1)),
        seen(3, POD, pod("a", state={"terminated": {"exitCode": 0}})),
        seen(3, POD, make_pod("a")),
    ],
    ids=["asked to go", "gone", "restarted", "ended", "without its container"],
)
def test_whatever_happens_to_a_running_pod_is_found(after: Event) -> None:
    running = seen(2, POD, pod("a"))
    (found,) = disturbed([running, after, seen(4, POD, pod("a"))], [running.object])
    assert found.startswith("r3: ")
