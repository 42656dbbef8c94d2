"""Pods that may never say that they have ended, because their node is away: a job that stops does not wait for them.

They stay charged to that node for as long as they are there, whatever becomes of the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from taskoffer.api.v1alpha1.trainingjob import Attempt, AttemptOutcome
from taskoffer.decision.job_facts import JobFacts, PodView
from taskoffer.decision.moments import later


def awaited_pods(facts: JobFacts, attempts: Sequence[Attempt]) -> tuple[datetime | None, ...]:
    """Return for each pod that a stopping job waits for from when on it counts as lost, where that is known."""
    found = (_lost_at(pod, facts, attempts) for pod in facts.pods if not pod.terminal)
    return tuple(lost for lost in found if lost is None or lost > facts.now)


def _lost_at(pod: PodView, facts: JobFacts, attempts: Sequence[Attempt]) -> datetime | None:
    """Return from when on a pod counts as lost; None while its node is Ready, or nobody knows since when it is not.

    A pod of an attempt that was given up with its node is lost already. Pods of a node that is gone are removed by
    Kubernetes itself.
    """
    health = facts.nodes.get(pod.node) if pod.node is not None else None
    if pod.node is None or (health is not None and health.ready):
        return None
    if any(one.job_name == pod.job_name and one.outcome is AttemptOutcome.NODE_LOST for one in attempts):
        return facts.now
    if health is None or health.since is None:
        return None
    return later(health.since, facts.job.spec.run.limits.node_lost_seconds)
