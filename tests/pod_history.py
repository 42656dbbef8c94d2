"""What the auditor saw of pods, judged by what their owners care for: none is disturbed, no GPU is asked for twice."""

from __future__ import annotations

from collections.abc import Iterable

from auditor_history import (
    NODE,
    POD,
    Event,
    Object,
    World,
    allocatable,
    gpus_of_pod_spec,
    in_order,
    name_of,
    pod_is_over,
)
from fake_node import GPU


def overbooked(events: Iterable[Event]) -> list[str]:
    """Return the moments, of all that the auditor saw, at which the pods bound to a node asked for more than it has."""
    world, found = World(), []
    for event in in_order(events):
        world.apply(event)
        if event.kind not in (POD, NODE):
            continue
        for node in world.objects[NODE].values():
            bound = [p for p in world.objects[POD].values() if p["spec"].get("nodeName") == node["metadata"]["name"]]
            asked = sum(gpus_of_pod_spec(pod["spec"], GPU) for pod in bound if not pod_is_over(pod))
            if asked > allocatable(node, GPU):
                found.append(f"r{event.revision}: {asked} of {allocatable(node, GPU)} on {name_of(node)}")
    return found


def disturbed(events: Iterable[Event], pods: Iterable[Object]) -> list[str]:
    """Return what the auditor saw happen to pods that were read while they ran and have not been told to end since."""
    before = {pod["metadata"]["uid"]: pod for pod in pods}
    found = []
    for event in events:
        if event.kind == POD and event.uid in before:
            pod = event.object
            since = int(before[event.uid]["metadata"]["resourceVersion"])
            statuses = pod["status"].get("containerStatuses") or ()
            was = before[event.uid]["status"]["containerStatuses"]
            if event.type == "DELETED" or "deletionTimestamp" in pod["metadata"]:
                found.append(f"r{event.revision}: {name_of(pod)} was asked to go")
            elif event.revision >= since and _container(statuses) != _container(was):
                found.append(f"r{event.revision}: {name_of(pod)} runs {_container(statuses)}, not {_container(was)}")
    return found


def _container(statuses: Iterable[Object]) -> list[tuple[object, ...]]:
    """Return which container runs, the number of those before it, and since when it does."""
    running = [(status["state"].get("running") or {}).get("startedAt") for status in statuses]
    return [(s.get("containerID"), s["restartCount"], since) for s, since in zip(statuses, running, strict=True)]
