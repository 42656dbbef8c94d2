"""Following the offers until nothing more happens to them, and remembering what was seen on the way."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from taskoffer_lab.api_client import ApiClient, ApiError
from taskoffer_lab.demo.rows import Row, rows_of
from taskoffer_lab.demo.script import NAMESPACE
from taskoffer_lab.errors import LabError

END_SECONDS = 900.0
"""How long all trainings together may take. On 2 idle cores it is 2 to 3 minutes."""

POLL_SECONDS = 0.5
SILENT_SECONDS = 60.0
"""How long the API server may not answer: on a machine whose cores and disk are taken, some calls time out."""
_GROUP = f"/apis/taskoffer.dev/v1alpha1/namespaces/{NAMESPACE}"
_PATHS = (f"{_GROUP}/taskoffers", f"{_GROUP}/trainingjobs", f"/api/v1/namespaces/{NAMESPACE}/pods")


@dataclass
class Seen:
    """What was observed of the offers.

    Attributes:
        answers: Offer → its (verdict, reason) in the order in which they were seen, without repetition.
        gpus: Offer → the GPUs that its running pod had.
        first_adapter: Seconds from the start of following to the first verified adapter.
        ended: The rows as they stood last.
    """

    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    gpus: dict[str, int] = field(default_factory=dict)
    first_adapter: float | None = None
    ended: list[Row] = field(default_factory=list)

    def take(self, rows: Sequence[Row], running: Mapping[str, int], elapsed: float) -> None:
        """Take in one look at the offers."""
        for row in rows:
            answers = self.answers.setdefault(row.name, [])
            answer = (row.verdict, row.reason)
            if row.verdict and (not answers or answers[-1] != answer):
                answers.append(answer)
            if self.first_adapter is None and row.state == "Succeeded":
                self.first_adapter = elapsed
        self.gpus.update(running)
        self.ended = list(rows)

    def waited(self, reason: str) -> list[str]:
        """Return the offers that were seen waiting for `reason` and admitted later."""
        found = []
        for name, answers in self.answers.items():
            if ("Wait", reason) in answers and any(
                verdict == "Admit" for verdict, _ in answers[answers.index(("Wait", reason)) :]
            ):
                found.append(name)
        return found


def follow(
    api: ApiClient,
    names: Sequence[str],
    show: Callable[[Sequence[Row]], None],
    *,
    seconds: float = END_SECONDS,
    poll: float = POLL_SECONDS,
    silent: float = SILENT_SECONDS,
) -> Seen:
    """Look at the offers until all have ended.

    Raises:
        LabError: They have not ended in time, and it names those and what they wait for; or the API server has not
            answered for `silent` seconds.
    """
    seen = Seen()
    started = answered = time.monotonic()
    while True:
        try:
            offers, jobs, pods = (api.request("GET", path)["items"] for path in _PATHS)
        except (OSError, ApiError) as error:
            if time.monotonic() - answered > silent:
                raise LabError(f"the API server has not answered for {silent:.0f} s: {error}") from error
            time.sleep(poll)
            continue
        answered = time.monotonic()
        rows = rows_of(offers, jobs, pods)
        seen.take(rows, _running(offers, pods), time.monotonic() - started)
        show(rows)
        open_rows = [row for row in rows if not row.ended]
        if len(rows) >= len(names) and not open_rows:
            return seen
        if time.monotonic() - started > seconds:
            left = "; ".join(f"{row.name}: {row.reason} {row.state} {row.waits_for}".strip() for row in open_rows)
            raise LabError(f"not all offers have ended after {seconds:.0f} s: {left or 'some are missing'}")
        time.sleep(poll)


def _running(offers: Sequence[Mapping[str, Any]], pods: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the GPUs that the kubelet's running pods hold, by offer."""
    names = {offer["metadata"]["uid"]: str(offer["metadata"]["name"]) for offer in offers}
    found: dict[str, int] = {}
    for pod in pods:
        uid = (pod["metadata"].get("labels") or {}).get("taskoffer.dev/offer-uid")
        if uid in names and (pod.get("status") or {}).get("phase") == "Running":
            limits = [container["resources"].get("limits") or {} for container in pod["spec"]["containers"]]
            found[names[uid]] = sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)
    return found
