"""TrainingJobs that fetch and hand over, what is seen of their steps, and a pass over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builders import Object, claim, make_training_job, merged, stored
from core_builders import NOW, at
from taskoffer.api.base import rfc3339
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.api.v1alpha1.trainingjob import StepName, TrainingJob
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.job_facts import JobFacts, JobPlan, JobView, NodeHealth, OfferFacts, PodView, Refusal, StepView
from taskoffer.decision.lifecycle import step

NAME = "offer-0123abcd"
STEPS: Object = {
    "cache": {"claimName": "cache", "sizeLimit": "500Gi"},
    "workspace": {"claimName": "work", "path": "runs"},
    "hubToken": {"name": "hub", "key": "token"},
    "s3Credentials": {"name": "s3", "key": "credentials"},
    "hubEndpoint": "https://hub.test",
    "itemSizeLimit": "200Gi",
    "cpu": "2",
    "memory": "4Gi",
}
HUB_DATA: Object = {"source": {"persistentVolumeClaim": None, "hub": {"name": "acme/rows", "split": "train"}}}
FETCHED: Object = {"model": {"source": None}, "dataset": HUB_DATA}
SUBMITTED: Object = {"output": {"persistentVolumeClaim": None, "repository": "acme/expected-name"}}


def job(run: Mapping[str, Any], **status: Any) -> TrainingJob:
    on_claims: Object = {"model": {"source": claim("models")}, "dataset": {"source": claim("data")}}
    base: Object = {"steps": STEPS, "output": claim("outputs"), **on_claims}
    wire = make_training_job(name=NAME, spec={"run": merged(base, run)}, status=status)
    return TrainingJob.model_validate(stored(_without_none(wire), uid="tj-uid"))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def admitted(deadline: float | None = 3600, *, active: bool = True) -> OfferFacts:
    place = {"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}
    admission: Object = {
        "policyRef": {"name": "lab", "uid": "lab-uid", "generation": 1},
        "jobName": NAME,
        "decidedAt": rfc3339(NOW),
        "assignments": [place],
    }
    if deadline is not None:
        admission["deadline"] = rfc3339(at(deadline))
    return OfferFacts(active=active, admission=Admission.model_validate(admission), finished=False)


def made_by(
    name: str, *, ended: bool | None = None, message: str = "", code: int | None = None, reason: str = ""
) -> StepView:
    """The Job of a step: running, or ended well (True) or badly (False), with its newest pod."""
    view = JobView(f"{NAME}-{name}", f"{name}-uid", False, ended is not None, bool(ended), NOW)
    pod = PodView(
        f"{NAME}-{name}-pod",
        "pod-uid",
        view.name,
        "node-a",
        NOW,
        ended is not None,
        bool(ended),
        started_at=at(5),
        exit_code=code,
        message=message,
        reason=reason,
    )
    return StepView(view, pod)


def look(
    made: TrainingJob,
    steps: Mapping[StepName, StepView] | None = None,
    *,
    after: float = 10,
    offer: OfferFacts | None = None,
    pods: tuple[PodView, ...] = (),
    refusal: Refusal | None = None,
) -> JobPlan:
    return step(
        JobFacts(
            now=at(after),
            job=made,
            offer=offer or admitted(),
            jobs={},
            pods=pods,
            nodes={"node-a": NodeHealth(True, NOW)},
            steps=steps or {},
            log_tail="",
            refusal=refusal,
        )
    )


def told(plan: JobPlan, kind: str = "Running") -> tuple[str, str]:
    assert plan.status is not None
    found = condition_of(plan.status.conditions, kind)
    assert found is not None, plan.status.conditions
    return found.reason, found.message


def states(plan: JobPlan) -> dict[str, str]:
    assert plan.status is not None
    return {one.name.value: one.state for one in plan.status.steps}


def trained(run: Mapping[str, Any]) -> TrainingJob:
    """A job whose training has succeeded, and whose model and data were fetched before."""
    attempt = {
        "jobName": f"{NAME}-1",
        "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}],
        "createdAt": rfc3339(NOW),
        "startedAt": rfc3339(at(20)),
        "finishedAt": rfc3339(at(60)),
        "deadline": rfc3339(at(3600)),
        "outcome": "Succeeded",
        "exitCode": 0,
    }
    result = {"evalLossBefore": "3.5", "evalLossAfter": "2.25", "adapterPath": "/x", "sha256": "0" * 64}
    fetched = {"name": "Prepare", "state": "Succeeded"}
    return job(run, attempts=[attempt], result=result, steps=[fetched])
