"""What stored objects claim of the nodes' GPUs. It changes with them, not with every cycle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.ledger import Claim, Source
from taskoffer.reconcile.pod_views import BatchJobEntry, PodEntry


class Charges:
    """The claims of offers, Jobs and pods on one resource, by source and UID."""

    def __init__(self) -> None:
        self.resource = ""
        self._claims: dict[tuple[Source, str], tuple[Claim, ...]] = {}
        self._spent: dict[str, set[str]] = defaultdict(set)

    def __iter__(self) -> Iterator[Claim]:
        for claims in self._claims.values():
            yield from claims

    def count(self, resource: str, jobs: Iterable[BatchJobEntry], pods: Iterable[PodEntry]) -> None:
        """Count another resource from now on."""
        self.resource = resource
        for job in jobs:
            self.job(job)
        for pod in pods:
            self.pod(pod)

    def offer(self, uid: str, assignments: Iterable[Assignment], policy: str | None, namespace: str) -> None:
        """Take in where an admitted offer's booking is now."""
        made = (claim_of(uid, part, "admission", policy, namespace) for part in assignments)
        self._claims["admission", uid] = tuple(made)

    def job(self, job: BatchJobEntry) -> None:
        """Take in a Job: it claims its GPUs as long as it may make a pod."""
        count = job.requests.get(self.resource, 0)
        over = job.view.finished or job.view.suspended or (job.once and job.uid in self._spent)
        if count and job.node is not None and not over:
            made = Claim(job.offer_uid, job.node, count, "job", job.policy, job.lane, job.namespace)
            self._claims["job", job.uid] = (made,)
        else:
            self.drop("job", job.uid)

    def pod(self, pod: PodEntry) -> None:
        """Take in a pod: it claims its GPUs until it has ended."""
        count = pod.requests.get(self.resource, 0)
        if count and pod.node is not None and not pod.view.terminal:
            holder = pod.offer_uid or f"pod:{pod.uid}"
            made = Claim(holder, pod.node, count, "pod", pod.policy, pod.lane, pod.namespace)
            self._claims["pod", pod.uid] = (made,)
        else:
            self.drop("pod", pod.uid)

    def drop(self, source: Source, uid: str) -> None:
        """Take in that an object claims nothing any more."""
        self._claims.pop((source, uid), None)

    def spend(self, before: PodEntry | None, after: PodEntry | None) -> tuple[str, ...]:
        """Note which Jobs have had their pod, and return the UIDs of those for which that has changed.

        A Job that makes one pod only is over with it, and says so itself a second or more later.
        """
        was = before.job_uid if before is not None and before.view.terminal else None
        now = after.job_uid if after is not None and after.view.terminal else None
        if was == now:
            return ()
        if before is not None and was is not None:
            self._spent[was].discard(before.uid)
            if not self._spent[was]:
                del self._spent[was]
        if after is not None and now is not None:
            self._spent[now].add(after.uid)
        return tuple(uid for uid in (was, now) if uid is not None)


def claim_of(
    holder: str, assignment: Assignment, source: Source, policy: str | None, namespace: str | None = None
) -> Claim:
    """Return the claim of an assignment."""
    keys = assignment.device_keys
    return Claim(holder, assignment.node_name, assignment.count, source, policy, assignment.lane, namespace, keys)
