"""What no watch may ever tell: offers that are gone, and Jobs that nobody is responsible for any more.

A watch that was away for too long tells no deletions, and the next full list can be minutes away. Until then the cache
holds offers that do not exist; what is created for them is removed by the garbage collector, again and again.
"""

from __future__ import annotations

import contextlib
import logging

from taskoffer.adapters.kube import (
    BATCH_JOBS,
    JOBS_OF_TRAINING,
    OFFERS,
    ApiError,
    NotFoundError,
    Object,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.decision.keys import OfferKey
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import TrainingJobEntry

logger = logging.getLogger(__name__)


async def offer_is_there(session: Session, key: OfferKey, uid: str) -> bool:
    """Ask the server whether an offer is there, and take in what it says.

    Raises:
        ApiError, ThrottledError, UnknownOutcomeError: when it does not say.
    """
    raw: Object | None = None
    with contextlib.suppress(NotFoundError):
        raw = await session.kube.get(OFFERS, key.namespace, key.name)
    there, known = raw is not None and raw["metadata"]["uid"] == uid, session.world.offers.get(uid)
    if not there and known is not None:
        session.world.offers.forget(uid, int(known.version))
        session.cycle_wanted.set()
    if raw is not None:
        session.world.offers.observe("MODIFIED", raw)
    return there


async def job_is_there(session: Session, entry: TrainingJobEntry) -> bool:
    """Ask the server whether a TrainingJob is there, and take in what it says.

    Raises:
        ApiError, ThrottledError, UnknownOutcomeError: when it does not say.
    """
    raw: Object | None = None
    with contextlib.suppress(NotFoundError):
        raw = await session.kube.get(JOBS_OF_TRAINING, entry.key.namespace, entry.key.name)
    there = raw is not None and raw["metadata"]["uid"] == entry.uid
    if not there:
        session.world.jobs.forget(entry.uid, int(entry.version))
        session.want_job(entry.key)
    if raw is not None:
        session.world.jobs.observe("MODIFIED", raw)
    return there


async def read_job_again(session: Session, key: OfferKey) -> None:
    """Read a TrainingJob anew after a conflict, so that the next pass does not decide on the same old version."""
    entry = session.world.jobs_by_key.get(key)
    try:
        if entry is not None:
            await job_is_there(session, entry)
        else:
            raw = await session.kube.get(JOBS_OF_TRAINING, key.namespace, key.name)
            session.world.jobs.observe("MODIFIED", raw)
    except NotFoundError:
        pass
    except (ApiError, ThrottledError, UnknownOutcomeError) as error:
        logger.warning("job not read", extra={"job": str(key), "error": str(error)})


async def stop_strays(session: Session, key: OfferKey) -> None:
    """Delete the unfinished Jobs of a TrainingJob that is gone and whose offer needs none any more.

    Where the garbage collector is responsible it has done so, or will. It is not after ``--cascade=orphan``.

    Raises:
        ApiError, ThrottledError, UnknownOutcomeError: as :meth:`Kube.request`.
        LeadershipLostError: when this replica may not write.
    """
    strays = [job for job in session.world.batch_of.get(key, {}).values() if not job.view.finished]
    if not strays:
        return
    try:
        raw = await session.kube.get(JOBS_OF_TRAINING, key.namespace, key.name)
    except NotFoundError:
        pass
    else:
        session.world.jobs.observe("ADDED", raw)
        session.want_job(key)
        return
    for job in strays:
        session.lease.check()
        try:
            await session.kube.delete(BATCH_JOBS, key.namespace, job.view.name, uid=job.uid)
        except NotFoundError:
            session.world.batch_jobs.forget(job.uid, 0)
        else:
            logger.warning("Job without a TrainingJob removed", extra={"job": f"{key.namespace}/{job.view.name}"})
