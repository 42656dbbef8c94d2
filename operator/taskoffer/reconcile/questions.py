"""Questions about offers and the queue, answered from the cache. Nothing is decided and nothing is written.

A question is answered in a thread of its own, on a snapshot of values, because running the queue ahead takes longer
than an event loop may stand still. One is answered at a time. A replica that does not lead answers as well: it knows
what the leader has written, and says that it does not lead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

from taskoffer.adapters.clock import monotonic, utcnow
from taskoffer.adapters.kube import OFFERS, ApiError, NotFoundError, ThrottledError, UnknownOutcomeError
from taskoffer.adapters.status_server import QueueQuery, UnansweredError
from taskoffer.api.inquiry import Explained, OfferAnswer, QueueAnswer
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import Admission
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.explain import explain, explain_admitted, explain_finished
from taskoffer.decision.outcomes import NOTHING
from taskoffer.decision.queue import queue
from taskoffer.decision.snapshot import OfferView, Snapshot
from taskoffer.reconcile.cache import Raw
from taskoffer.reconcile.releases import end_of_booking
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.shapes import mapping
from taskoffer.reconcile.views import OfferEntry, OfferState, offer_entry
from taskoffer.reconcile.world import World

T = TypeVar("T")

_SLICE = 0.02
"""Seconds for which the event loop is held at a time while offers are evaluated that nobody has evaluated yet."""
_MOST_ASKED = 8


class Questions:
    """Answers questions about one replica's world."""

    def __init__(self, session: Session, leading: Callable[[], bool]) -> None:
        self._session = session
        self._leading = leading
        self._turn = asyncio.Lock()
        self._asked = 0

    async def queue(self, query: QueueQuery) -> QueueAnswer:
        """Return who waits.

        Raises:
            UnansweredError: when this replica cannot say, or there is no such policy.
        """
        snapshot = await self._snapshot()
        if query.policy is not None and query.policy not in snapshot.policies:
            raise UnansweredError(404, f"there is no CapacityPolicy {query.policy}")
        leading, left_out = self._leading(), len(self._session.world.in_flight)
        made = await self._in_turn(
            lambda: queue(snapshot, query.limit, policy=query.policy, namespace=query.namespace, leading=leading)
        )
        if not left_out:
            return made
        note = f"answers to {left_out} offer(s) are being written; these are not in the list"
        return made.model_copy(update={"notes": (*made.notes, note)})

    async def offer(self, namespace: str, name: str) -> OfferAnswer:
        """Return why an offer stands as it does.

        Raises:
            UnansweredError: when there is no such offer, or this replica cannot say.
        """
        snapshot = await self._snapshot()
        entry = self._find(namespace, name)
        if entry is None:
            raise UnansweredError(404, f"there is no TaskOffer {name} in namespace {namespace}")
        assumed = self._session.world.assumed.get(entry.uid)
        admission = assumed.admission if assumed is not None else entry.admission
        if entry.state is OfferState.DONE:
            told = await self._finished(entry, snapshot)
        elif admission is not None:
            told = self._admitted(entry, admission, snapshot)
        elif entry.state is OfferState.HOLDING:
            raise UnansweredError(
                409, f"status.admission of {namespace}/{name} cannot be read: {entry.admission_problem}"
            )
        else:
            told = await self._explained(_with_spec(entry), snapshot)
        return OfferAnswer(leading=self._leading(), now=snapshot.now, offer=told)

    # The world

    async def _snapshot(self) -> Snapshot:
        """Return what a cycle would decide on, as values that nobody changes."""
        world = self._session.world
        if not world.complete:
            raise UnansweredError(503, "this replica has not listed every kind yet: ask again in some seconds")
        held_since = monotonic()
        for _ in _settling(world):
            if monotonic() - held_since > _SLICE:
                await asyncio.sleep(0)
                held_since = monotonic()
        snapshot = world.snapshot(utcnow())
        # The groups of standing offers are the world's own lists.
        return replace(snapshot, standing={shape: list(group) for shape, group in snapshot.standing.items()})

    def _find(self, namespace: str, name: str) -> OfferEntry | None:
        """Return the newest offer of this name."""
        found = (
            entry for entry in self._session.world.offers if entry.key.name == name and entry.key.namespace == namespace
        )
        return max(found, key=lambda entry: (entry.created, int(entry.version)), default=None)

    async def _in_turn(self, answer: Callable[[], T]) -> T:
        if self._asked >= _MOST_ASKED:
            raise UnansweredError(503, f"{_MOST_ASKED} questions wait for their answer already: ask again")
        self._asked += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(answer)
        finally:
            self._asked -= 1

    # One offer

    async def _explained(self, view: OfferView, snapshot: Snapshot) -> Explained:
        return await self._in_turn(lambda: explain(snapshot, view))

    def _admitted(self, entry: OfferEntry, admission: Admission, snapshot: Snapshot) -> Explained:
        view = _with_spec(entry)
        ends = end_of_booking(self._session.world, entry, admission, snapshot.policies)
        evaluation = _evaluation(view, admission, snapshot)
        return explain_admitted(view, evaluation, admission, ends)

    async def _finished(self, entry: OfferEntry, snapshot: Snapshot) -> Explained:
        """Explain an offer of which the cache keeps next to nothing, so it is read again."""
        try:
            raw = await self._session.kube.get(OFFERS, entry.key.namespace, entry.key.name)
        except NotFoundError:
            raise UnansweredError(404, f"TaskOffer {entry.key} is gone") from None
        except (ApiError, ThrottledError, UnknownOutcomeError) as error:
            raise UnansweredError(503, f"TaskOffer {entry.key} has finished and could not be read: {error}") from error
        view = _view_of(raw, snapshot.now)
        finished = condition_of(view.conditions, "Finished")
        if finished is not None and finished.reason == Reason.REJECTED:
            return explain_finished(view, await self._explained(view, snapshot))
        return explain_finished(view, None)


def _settling(world: World) -> Iterator[None]:
    """Do beforehand what is slow about the next snapshot, one offer at a time, so that others have a turn in between.

    A leader's cycles have done it already; a replica that does not lead has evaluated nothing.
    """
    now, policies = utcnow(), world.policy_views()
    world.unsettle_what_changed(now, policies)
    under, known = world.settled_under, Snapshot(now, (), policies, (), ())
    for entry in [*world.undecided.values()]:
        # The world goes on in between. Under other policies what this would put aside would be put aside wrongly.
        if world.settled_under is not under:
            return
        if world.undecided.get(entry.uid) is entry:
            world.settle(known, (entry,))
        yield
    for entry in [*world.by_state[OfferState.HOLDING].values()]:
        if entry.admission is not None:
            end_of_booking(world, entry, entry.admission, policies)
        yield


def _with_spec(entry: OfferEntry) -> OfferView:
    """Return a pending or admitted offer with its whole spec."""
    spec, problem = entry.read_spec()
    return replace(entry.read_view(), spec=spec, invalid=problem)


def _view_of(raw: Raw, now: datetime) -> OfferView:
    """Return a finished offer with its conditions, as it would be if it were offered again now."""
    # Without its end it is an offer like any other.
    stored = raw.get("status")
    conditions = mapping(stored).get("conditions")
    kept = [c for c in conditions if isinstance(c, dict)] if isinstance(conditions, list) else []
    entry = offer_entry({**raw, "status": {}})
    entry.stored_conditions = kept
    return replace(_with_spec(entry), created=now)


def _evaluation(view: OfferView, admission: Admission, snapshot: Snapshot) -> Evaluation | None:
    """Evaluate an admitted offer on the GPUs that it got, under its policy as it is now."""
    policy = snapshot.policies.get(admission.policy_ref.name)
    spec = view.full_spec
    if policy is None or policy.spec is None or spec is None:
        return None
    counted = spec.model_copy(update={"gpu_count": admission.assignments[0].count})
    return evaluate(counted, policy.spec, view.key.namespace, snapshot.learned.get(policy.name, NOTHING))
