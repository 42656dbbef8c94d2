"""From API objects to what the table shows: pure functions over what the server returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One offer as it stands.

    Attributes:
        name: The offer's name.
        model: The last part of the base model's name.
        verdict: Admit, Wait, Reject, or "" while it is undecided.
        reason: The reason of the verdict.
        score: The score under the policy, "" without one.
        gpus: Booked GPUs, None without an admission.
        state: What its training does: "" (none), Pending, Running, Succeeded, Failed.
        waits_for: Why a pending container has not started.
        progress: Percent done.
        eta: Seconds still to go.
        loss: Training loss of the last report.
        loss_before: Held-out loss of the base model, once it is known.
        loss_after: Held-out loss with the adapter, once it is verified.
        message: Why it failed.
    """

    name: str
    model: str
    verdict: str = ""
    reason: str = ""
    score: str = ""
    gpus: int | None = None
    state: str = ""
    waits_for: str = ""
    progress: int | None = None
    eta: int | None = None
    loss: str = ""
    loss_before: str = ""
    loss_after: str = ""
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the offer."""
        return self.verdict == "Reject" or self.state in ("Succeeded", "Failed")


def rows_of(offers: Iterable[Object], jobs: Iterable[Object], pods: Iterable[Object]) -> list[Row]:
    """Return a row for each offer, in the order of their task ids."""
    job_of = {job["spec"]["offerRef"]["uid"]: job for job in jobs}
    pods_of: dict[str, list[Object]] = {}
    for pod in pods:
        uid = (pod["metadata"].get("labels") or {}).get("taskoffer.dev/offer-uid")
        if uid is not None:
            pods_of.setdefault(uid, []).append(pod)
    ordered = sorted(offers, key=lambda offer: str(offer["spec"]["taskID"]))
    return [_row(offer, job_of.get(_uid(offer)), pods_of.get(_uid(offer), [])) for offer in ordered]


def condition(obj: Object, kind: str) -> Object | None:
    """Return a condition of an object by its type."""
    for item in (obj.get("status") or {}).get("conditions") or ():
        if item["type"] == kind:
            found: Object = item
            return found
    return None


def _uid(obj: Object) -> str:
    return str(obj["metadata"]["uid"])


def _row(offer: Object, job: Object | None, pods: list[Object]) -> Row:
    status = offer.get("status") or {}
    admitted, finished = condition(offer, "Admitted"), condition(offer, "Finished")
    verdict = ""
    if admitted is not None:
        refused = finished is not None and finished["reason"] == "Rejected"
        verdict = "Admit" if admitted["status"] == "True" else "Reject" if refused else "Wait"
    assignments = (status.get("admission") or {}).get("assignments") or ()
    state, message = _state(job, finished)
    report = ((job or {}).get("status") or {}).get("trainerStatus") or {}
    metrics = {metric["name"]: str(metric["value"]) for metric in report.get("metrics") or ()}
    result = ((job or {}).get("status") or {}).get("result") or {}
    return Row(
        name=str(offer["metadata"]["name"]),
        model=str(offer["spec"]["model"]["name"]).rpartition("/")[2],
        verdict=verdict,
        reason=str(admitted["reason"]) if admitted else "",
        score=str(status.get("score") or ""),
        gpus=sum(int(item["count"]) for item in assignments) or None,
        state=state,
        waits_for=_waits_for(pods) if state == "Pending" else "",
        progress=report.get("progressPercentage"),
        eta=report.get("estimatedRemainingSeconds"),
        loss=metrics.get("loss", ""),
        loss_before=str(result.get("evalLossBefore") or metrics.get("eval_loss_before", "")),
        loss_after=str(result.get("evalLossAfter") or ""),
        message=message,
    )


def _state(job: Object | None, finished: Object | None) -> tuple[str, str]:
    """Return where the training is, and the message of its failure."""
    if finished is not None and finished["reason"] in ("Failed", "Cancelled"):
        return "Failed", str(finished.get("message", ""))
    if job is None:
        return "", ""
    for kind, state in (("Complete", "Succeeded"), ("Failed", "Failed")):
        found = condition(job, kind)
        if found is not None and found["status"] == "True":
            return state, str(found.get("message", "")) if state == "Failed" else ""
    running = condition(job, "Running")
    return ("Running" if running is not None and running["status"] == "True" else "Pending"), ""


def _waits_for(pods: list[Object]) -> str:
    for pod in pods:
        for status in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = (status.get("state") or {}).get("waiting")
            if waiting:
                return str(waiting.get("reason", ""))
    return ""
