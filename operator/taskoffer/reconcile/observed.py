"""What is observed about one TrainingJob: from the stores, and from its pod's log."""

from __future__ import annotations

import logging
from datetime import timedelta

from taskoffer.adapters.clock import utcnow
from taskoffer.adapters.kube import ApiError, Kube, ThrottledError, UnknownOutcomeError
from taskoffer.api.contract import ProgressReport
from taskoffer.api.v1alpha1.trainingjob import StepName, TrainingJob
from taskoffer.decision.conditions import is_true
from taskoffer.decision.job_facts import JobFacts, OfferFacts, StepView
from taskoffer.decision.keys import OfferKey
from taskoffer.reconcile.views import OfferEntry, TrainingJobEntry
from taskoffer.reconcile.world import World
from taskoffer.render.names import CONTAINER

logger = logging.getLogger(__name__)

_LOG_LINES = 12


def job_facts(
    world: World, entry: TrainingJobEntry, job: TrainingJob, report: ProgressReport | None, progress_interval: float
) -> JobFacts:
    """Gather what a pass over a TrainingJob is decided on; the interval is in seconds."""
    key = entry.key
    offer = world.offers.get(entry.offer_uid)
    return JobFacts(
        now=utcnow(),
        job=job,
        offer=_offer_facts(offer) if offer is not None else None,
        jobs={j.view.name: j.view for j in world.batch_of.get(key, {}).values() if j.step is None},
        pods=[p.view for p in world.pods_of.get(key, {}).values() if p.step is None],
        steps=_steps(world, key),
        nodes={n.name: n.health for n in world.nodes},
        report=report,
        moved_to=moved.assignments if (moved := world.moved.get(key)) else None,
        preemptor=world.preempting.get(key),
        progress_interval=timedelta(seconds=progress_interval),
        devices_withdrawn=world.devices.withdrawn(job.status.attempts[-1].assignments if job.status.attempts else ()),
    )


def _steps(world: World, key: OfferKey) -> dict[StepName, StepView]:
    """Return the newest Job of each step around a training, with its newest pod."""
    found: dict[StepName, StepView] = {}
    jobs = [job for job in world.batch_of.get(key, {}).values() if job.step is not None]
    for job in sorted(jobs, key=lambda job: (job.view.created is not None, job.view.created)):
        if job.step is not None:
            own = [pod.view for pod in world.pods_of.get(key, {}).values() if pod.job_uid == job.uid]
            found[job.step] = StepView(job.view, max(own, key=lambda pod: (pod.created, pod.name), default=None))
    return found


def _offer_facts(offer: OfferEntry) -> OfferFacts:
    # An offer that a finalizer keeps from being deleted counts as cancelled: its pods are to stop at once.
    active = offer.active and not offer.deleting
    return OfferFacts(active, offer.admission, offer.finished, offer.admission_problem or "")


def is_over(job: TrainingJob) -> bool:
    """Tell whether a TrainingJob has ended, well or not."""
    return is_true(job.status.conditions, "Complete") or is_true(job.status.conditions, "Failed")


def left_of(world: World, offer_uid: str) -> list[str]:
    """Name the Jobs and pods of an offer that have not ended."""
    jobs = [f"Job {j.view.name}" for j in world.batch_jobs if j.offer_uid == offer_uid and not j.view.finished]
    return jobs + [f"pod {p.view.name}" for p in world.pods if p.offer_uid == offer_uid and not p.view.terminal]


async def log_tail(kube: Kube, namespace: str, pod: str) -> str:
    """Return the last lines of a training container's log, or nothing when the kubelet does not give them."""
    try:
        return (await kube.log_tail(namespace, pod, CONTAINER, lines=_LOG_LINES)).strip()
    except (ApiError, ThrottledError, UnknownOutcomeError) as error:
        logger.info("log not read", extra={"pod": pod, "error": str(error)})
        return ""
