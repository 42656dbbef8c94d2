"""Strategies for odd Pods, Jobs and Nodes.

Kubernetes keeps their types, so what is odd about them are values: labels that look like ours, amounts, phases and
states that nobody expects, parts that are not there.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from crd_strategies import NODES, RESOURCE

Object = dict[str, Any]
Strategy = st.SearchStrategy[Any]

AMOUNTS = ("0", "1", "2", "8", "1k", "3Ki", "2000m", "500m", "1e3", "-1", "9223372036854775807", "", "many")
"""Amounts as they could stand in a pod or a node; the server keeps the canonical form, in which 1000 is ``1k``."""
MESSAGES = ("", "{", "[" * 4096, "{" * 4096, "x" * 4096, '{"exit_code": 1e999, "reason": ""}', "nul\u0000 ☃")
CONTAINERS = ("trainer", "other")


def _some(**fields: Strategy) -> Strategy:
    return st.fixed_dictionaries({}, optional=fields)


def _amounts() -> Strategy:
    return st.dictionaries(st.sampled_from((RESOURCE, "example.com/fpga", "cpu")), st.sampled_from(AMOUNTS), max_size=2)


def _containers() -> Strategy:
    resources = st.none() | _some(limits=st.none() | _amounts(), requests=st.none() | _amounts())
    return st.lists(
        st.fixed_dictionaries(
            {"name": st.sampled_from(CONTAINERS)},
            optional={"resources": resources, "restartPolicy": st.sampled_from(("Always", "x"))},
        ),
        max_size=3,
    )


def _labels(job: str) -> Strategy:
    return _some(
        **{
            "app.kubernetes.io/managed-by": st.just("taskoffer"),
            "taskoffer.dev/job": st.sampled_from((job, "", "x" * 63)),
            "taskoffer.dev/offer-uid": st.sampled_from(("", "nobody", "fuzz-0-uid-6")),
            "taskoffer.dev/policy": st.sampled_from(("", "fuzz", "lab", "nobody")),
            "taskoffer.dev/lane": st.sampled_from(("", "x")),
        }
    )


def _pod_spec() -> Strategy:
    def pinned(values: list[str]) -> Object:
        term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": values}]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}

    affinity = st.lists(st.sampled_from(NODES), max_size=2).map(pinned) | st.sampled_from(
        (None, {}, {"nodeAffinity": {}})
    )
    return _some(containers=_containers(), initContainers=st.none() | _containers(), affinity=affinity)


def _conditions(*kinds: str) -> Strategy:
    one = _some(
        type=st.sampled_from(kinds),
        status=st.sampled_from(("True", "False", "Unknown", "")),
        reason=st.sampled_from(("", "x" * 1024)),
        message=st.sampled_from(MESSAGES),
        lastTransitionTime=st.sampled_from((None, "2026-01-31T12:00:00Z", "0001-01-01T00:00:00Z")),
    )
    return st.none() | st.lists(one, max_size=3)


def _states() -> Strategy:
    moments = st.sampled_from((None, "2026-01-31T12:00:00Z", "1970-01-01T00:00:00Z", "9999-12-31T23:59:59Z"))
    terminated = _some(
        exitCode=st.sampled_from((0, 1, -1, 64, 143, 2**31 - 1)),
        message=st.sampled_from(MESSAGES),
        startedAt=moments,
        finishedAt=moments,
    )
    waiting = _some(reason=st.sampled_from(("", "x" * 2000)), message=st.sampled_from(MESSAGES))
    return _some(running=_some(startedAt=moments), terminated=terminated, waiting=waiting)


@st.composite
def odd_pod(draw: st.DrawFn, number: int, job: str) -> Object:
    """Draw a Pod; it may carry the labels of a TrainingJob."""
    made: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"odd-{number}", "labels": draw(_labels(job))},
        "spec": draw(_pod_spec()),
        "status": draw(
            _some(
                phase=st.sampled_from(("Pending", "Running", "Succeeded", "Failed", "Unknown", "")),
                conditions=_conditions("PodScheduled", "Ready"),
                message=st.sampled_from(MESSAGES),
                podIP=st.sampled_from(("", "192.0.2.1", "2001:db8::1")),
                containerStatuses=st.none()
                | st.lists(
                    st.fixed_dictionaries(
                        {"name": st.sampled_from(CONTAINERS)}, optional={"state": st.none() | _states()}
                    ),
                    max_size=2,
                ),
            )
        ),
    }
    if draw(st.booleans()):
        made["spec"]["nodeName"] = draw(st.sampled_from(NODES))
    if draw(st.booleans()):
        made["metadata"]["ownerReferences"] = [{"kind": "Job", "name": f"{job}-1", "uid": "x"}]
    return made


@st.composite
def odd_job(draw: st.DrawFn, number: int, job: str) -> Object:
    """Draw a batch/v1 Job; it may have the name of an attempt."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": draw(st.sampled_from((f"odd-{number}", f"{job}-1"))), "labels": draw(_labels(job))},
        "spec": draw(_some(suspend=st.booleans(), template=st.none() | _some(spec=st.none() | _pod_spec()))),
        "status": draw(_some(conditions=_conditions("Complete", "Failed", "Suspended"))),
    }


@st.composite
def odd_node(draw: st.DrawFn, number: int) -> Object:
    """Draw a Node; it may belong to the drawn objects' pool."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": f"odd-{number}", "labels": draw(st.sampled_from(({}, {"pool": "fuzz"}, {"pool": ""})))},
        "spec": draw(_some(unschedulable=st.booleans())),
        "status": draw(_some(allocatable=st.none() | _amounts(), conditions=_conditions("Ready", "DiskPressure"))),
    }
