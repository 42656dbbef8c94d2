"""TrainingJobs: derive them from admissions, look at each whenever something about it changes, apply the next step.

Level-triggered: a pass looks at everything anew. A few workers take keys from a queue; one key is looked at by one
worker at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime

from taskoffer.adapters.clock import utcnow
from taskoffer.adapters.events import Subject
from taskoffer.adapters.kube import (
    JOBS_OF_TRAINING,
    OFFERS,
    ApiError,
    ConflictError,
    NotFoundError,
    Object,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.adapters.lease import LeadershipLostError
from taskoffer.adapters.metrics import PREEMPTIONS, WRITE_RETRIES
from taskoffer.api.contract import ProgressReport
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import API_VERSION
from taskoffer.api.v1alpha1.trainingjob import Preemptor
from taskoffer.decision.attempts import needs_no_place
from taskoffer.decision.job_facts import (
    Action,
    EnsureAttempt,
    EnsureStep,
    JobFacts,
    JobPlan,
    OfferEnd,
    Refusal,
)
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.lifecycle import step
from taskoffer.decision.moves import Move
from taskoffer.decision.preemption import Eviction
from taskoffer.reconcile.attempts import NameTakenError, carry_out, give_devices_back, name_taken, owned_by
from taskoffer.reconcile.leftovers import offer_is_there, read_job_again, stop_strays
from taskoffer.reconcile.observed import is_over, job_facts, left_of, log_tail
from taskoffer.reconcile.outcomes import observe_errors
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import OfferEntry, TrainingJobEntry
from taskoffer.render.offers import end_patch
from taskoffer.render.patch import merge_patch
from taskoffer.render.trainingjob import training_job

logger = logging.getLogger(__name__)

Revoke = Callable[[OfferEntry, Reason, str], Awaitable[bool]]

_IMPATIENT_WORKERS = 1
"""Workers that go on in a burst of answers; one starts several jobs a second. The others would take the API server's
time from the answers."""


class Jobs:
    """The TrainingJob loop of a leading replica."""

    def __init__(self, session: Session, *, workers: int = 6) -> None:
        self._session = session
        self._workers = workers
        self._timers: dict[OfferKey, asyncio.TimerHandle] = {}
        self.busy: set[OfferKey] = set()
        self.reports: dict[OfferKey, ProgressReport] = {}
        self.revoke: Revoke | None = None
        self._reported: dict[OfferKey, str] = {}
        """Versions of the objects behind a key that cannot be handled and were spoken of."""
        self._sent: dict[OfferKey, Object] = {}
        """TrainingJobs whose create had an unknown outcome."""
        self._refusals: dict[OfferKey, Refusal] = {}

    async def run(self) -> None:
        """Work for ever."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(patient=number >= _IMPATIENT_WORKERS))

    def want_all(self) -> None:
        """Have every admitted offer and every TrainingJob looked at: after a start and at each resync."""
        world = self._session.world
        for key in (*world.holding_by_job, *world.jobs_by_key, *world.batch_of):
            self._session.want_job(key)

    def take_move(self, move: Move) -> None:
        """Take in the place that the cycle found for a job's next attempt."""
        self._session.world.moves.pop(move.key, None)
        self._session.world.moved[move.key] = move
        self._session.want_job(move.key)

    def take_eviction(self, eviction: Eviction, now: datetime) -> None:
        """Take in that the cycle wants a running job to stop for an offer."""
        offer = eviction.preemptor
        self._session.world.preempting[eviction.key] = Preemptor(
            namespace=offer.namespace, name=offer.name, uid=eviction.preemptor_uid, asked_at=now
        )
        self._session.want_job(eviction.key)

    async def exists(self, key: OfferKey, offer_uid: str) -> bool:
        """Tell whether anything came of an admission: ask the server, not the cache."""
        try:
            await self._session.kube.get(JOBS_OF_TRAINING, key.namespace, key.name)
        except NotFoundError:
            pass
        except (ApiError, ThrottledError, UnknownOutcomeError):
            return True
        else:
            return True
        return bool(left_of(self._session.world, offer_uid))

    async def _work(self, *, patient: bool) -> None:
        session = self._session
        while True:
            if patient:
                await session.calm.wait()
            key = await session.jobs_wanted.get()
            session.jobs_queued.discard(key)
            if session.draining:
                continue
            if patient and not session.calm.is_set():
                session.want_job(key)
                continue
            if key in self.busy:
                self._later(key, 0.02)
                continue
            self.busy.add(key)
            try:
                await self._pass(key)
            except LeadershipLostError:
                raise
            except ThrottledError as error:
                WRITE_RETRIES.labels("TrainingJob", "throttled").inc()
                self._later(key, error.retry_after)
            except (ConflictError, NotFoundError) as error:
                WRITE_RETRIES.labels("TrainingJob", "overtaken").inc()
                logger.info("job pass overtaken", extra={"job": str(key), "error": str(error)})
                await read_job_again(session, key)
                self._later(key, 0.05)
            except (ApiError, UnknownOutcomeError) as error:
                WRITE_RETRIES.labels("TrainingJob", "refused" if isinstance(error, ApiError) else "unknown").inc()
                logger.warning("job pass failed", extra={"job": str(key), "error": str(error)})
                # What the server finds invalid it finds invalid again.
                self._later(key, 60.0 if isinstance(error, ApiError) and error.status == 422 else 2.0)
            except NameTakenError as error:
                logger.error("name is taken", extra={"job": str(key), "error": str(error)})
                self._later(key, 60.0)
            except Exception:
                # Something stored, or something that a pod said, cannot be handled. The other jobs go on.
                logger.exception("job cannot be handled", extra={"job": str(key)})
                self._later(key, 60.0)
            finally:
                self.busy.discard(key)

    def _later(self, key: OfferKey, seconds: float) -> None:
        pending = self._timers.get(key)
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        if pending is not None and pending.when() <= when:
            return
        if pending is not None:
            pending.cancel()
        self._timers[key] = loop.call_at(when, self._ring, key)

    def _ring(self, key: OfferKey) -> None:
        self._timers.pop(key, None)
        self._session.want_job(key)

    # One pass

    async def _pass(self, key: OfferKey) -> None:
        world = self._session.world
        entry = world.jobs_by_key.get(key)
        if entry is None:
            self._refusals.pop(key, None)
            await self._derive(key)
            return
        offer = world.holding_by_job.get(key)
        if offer is not None and not offer.deleting and offer.uid != entry.offer_uid:
            raise name_taken(self._session, _offer_subject(offer), f"TrainingJob {key}")
        if entry.job is None:
            self._report_invalid(entry)
            return
        facts = job_facts(
            self._session.world, entry, entry.job, self.reports.get(key), self._session.settings.progress_interval
        )
        if is_over(entry.job):
            self._refusals.pop(key, None)
        facts = replace(facts, refusal=self._refusals.get(key))
        if facts.offer is None and not is_over(entry.job):
            # A cache that lacks it is not enough to stop a training.
            wanted = entry.job.spec.offer_ref
            if await offer_is_there(self._session, OfferKey(key.namespace, wanted.name), wanted.uid):
                return
        made = step(facts)
        if made.failed_pod is not None:
            tail = await log_tail(self._session.kube, key.namespace, made.failed_pod)
            facts = replace(facts, log_tail=tail)
            made = step(facts)
        await self._apply(key, entry, made, facts)

    def _report_invalid(self, entry: TrainingJobEntry) -> None:
        """Say once per version that a stored TrainingJob cannot be read. Its offer's GPUs stay booked meanwhile."""
        if self._reported.get(entry.key) == entry.version:
            return
        self._reported[entry.key] = entry.version
        logger.error("stored TrainingJob is not valid", extra={"job": str(entry.key), "error": entry.problem})
        message = f"the stored TrainingJob is not valid: {entry.problem}; mend it, or delete its offer to free the GPUs"
        subjects = [Subject(API_VERSION, "TrainingJob", entry.key.namespace, entry.key.name, entry.uid)]
        offer = self._session.world.holding_by_job.get(entry.key)
        if offer is not None:
            subjects.append(_offer_subject(offer))
        for subject in subjects:
            self._session.events.emit(subject, Reason.INVALID_JOB, message, warning=True)

    async def _derive(self, key: OfferKey) -> None:
        """Create the TrainingJob of an admission, or take the admission back when its policy has moved on."""
        session = self._session
        offer = session.world.holding_by_job.get(key)
        if offer is not None and offer.uid not in session.world.decided_here:
            await offer_is_there(session, offer.key, offer.uid)
            offer = session.world.holding_by_job.get(key)
        sent = self._sent.pop(key, None)
        if offer is None or offer.deleting:
            await stop_strays(session, key)
            return
        manifest = sent if sent is not None and owned_by(sent, offer.uid) else await self._manifest(offer)
        if manifest is None:
            return
        try:
            await session.create(session.world.jobs, JOBS_OF_TRAINING, key.namespace, manifest)
        except UnknownOutcomeError:
            # It may be carried out at any time, so the same is sent again, whatever becomes of the policy.
            self._sent[key] = manifest
            raise
        except ConflictError:
            found = await session.kube.get(JOBS_OF_TRAINING, key.namespace, key.name)
            if not owned_by(found, offer.uid):
                raise name_taken(self._session, _offer_subject(offer), f"TrainingJob {key}") from None
            session.world.jobs.observe("ADDED", found)
        except NotFoundError:
            raise
        except ApiError as error:
            self._say_refused(offer, f"the API server refuses TrainingJob {key}: {error.message}")
            raise
        # Should it be deleted, the next one starts where the admission says; somebody else may be there by then.
        session.world.decided_here.discard(offer.uid)
        session.want_job(key)

    def _say_refused(self, offer: OfferEntry, message: str) -> None:
        """Say once per version of an offer why nothing comes of it. Its GPUs stay booked meanwhile."""
        if self._reported.get(offer.job_key) != offer.version:
            self._reported[offer.job_key] = offer.version
            self._session.events.emit(_offer_subject(offer), Reason.JOB_REFUSED, message[:900], warning=True)

    async def _manifest(self, offer: OfferEntry) -> Object | None:
        """Return the TrainingJob of an admission; None where the admission cannot stand and is taken back."""
        world = self._session.world
        if offer.admission is None:
            # Nobody can tell what was promised, so the offer is decided anew; until then its GPUs stay booked.
            message = f"the stored admission cannot be read: {offer.admission_problem}"
            await self._take_back(offer, Reason.INVALID_OFFER, message)
            return None
        ref = offer.admission.policy_ref
        policy = next((policy for policy in world.policy_versions() if policy.ref == ref), None)
        if policy is None and (world.batch_of.get(offer.job_key) or world.pods_of.get(offer.job_key)):
            # Something has come of the admission already, so that it stands; what is still open follows the policy.
            named = [found for found in world.policy_versions() if found.name == ref.name and found.spec is not None]
            policy = named[-1] if named else None
        if policy is None or policy.spec is None:
            await self._take_back(
                offer, Reason.POLICY_CHANGED, f"policy {ref.name} is no longer at generation {ref.generation}"
            )
            return None
        # The late write of a replica that led before may have booked what is booked since: no job comes of it.
        foreign = offer.uid not in world.decided_here
        if foreign and (overbooked := world.overbooked(offer.admission)) is not None:
            await self._take_back(offer, Reason.OVERBOOKED, overbooked)
            return None
        # The spec of an admitted offer cannot change, so what is kept of it is what was admitted.
        spec, invalid = offer.read_spec()
        if spec is None:
            # It holds GPUs that no job can use, so they are given back and the offer is answered as what it is.
            await self._take_back(offer, Reason.INVALID_OFFER, f"the stored offer is not valid: {invalid}")
            return None
        try:
            learned = world.outcomes.learned(policy.name)
            return training_job(offer.key, offer.uid, spec, offer.admission, policy.spec, learned)
        except ValueError as error:
            await self._take_back(offer, Reason.POLICY_CHANGED, f"the policy would not admit it: {error}")
            return None

    async def _take_back(self, offer: OfferEntry, reason: Reason, message: str) -> None:
        if self.revoke is not None and await self.revoke(offer, reason, message):
            return
        if offer.uid in self._session.world.held_back:
            return  # The server does not store it; the next resync asks for it again.
        left = left_of(self._session.world, offer.uid)
        self._later(offer.job_key, 10.0 if left else 2.0)
        if left and self._reported.get(offer.job_key) != offer.version:
            self._reported[offer.job_key] = offer.version
            message = f"{message}; not taken back while {', '.join(left[:3])} may use its GPUs: remove what is left"
            self._session.events.emit(_offer_subject(offer), reason, message, warning=True)

    async def _apply(self, key: OfferKey, entry: TrainingJobEntry, made: JobPlan, facts: JobFacts) -> None:
        session, status = self._session, made.status or facts.job.status
        for action in made.actions:
            await self._carry_out(entry, facts, action)
        if made.status is not None:
            patch: Object = {
                "metadata": {"resourceVersion": entry.version, "uid": entry.uid},
                "status": merge_patch(facts.job.status.to_wire(), made.status.to_wire()),
            }
            await session.write_status(session.world.jobs, JOBS_OF_TRAINING, key, patch)
            observe_errors(facts.job, made.status)
            session.cycle_wanted.set()
            session.want_job(key)
        if len(status.attempts) > len(facts.job.status.attempts) or needs_no_place(status):
            session.world.moves.pop(key, None)
            session.world.moved.pop(key, None)
        await give_devices_back(session, entry, status)
        if facts.preemptor is not None and session.world.preempting.get(key) == facts.preemptor:
            # Its status says so now; or it is not what it was when it was chosen, and the cycle has to choose again.
            del session.world.preempting[key]
            if made.status is not None and made.status.attempts[-1].preempted_for == facts.preemptor:
                PREEMPTIONS.labels(facts.job.spec.run.policy_ref.name).inc()
            session.cycle_wanted.set()
        for notice in made.notices:
            subject = Subject(API_VERSION, "TrainingJob", key.namespace, key.name, entry.uid)
            session.events.emit(subject, notice.reason, notice.message, warning=notice.warning)
        if made.move is not None and key not in session.world.moved:
            session.world.moves[key] = made.move
            session.cycle_wanted.set()
        if made.offer_end is not None:
            await self._end_offer(entry, made.offer_end)
        if made.wake_at is not None:
            self._later(key, max(0.05, (made.wake_at - utcnow()).total_seconds()))

    async def _carry_out(self, entry: TrainingJobEntry, facts: JobFacts, action: Action) -> None:
        refused = await carry_out(self._session, entry, facts.job, action)
        if not isinstance(action, (EnsureAttempt, EnsureStep)):
            return
        before = self._refusals.pop(entry.key, None)
        if refused is None:
            return
        now = utcnow()
        if before is None or before.job_name != refused.job_name:
            made = Refusal(refused.job_name, refused.message, now, now)
            subject = Subject(API_VERSION, "TrainingJob", entry.key.namespace, entry.key.name, entry.uid)
            self._session.events.emit(subject, Reason.JOB_REFUSED, refused.message, warning=True)
        else:
            made = replace(before, message=refused.message, at=now, times=before.times + 1)
        self._refusals[entry.key] = made
        self._session.want_job(entry.key)

    async def _end_offer(self, entry: TrainingJobEntry, end: OfferEnd) -> None:
        session = self._session
        offer = session.world.offers.get(entry.offer_uid)
        if offer is None or offer.finished:
            return
        patch = end_patch(
            end,
            offer.conditions(),
            uid=offer.uid,
            resource_version=offer.version,
            generation=offer.generation,
            now=utcnow(),
        )
        try:
            await session.write_status(session.world.offers, OFFERS, offer.key, patch)
        except (ConflictError, NotFoundError):
            await offer_is_there(session, offer.key, offer.uid)
            self._later(entry.key, 0.05)
            return
        session.events.emit(_offer_subject(offer), end.reason, end.message, warning=end.reason is Reason.FAILED)
        self.reports.pop(entry.key, None)
        session.cycle_wanted.set()
        session.policies_wanted.set()


def _offer_subject(offer: OfferEntry) -> Subject:
    return Subject(API_VERSION, "TaskOffer", offer.key.namespace, offer.key.name, offer.uid)
