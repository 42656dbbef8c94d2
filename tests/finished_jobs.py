"""TrainingJobs that have ended, in wire form, for tests of what is learned from them.

finished("a", success=False, reason="AttemptsExhausted", exit_code=137)
finished("b", training=1250, predicted=1000)
"""

from __future__ import annotations

from typing import Any

from builders import Object, make_condition, make_training_job, merged, stored
from core_builders import at
from taskoffer.api.base import rfc3339
from taskoffer.api.v1alpha1.trainingjob import TrainingJob


def finished(
    name: str = "done",
    *,
    success: bool = True,
    reason: str = "",
    outcome: str = "",
    exit_code: int | None = None,
    ended: float = 0,
    training: int | None = None,
    share: str = "1",
    predicted: int | None = None,
    peak: int | None = None,
    predicted_peak: int | None = None,
    family: str | None = "Llama",
    size: str | None = "Small",
    policy: str = "lab",
    **run: Any,
) -> Object:
    """Return a TrainingJob that ended so many seconds after NOW, with what was measured and predicted."""
    last = {
        "jobName": f"{name}-1",
        "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1}],
        "createdAt": rfc3339(at(-100)),
        "startedAt": rfc3339(at(-90)),
        "finishedAt": rfc3339(at(ended)),
        "outcome": outcome or ("Succeeded" if success else "Failed"),
        "exitCode": exit_code if exit_code is not None else int(not success),
    }
    kind, reason = ("Complete", reason or "Succeeded") if success else ("Failed", reason or "Failed")
    ending = make_condition(kind, True, reason, at=rfc3339(at(ended)))
    measured = {"trainingSeconds": training, "trainedShare": share, "peakMemoryBytes": peak}
    formula = {"trainingSeconds": predicted, "peakMemoryBytes": predicted_peak}
    fields = {
        "family": family,
        "sizeClass": size,
        "predicted": _given(formula),
        "policyRef": {"name": policy, "uid": f"{policy}-uid", "generation": 1},
        **run,
    }
    made = make_training_job(
        name=name,
        offer=name,
        offer_uid=f"{name}-offer",
        spec={"run": _given(fields)},
        status={"attempts": [last], "conditions": [ending], "measured": _given(measured)},
    )
    return stored(made, uid=f"{name}-uid")


def job(wire: Object | None = None, *, status: Object | None = None, **fields: Any) -> TrainingJob:
    """Return the TrainingJob itself; ``status`` replaces parts of its status."""
    made = wire or finished(**fields)
    return TrainingJob.model_validate(merged(made, {"status": status or {}}))


def _given(fields: Object) -> Object:
    return {name: value for name, value in fields.items() if value is not None}
