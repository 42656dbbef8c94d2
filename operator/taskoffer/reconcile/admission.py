"""Offers: run cycles and write their answers, one status write each.

One cycle at a time; while its answers are being written the next one may already decide, because what is on its way
counts as assumed. Only a definite refusal forgets a booking: after a timeout the same write is sent again at the same
resourceVersion, so that it can be committed at most once.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

from taskoffer.adapters.clock import monotonic, utcnow
from taskoffer.adapters.events import Subject
from taskoffer.adapters.kube import (
    OFFERS,
    ApiError,
    ConflictError,
    NotFoundError,
    Object,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.adapters.metrics import CYCLE_SECONDS, DECISIONS, PENDING, WRITE_RETRIES
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import API_VERSION, PolicyRef
from taskoffer.decision.answers import first_of_task
from taskoffer.decision.cycle import Decision, Plan, plan
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import open_ledger
from taskoffer.decision.snapshot import OfferView
from taskoffer.decision.verdict import Verdict
from taskoffer.reconcile.jobs import Jobs
from taskoffer.reconcile.leftovers import offer_is_there
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import OfferEntry, OfferState
from taskoffer.render.offers import decision_patch, revocation_patch

logger = logging.getLogger(__name__)

_CYCLE_PAUSE = 3
"""Pause between cycles as a multiple of the last one's time: a cycle looks at the whole queue again."""
_LONGEST_PAUSE = 0.1
"""Seconds that such a pause lasts at most, unless a cycle takes longer."""


class Admission:
    """The admission loop of a leading replica."""

    def __init__(self, session: Session, jobs: Jobs) -> None:
        self._session = session
        self._jobs = jobs
        self._slots = asyncio.Semaphore(session.settings.concurrent_writes)
        self._wake_at: datetime | None = None
        self._cycle_seconds = 0.0
        self._cycles = 0
        self._told: dict[str, str] = {}
        """Versions of the offers whose answers the server refuses and for which an event says so."""

    async def run(self) -> None:
        """Run cycles for ever, one whenever something has changed or an expiry has come."""
        async with asyncio.TaskGroup() as writes:
            while True:
                await self._wait()
                self._session.cycle_wanted.clear()
                self._cycle(writes)

    async def _wait(self) -> None:
        wanted = self._session.cycle_wanted
        if self._wake_at is not None:
            left = max(0.0, (self._wake_at - utcnow()).total_seconds())
            try:
                async with asyncio.timeout(left + 0.001):
                    await wanted.wait()
            except TimeoutError:
                return
        else:
            await wanted.wait()
        # A long queue makes long cycles: leave most of the loop to the writes.
        pause = max(_CYCLE_PAUSE * self._cycle_seconds, self._session.settings.coalesce)
        await asyncio.sleep(min(pause, max(_LONGEST_PAUSE, self._cycle_seconds)))

    def _cycle(self, writes: asyncio.TaskGroup) -> None:
        """Decide all pending offers and start the writes. No await: nothing changes between snapshot and booking."""
        world = self._session.world
        if not world.complete or self._session.draining:
            self._wake_at = None
            return
        if world.idle:
            # Events of running jobs come all the time.
            self._wake_at = None
            PENDING.set(0)
            return
        now = utcnow()
        started = monotonic()
        made: Plan = plan(world.snapshot(now))
        self._cycle_seconds = monotonic() - started
        self._cycles += 1
        CYCLE_SECONDS.observe(self._cycle_seconds)
        PENDING.set(made.waiting)
        self._wake_at = world.outcomes.wake_at(made.wake_at)
        for decision in made.decisions:
            world.send(decision.offer.uid, decision.answer.admission)
            writes.create_task(self._write(decision, now))
        self._session.answers_on_their_way(len(world.in_flight))
        for move in made.moves:
            self._jobs.take_move(move)
        for eviction in made.evictions:
            self._jobs.take_eviction(eviction, now)
        if made.decisions or made.moves:
            self._session.policies_wanted.set()

    async def _write(self, decision: Decision, now: datetime) -> None:
        world, uid, decided_in = self._session.world, decision.offer.uid, self._cycles
        try:
            async with self._slots:
                if self._session.draining:
                    # It was not sent yet, so whoever leads next decides it.
                    return
                written = await self._holds(decision) and await self._commit(decision, decision_patch(decision, now))
        finally:
            world.in_flight.discard(uid)
            self._session.answers_on_their_way(len(world.in_flight))
        if not written:
            world.assumed.pop(uid, None)
            self._session.cycle_wanted.set()
            return
        if decision.answer.verdict is Verdict.WAIT and self._cycles != decided_in:
            # Cycles that ran meanwhile left this offer out: they saw neither what came free for it nor its expiry.
            self._session.cycle_wanted.set()
        self._tell(decision)
        if decision.answer.admission is not None:
            world.decided_here.add(uid)
            self._session.want_job(OfferKey(decision.offer.key.namespace, decision.answer.admission.job_name))
        if decision.answer.verdict is Verdict.REJECT:
            self._session.policies_wanted.set()

    async def _holds(self, decision: Decision) -> bool:
        """Tell whether an answer may be written: a refusal is final, so nothing that is gone may be its reason."""
        offer, session, delay = decision.offer, self._session, 0.1
        if decision.answer.reason is not Reason.DUPLICATE_TASK or offer.spec is None:
            return True
        place = offer.key.namespace, offer.spec.task_id
        while (other := first_of_task(offer, session.world.siblings_now(place))) is not None:
            try:
                return await offer_is_there(session, OfferKey(offer.key.namespace, other.name), other.uid)
            except (ApiError, ThrottledError, UnknownOutcomeError) as error:
                logger.warning("offer not read", extra={"offer": other.name, "error": str(error)})
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)
        return False

    async def _commit(self, decision: Decision, patch: Object) -> bool:
        """Write an answer. Tell whether it stands; False means that the offer is to be decided again."""
        offer, delay, maybe_written = decision.offer, 0.1, False
        while True:
            # After a write of unknown outcome only the server knows, so the same write goes out again.
            if not maybe_written and not self._policy_still_holds(decision.policy):
                return False
            try:
                await self._session.write_status(self._session.world.offers, OFFERS, offer.key, patch)
            except ThrottledError as error:
                WRITE_RETRIES.labels("TaskOffer.status", "throttled").inc()
                await asyncio.sleep(error.retry_after)
            except UnknownOutcomeError as error:
                WRITE_RETRIES.labels("TaskOffer.status", "unknown").inc()
                logger.warning("answer with unknown outcome", extra={"offer": str(offer.key), "error": str(error)})
                maybe_written = True
                await asyncio.sleep(delay)
                delay = min(delay * 2, 5.0)
            except (ConflictError, NotFoundError):
                stands = await self._stands(offer, decision)
                if not stands:
                    WRITE_RETRIES.labels("TaskOffer.status", "overtaken").inc()
                return stands
            except ApiError as error:
                # The object cannot take this status, for example because it was stored under other rules. Trying
                # again at once would spin, so the next resync does.
                logger.error("answer refused", extra={"offer": str(offer.key), "error": str(error)})
                self._hold_back(offer.key, offer.uid, offer.resource_version, decision.answer.reason, error)
                return False
            else:
                return True

    def _hold_back(self, key: OfferKey, uid: str, version: str, reason: Reason, error: ApiError) -> None:
        """Leave an offer alone whose status cannot be written, and say so in an event, once per version of it."""
        world = self._session.world
        world.held_back.add(uid)
        if self._told.get(uid) == version:
            return
        self._told = {known: at for known, at in self._told.items() if world.offers.get(known) is not None}
        self._told[uid] = version
        subject = Subject(API_VERSION, "TaskOffer", key.namespace, key.name, uid)
        message = f"the answer is {reason.value}, but the API server does not store it: {error}"
        self._session.events.emit(subject, reason, message, warning=True)

    async def _stands(self, offer: OfferView, decision: Decision) -> bool:
        """After a conflict: read the offer and tell whether an earlier try of this very write is what it carries."""
        world = self._session.world
        try:
            raw = await self._read_again(offer)
        except NotFoundError:
            world.offers.forget(offer.uid, int(offer.resource_version))
            return False
        if raw["metadata"]["uid"] != offer.uid:
            world.offers.forget(offer.uid, int(raw["metadata"]["resourceVersion"]) - 1)
        world.offers.observe("MODIFIED", raw)
        entry = world.offers.get(offer.uid)
        if entry is None or raw["metadata"]["uid"] != offer.uid:
            return False
        wanted = decision.answer.admission
        if wanted is not None:
            return entry.admission == wanted
        looked_at = entry.state is OfferState.DONE or entry.observed_generation == offer.generation
        return looked_at and entry.reason == decision.answer.reason.value

    async def _read_again(self, offer: OfferView) -> Object:
        """Read an offer until the server answers: a booking must not be forgotten before it is known not to stand.

        Raises:
            NotFoundError: when the offer is gone.
        """
        delay = 0.1
        while True:
            try:
                return await self._session.kube.get(OFFERS, offer.key.namespace, offer.key.name)
            except NotFoundError:
                raise
            except (ApiError, ThrottledError, UnknownOutcomeError) as error:
                logger.warning("offer not read after a conflict", extra={"offer": str(offer.key), "error": str(error)})
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _policy_still_holds(self, ref: PolicyRef | None) -> bool:
        """Tell whether the policy that a decision was made under is still the one in force."""
        if ref is None:
            return True
        return any(policy.ref == ref for policy in self._session.world.policy_versions())

    def _tell(self, decision: Decision) -> None:
        offer, answer = decision.offer, decision.answer
        task_type = offer.spec.task_type.value if offer.spec else "unknown"
        DECISIONS.labels(answer.verdict.value, answer.reason.value, task_type).inc()
        subject = Subject(API_VERSION, "TaskOffer", offer.key.namespace, offer.key.name, offer.uid)
        self._session.events.emit(subject, answer.reason, answer.message, warning=answer.verdict is Verdict.REJECT)

    # Taking admissions back

    async def revoke_overbooked(self) -> int:
        """Where more is booked than a node has, take back the newest admissions that have no TrainingJob.

        This is for what an old leader wrote at the last moment. Return how many were taken back.
        """
        world, revoked = self._session.world, 0
        snapshot = world.snapshot(utcnow())
        ledger = open_ledger(snapshot.claims)
        for node in snapshot.nodes:
            over = ledger.booked.get(node.name, 0) - node.allocatable if node.ready else 0
            if over <= 0:
                continue
            for entry in self._revocable(node.name):
                if over <= 0:
                    break
                assert entry.admission is not None  # noqa: S101
                message = f"{ledger.booked[node.name]} of {node.allocatable} were booked on {node.name}"
                if await self.revoke(entry, Reason.OVERBOOKED, message):
                    over -= sum(a.count for a in entry.admission.assignments if a.node_name == node.name)
                    revoked += 1
        return revoked

    def _revocable(self, node: str) -> list[OfferEntry]:
        world = self._session.world
        found = [
            entry
            for entry in world.by_state[OfferState.HOLDING].values()
            if entry.admission is not None
            and any(a.node_name == node for a in entry.admission.assignments)
            and entry.job_key not in world.jobs_by_key
        ]
        return sorted(found, key=lambda e: (e.admission.decided_at, e.uid), reverse=True)  # type: ignore[union-attr]

    async def revoke(self, entry: OfferEntry, reason: Reason, message: str) -> bool:
        """Take an admission back by a conditional write, if nothing has come of it yet."""
        session = self._session
        if await self._jobs.exists(entry.job_key, entry.uid):
            return False
        patch = revocation_patch(
            reason,
            message,
            entry.conditions(),
            uid=entry.uid,
            resource_version=entry.version,
            generation=entry.generation,
            now=utcnow(),
        )
        try:
            await session.write_status(session.world.offers, OFFERS, entry.key, patch)
        except (ConflictError, NotFoundError, ThrottledError, UnknownOutcomeError) as error:
            logger.warning("admission not taken back", extra={"offer": str(entry.key), "error": str(error)})
            return False
        except ApiError as error:
            logger.error("taking back refused", extra={"offer": str(entry.key), "error": str(error)})
            self._hold_back(entry.key, entry.uid, entry.version, reason, error)
            return False
        subject = Subject(API_VERSION, "TaskOffer", entry.key.namespace, entry.key.name, entry.uid)
        session.events.emit(subject, reason, message, warning=True)
        session.cycle_wanted.set()
        return True
