"""The objects of an attempt: its ConfigMap, ResourceClaim and Job are created, stopped and removed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taskoffer.adapters.events import Subject
from taskoffer.adapters.kube import (
    BATCH_JOBS,
    CONFIG_MAPS,
    RESOURCE_CLAIMS,
    ApiError,
    ConflictError,
    NotFoundError,
    Object,
    Resource,
    UnknownOutcomeError,
)
from taskoffer.adapters.metrics import WRITE_RETRIES
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import API_VERSION
from taskoffer.api.v1alpha1.trainingjob import TrainingJob, TrainingJobStatus
from taskoffer.decision.attempts import needs_devices
from taskoffer.decision.job_facts import Action, DeleteJob, EnsureAttempt, EnsureStep, SuspendJob
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.naming import step_name
from taskoffer.reconcile.cache import Store
from taskoffer.reconcile.leftovers import job_is_there
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import TrainingJobEntry
from taskoffer.render.job import attempt_job, config_map, resource_claim
from taskoffer.render.steps import step_config_map, step_job


class NameTakenError(Exception):
    """An object of the wanted name belongs to somebody else."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An attempt's Job does not exist, because the API server has refused one of its objects."""

    job_name: str
    message: str


async def carry_out(session: Session, entry: TrainingJobEntry, job: TrainingJob, action: Action) -> Refused | None:
    """Do one thing about an attempt; return what the API server has said against it, if it has.

    Raises:
        LeadershipLostError: when this replica may not write.
        NameTakenError: when an object of the wanted name belongs to somebody else.
        ApiError, ThrottledError, UnknownOutcomeError: as :meth:`Kube.request`.
    """
    session.lease.check()
    namespace = entry.key.namespace
    if isinstance(action, EnsureAttempt):
        # Who has a status had this Job already; with it the TrainingJob may be gone, and nothing has told it.
        if action.number == 1 and job.status.conditions and not await job_is_there(session, entry):
            return None
        attempt, number = action.attempt, action.number
        # A trainer that the offer has brought is told everything by its arguments.
        config = config_map(job, attempt, number) if job.spec.run.trainer is None else None
        objects = (
            (None, CONFIG_MAPS, config),
            (session.world.devices.claims, RESOURCE_CLAIMS, resource_claim(job, attempt, number)),
            (session.world.batch_jobs, BATCH_JOBS, attempt_job(job, attempt, number, action.seconds)),
        )
        return await _ensure(session, entry, attempt.job_name, objects)
    if isinstance(action, EnsureStep):
        steps = (
            (None, CONFIG_MAPS, step_config_map(job, action)),
            (session.world.batch_jobs, BATCH_JOBS, step_job(job, action)),
        )
        return await _ensure(session, entry, step_name(entry.key.name, action.name, action.repeats), steps)
    try:
        if isinstance(action, SuspendJob):
            made = await session.kube.patch(BATCH_JOBS, namespace, action.name, {"spec": {"suspend": True}})
            session.world.batch_jobs.observe("MODIFIED", made)
        elif isinstance(action, DeleteJob):
            await session.kube.delete(BATCH_JOBS, namespace, action.name, uid=action.uid)
    except NotFoundError:
        _forget(session, entry.key, action.name)
    return None


async def _ensure(
    session: Session,
    entry: TrainingJobEntry,
    job_name: str,
    objects: Sequence[tuple[Store[Any] | None, Resource, Object | None]],
) -> Refused | None:
    """Create the objects of a Job. One of the name that is there is accepted only from the same owner."""
    namespace = entry.key.namespace
    subject = Subject(API_VERSION, "TrainingJob", namespace, entry.key.name, entry.uid)
    for store, resource, manifest in objects:
        if manifest is None:
            continue
        what = f"{manifest['kind']} {namespace}/{manifest['metadata']['name']}"
        try:
            await session.create(store, resource, namespace, manifest)
        except ConflictError:
            found = await session.kube.get(resource, namespace, manifest["metadata"]["name"])
            if not owned_by(found, entry.uid):
                raise name_taken(session, subject, what) from None
            if store is not None:
                store.observe("ADDED", found)
        except NotFoundError:
            raise
        except ApiError as error:
            WRITE_RETRIES.labels("TrainingJob", "refused").inc()
            return Refused(job_name, f"the API server refuses {what}: {error.message}"[:900])
        except UnknownOutcomeError as error:
            # A webhook that is down answers 500, for ever. What is there after all is taken in by the next pass.
            if await _is_absent(session, resource, namespace, manifest["metadata"]["name"]):
                WRITE_RETRIES.labels("TrainingJob", "unknown").inc()
                return Refused(job_name, f"the API server does not take {what}: {error}"[:900])
            raise
    return None


async def give_devices_back(session: Session, entry: TrainingJobEntry, status: TrainingJobStatus) -> None:
    """Delete the ResourceClaims of attempts that are over. Kubernetes keeps each until its last pod has ended.

    Raises:
        LeadershipLostError: when this replica may not write.
        ApiError, ThrottledError, UnknownOutcomeError: as :meth:`Kube.request`.
    """
    claims = session.world.devices.claims
    for claim in list(session.world.devices.claims_of.get(entry.key, {}).values()):
        if claim.owner_uid != entry.uid or claim.deleting or needs_devices(status, claim.key.name):
            continue
        session.lease.check()
        try:
            await session.kube.delete(RESOURCE_CLAIMS, entry.key.namespace, claim.key.name, uid=claim.uid)
        except NotFoundError:
            claims.forget(claim.uid, 0)


async def _is_absent(session: Session, resource: Resource, namespace: str, name: str) -> bool:
    try:
        await session.kube.get(resource, namespace, name)
    except NotFoundError:
        return True
    return False


def name_taken(session: Session, subject: Subject, what: str) -> NameTakenError:
    """Say on the object that needs the name that somebody else has it, and return the error to raise."""
    message = f"{what} exists and belongs to another owner: remove it, or delete this offer"
    session.events.emit(subject, Reason.NAME_CONFLICT, message, warning=True)
    return NameTakenError(message)


def owned_by(raw: Object, uid: str) -> bool:
    """Tell whether the object's controller is the one with this UID."""
    return any(o.get("uid") == uid and o.get("controller") for o in raw["metadata"].get("ownerReferences") or ())


def _forget(session: Session, key: OfferKey, name: str) -> None:
    """Take in that a Job is gone whose deletion the watch has not told."""
    world = session.world
    for uid in [job.uid for job in world.batch_of.get(key, {}).values() if job.view.name == name]:
        world.batch_jobs.forget(uid, 0)
    session.want_job(key)
