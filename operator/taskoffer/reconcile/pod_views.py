"""From raw pods and Jobs to the few facts that are kept of them. Nothing here raises on a malformed object."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from taskoffer.api.quantity import whole
from taskoffer.api.v1alpha1.trainingjob import StepName
from taskoffer.decision.job_facts import JobView, PodView
from taskoffer.reconcile.cache import Raw
from taskoffer.reconcile.moments import moment
from taskoffer.render.names import (
    CONTAINER,
    JOB_LABEL,
    LANE_LABEL,
    OFFER_UID_LABEL,
    POLICY_LABEL,
    STEP_CONTAINER,
    STEP_LABEL,
)

_AROUND = {"prepare": StepName.PREPARE, "submit": StepName.SUBMIT}


def requested(pod_spec: Raw) -> dict[str, int]:
    """Return the extended resources that a pod asks for.

    As the scheduler counts: the sum over containers and restartable init containers, or the largest ordinary init
    container if that is more.
    """
    total: dict[str, int] = {}
    peak: dict[str, int] = {}
    for container in pod_spec.get("containers") or ():
        _add(total, container)
    for container in pod_spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            _add(total, container)
        else:
            for name, count in _extended(container).items():
                peak[name] = max(peak.get(name, 0), count)
    return {name: max(total.get(name, 0), peak.get(name, 0)) for name in total.keys() | peak.keys()}


def _extended(container: Raw) -> dict[str, int]:
    resources = container.get("resources") or {}
    wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: whole(value) for name, value in wanted.items() if "/" in name}


def _add(total: dict[str, int], container: Raw) -> None:
    for name, count in _extended(container).items():
        total[name] = total.get(name, 0) + count


@dataclass(frozen=True, slots=True)
class PodEntry:
    """A pod that asks for an extended resource or belongs to a training job."""

    namespace: str
    uid: str
    offer_uid: str | None
    training_job: str | None
    policy: str | None
    lane: str | None
    node: str | None
    requests: dict[str, int]
    ip: str | None
    job_uid: str | None
    """UID of the Job that made it."""
    step: StepName | None
    """The step around the training that it is of; None for a training."""
    view: PodView


def pod_entry(raw: Raw) -> PodEntry:
    """Reduce a Pod."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels = metadata.get("labels") or {}
    owner: Raw = next((o for o in metadata.get("ownerReferences") or () if o.get("kind") == "Job"), {})
    phase = status.get("phase")
    names = (CONTAINER, STEP_CONTAINER)
    container: Raw = next((c for c in status.get("containerStatuses") or () if c.get("name") in names), {})
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    started = (state.get("running") or {}).get("startedAt") or ended.get("startedAt")
    ended = ended or _failed_before(status)
    return PodEntry(
        namespace=metadata.get("namespace", ""),
        uid=metadata["uid"],
        offer_uid=labels.get(OFFER_UID_LABEL),
        training_job=labels.get(JOB_LABEL),
        policy=labels.get(POLICY_LABEL),
        lane=labels.get(LANE_LABEL),
        node=spec.get("nodeName") or pinned_node(spec),
        requests=requested(spec),
        ip=status.get("podIP"),
        job_uid=owner.get("uid"),
        step=_AROUND.get(labels.get(STEP_LABEL, "")),
        view=PodView(
            name=metadata["name"],
            uid=metadata["uid"],
            job_name=owner.get("name", ""),
            node=spec.get("nodeName"),
            created=datetime.fromisoformat(metadata["creationTimestamp"]),
            terminal=phase in ("Succeeded", "Failed"),
            succeeded=phase == "Succeeded",
            started_at=moment(started),
            finished_at=moment(ended.get("finishedAt")),
            exit_code=ended.get("exitCode"),
            reason=str(ended.get("reason") or status.get("reason") or ""),
            message=str(ended.get("message") or status.get("message") or ""),
            waiting=_waiting(status, state),
        ),
    )


def _failed_before(status: Raw) -> Raw:
    """Return the end of a container that was to prepare the pod and has failed, so that no other one starts."""
    states = (c.get("state") or {} for c in status.get("initContainerStatuses") or ())
    ends: list[Raw] = [state.get("terminated") or {} for state in states]
    return next((end for end in ends if end.get("exitCode")), {})


def _waiting(status: Raw, state: Raw) -> str:
    """Say why a container has not started, in the kubelet's or the scheduler's words."""
    waiting = state.get("waiting") or {}
    if waiting:
        return f"{waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip()[:500]
    scheduled: Raw = next((c for c in status.get("conditions") or () if c.get("type") == "PodScheduled"), {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'unscheduled')} {scheduled.get('message', '')}".strip()[:500]
    return ""


def pinned_node(pod_spec: Raw) -> str | None:
    """Return the node that a pod is tied to by our node affinity, or None."""
    required = ((pod_spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    for term in required.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            if field.get("key") == "metadata.name" and len(field.get("values") or ()) == 1:
                return str(field["values"][0])
    return None


@dataclass(frozen=True, slots=True)
class BatchJobEntry:
    """A Job of ours."""

    namespace: str
    uid: str
    offer_uid: str
    training_job: str
    policy: str | None
    lane: str | None
    node: str | None
    requests: dict[str, int]
    once: bool
    """Whether it makes no other pod after its first one, however that ends."""
    step: StepName | None
    """The step around the training that it is of; None for an attempt."""
    view: JobView


def batch_job_entry(raw: Raw) -> BatchJobEntry:
    """Reduce a batch/v1 Job."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels = metadata.get("labels") or {}
    true = {c.get("type") for c in status.get("conditions") or () if c.get("status") == "True"}
    template = (spec.get("template") or {}).get("spec") or {}
    return BatchJobEntry(
        namespace=metadata.get("namespace", ""),
        uid=metadata["uid"],
        offer_uid=labels.get(OFFER_UID_LABEL, ""),
        training_job=labels.get(JOB_LABEL, ""),
        policy=labels.get(POLICY_LABEL),
        lane=labels.get(LANE_LABEL),
        node=pinned_node(template),
        requests=requested(template),
        step=_AROUND.get(labels.get(STEP_LABEL, "")),
        once=spec.get("completions") == 1 and spec.get("backoffLimit") == 0 and not spec.get("podFailurePolicy"),
        view=JobView(
            metadata["name"],
            metadata["uid"],
            bool(spec.get("suspend")),
            bool(true & {"Complete", "Failed"}),
            "Complete" in true,
            moment(metadata.get("creationTimestamp")),
        ),
    )
