"""The admission cycle: one pure function from a snapshot to a plan for all pending offers.

Order of decisions: attempts of admitted jobs that must move come first, then offers by priority, deadline, score, age
and UID. Jobs that were stopped for others go on before the offers of their priority, but after the one that they made
room for. An offer that does not fit now does not hold up the ones behind it, unless the policy keeps a node for it.
Last come those that may borrow from a lane whose own offers are all served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.meta import PolicyRef
from taskoffer.decision.answers import (
    admitted,
    duplicate_of,
    ends_earlier,
    expired,
    rejection,
    too_late,
    waits,
    waits_for,
)
from taskoffer.decision.by_rank import by_rank
from taskoffer.decision.evaluate import Evaluation, Option
from taskoffer.decision.in_time import next_look
from taskoffer.decision.moments import later
from taskoffer.decision.moves import Move, find_moves, resume
from taskoffer.decision.placed_jobs import Order, Resumption
from taskoffer.decision.preemption import Eviction, Preemptions
from taskoffer.decision.room import Obstacle, Room
from taskoffer.decision.snapshot import (
    OfferView,
    PolicyView,
    Shape,
    Snapshot,
    Waiting,
    can_start,
    end_of,
    next_raise,
    ttl_end,
    waiting,
)
from taskoffer.decision.timeline import Opening
from taskoffer.decision.verdict import Answer, Verdict
from taskoffer.decision.want import Asked


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer that is to be written on an offer at exactly this resourceVersion."""

    offer: OfferView
    answer: Answer
    policy: PolicyRef | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cycle decided, and when time alone will change an answer (the next expiry)."""

    decisions: tuple[Decision, ...]
    moves: tuple[Move, ...] = ()
    wake_at: datetime | None = None
    waiting: int = 0
    """Offers that wait after this cycle, whether or not their answer changed."""
    evictions: tuple[Eviction, ...] = ()
    """Running jobs that are to stop for offers of the plan that wait for that."""


def plan(snapshot: Snapshot) -> Plan:
    """Decide every pending offer of the snapshot. Only answers whose verdict or reason changed are in the plan."""
    return _Cycle(snapshot).run()


Stream = Iterator[tuple[Waiting, PolicyView, Obstacle | None]]


@dataclass(slots=True)
class _Cycle:
    """One pass over the queue: the room that is left, and what has been decided so far."""

    snapshot: Snapshot
    room: Room = field(init=False)
    preemptions: Preemptions = field(init=False)
    resumptions: list[Resumption] = field(init=False)
    """Jobs that wait to go on, in reverse order."""
    moves: list[Move] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    wake_at: datetime | None = None
    waiting: int = 0
    wanted: int = 0
    """GPUs that the offers want which wait for capacity, under all policies."""
    borrowers: list[tuple[Waiting, PolicyView, Obstacle | None]] = field(default_factory=list)
    """Offers whose own lane is booked, in order, with what stopped them there."""
    borrowing_groups: list[tuple[PolicyView, Sequence[Waiting], int]] = field(default_factory=list)
    """Standing groups of such offers, and where in them they begin."""
    _refs: dict[str, PolicyRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.room = Room(self.snapshot)
        self.preemptions = Preemptions(self.snapshot)
        self.resumptions = sorted(self.snapshot.resumptions, key=lambda it: it.order(self.snapshot.now), reverse=True)
        self.wake_at = self.snapshot.standing_end

    def run(self) -> Plan:
        self.moves.extend(find_moves(self.snapshot, self.room))
        for found, policy in self._in_order():
            self._resume(found.order)
            self._decide(found, policy)
        self._resume(None)
        for found, policy, obstacle in self._borrowers():
            self._borrow(found, policy, obstacle)
        waiting = self.waiting + self.room.passed_over
        evictions = tuple(self.preemptions.evictions)
        return Plan(tuple(self.decisions), tuple(self.moves), self.wake_at, waiting, evictions)

    # The order

    def _in_order(self) -> Iterator[tuple[Waiting, PolicyView]]:
        """Answer the offers for which capacity does not matter, then yield the others in order."""
        ranked: list[Waiting] = []
        policies: dict[str, PolicyView] = {}
        resolved: dict[str | None, tuple[PolicyView | None, Reason | None, str]] = {}
        snapshot = self.snapshot
        heirs = snapshot.heirs
        for offer in snapshot.offers:
            if offer.spec is not None and offer.spec.policy_name not in resolved:
                resolved[offer.spec.policy_name] = snapshot.policy_for(offer.spec)
            policy, early, evaluation = self._without_capacity(offer, resolved)
            if early is not None or policy is None or evaluation is None:
                self._answer(offer, policy, evaluation, early)
            else:
                ranked.append(waiting(offer, evaluation, snapshot.now, is_heir=offer.uid in heirs))
                policies[offer.uid] = policy
        ranked.sort()
        self.wanted = sum(found.evaluation.gpus for found in ranked)
        self.wanted += sum(shape.gpus * len(group) for shape, group in snapshot.standing.items())
        for shape, found in by_rank(ranked, snapshot, self.room, self._passed_over, self._may_sleep):
            yield found, snapshot.policies[shape.policy] if shape else policies[found.offer.uid]

    def _may_sleep(self) -> bool:
        """Tell whether nothing but offers takes GPUs any more."""
        return not self.resumptions

    def _passed_over(self, shape: Shape, queue: Sequence[Waiting], at: int) -> int:
        """Return how many offers of a standing group, from this one on, need no look: their answer still holds."""
        policy, found = self.snapshot.policies[shape.policy], queue[at]
        obstacle = self.room.still_stops(policy, found.evaluation, shape.reason)
        if obstacle is None:
            return 0
        looks = shape.preempts and self.preemptions.may_stop_any(policy, self.room)
        if looks and self.preemptions.deserves_a_look(policy, found.offer, found.evaluation, self.room):
            return 0
        if shape.preempts:
            self._wake(self.preemptions.next_at(policy.name))
        keeps = self._stopped(found, policy, obstacle)
        # A shorter task of the same kind may still get past, and each large one may keep a node of its own. Whether
        # jobs are stopped for an offer depends on its own end.
        one_by_one = obstacle.unless_seconds > 0 or keeps or looks
        step = 1 if one_by_one else len(queue) - at
        if shape.borrows_from and obstacle.reason is Reason.WAITING_FOR_LANE:
            self.borrowing_groups.append((policy, queue, at))
        self.room.passed_over += step
        return step

    # One offer

    def _without_capacity(
        self, offer: OfferView, resolved: dict[str | None, tuple[PolicyView | None, Reason | None, str]]
    ) -> tuple[PolicyView | None, Answer | None, Evaluation | None]:
        """Return an offer's policy with its answer where capacity does not matter, else with its evaluation."""
        spec, now = offer.spec, self.snapshot.now
        if spec is None:
            message = f"the stored offer is not valid: {offer.invalid}"
            return None, Answer(Verdict.REJECT, Reason.INVALID_OFFER, message), None
        ends = offer.ends
        if ends is not None and now >= ends:
            return None, expired(spec, ends, now), None
        duplicate = duplicate_of(offer, spec, self.snapshot)
        if duplicate is not None:
            return None, duplicate, None
        policy, reason, message = resolved[spec.policy_name]
        if policy is None:
            return None, Answer(Verdict.WAIT, reason or Reason.POLICY_NOT_FOUND, message), None
        evaluation = self.snapshot.evaluations[offer.uid, policy.name]
        if evaluation.refusals and not self._below_floor(offer, policy, evaluation):
            return policy, rejection(evaluation), None
        if not spec.is_active:
            message = "spec.active is false: set it to true to have the offer decided"
            score = evaluation.score.total if evaluation.score else None
            return policy, Answer(Verdict.WAIT, Reason.SUSPENDED, message, score), None
        if (ends := end_of(offer, evaluation)) is not None and now >= ends:
            ttl = ttl_end(offer, evaluation)
            if ttl is not None and now >= ttl:
                message = f"not admitted within the policy's offerTtlSeconds {evaluation.ttl}, until {rfc3339(ttl)}"
                return policy, Answer(Verdict.REJECT, Reason.EXPIRED, message), None
            return policy, too_late(spec, evaluation, now), None
        return policy, None, evaluation

    def _below_floor(self, offer: OfferView, policy: PolicyView, evaluation: Evaluation) -> bool:
        """Tell whether nothing but the score is against an offer, and too few of its task type were admitted today."""
        floor, score = evaluation.floor, evaluation.score
        if floor is None or score is None or offer.spec is None:
            return False
        if [refusal.reason for refusal in evaluation.refusals] != [Reason.SCORE_TOO_LOW]:
            return False
        count, least = floor
        today = self.room.admitted_today[policy.name, offer.spec.task_type]
        return today < count and (least is None or score.total > least)

    def _decide(self, found: Waiting, policy: PolicyView) -> None:
        """Decide an offer that only capacity can stop."""
        offer, evaluation = found.offer, found.evaluation
        if evaluation.refusals and not self._below_floor(offer, policy, evaluation):
            self._answer(offer, policy, evaluation, rejection(evaluation))
            return
        obstacle = self.room.obstacle(policy, evaluation)
        if obstacle is None:
            chosen, better = self._choose(found, policy)
            self._answer(offer, policy, evaluation, better or self._admit(offer, policy, chosen, evaluation.gpus))
            return
        may_borrow = bool(evaluation.borrows_from) and obstacle.reason is Reason.WAITING_FOR_LANE
        if not may_borrow and self._preempts(found, policy, obstacle):
            return
        if not self.room.rejects(policy, obstacle):
            # An offer that is refused keeps nothing from others.
            self._stopped(found, policy, obstacle)
        if may_borrow:
            self.borrowers.append((found, policy, obstacle))
            return
        self._wait(offer, policy, evaluation, obstacle)

    def _choose(self, found: Waiting, policy: PolicyView) -> tuple[Evaluation, Answer | None]:
        """Choose the count of GPUs with which the task ends first; with an answer where that means to wait for them."""
        offer, evaluation = found.offer, found.evaluation
        if not evaluation.options:
            return evaluation, None
        if evaluation.spare_share is not None:
            return self._with_spare(offer, policy, evaluation, evaluation.spare_share), None
        now = self.snapshot.now
        ends: list[tuple[datetime, int, Option, Opening | None]] = []
        stopped: tuple[Option, Obstacle] | None = None
        for option in evaluation.options:
            asked = Asked(option.gpus, evaluation.lane, evaluation.quota, option.seconds)
            obstacle = self.room.obstacle(policy, asked)
            if obstacle is None:
                if can_start(offer, evaluation, option, now):
                    ends.append((later(now, option.seconds), option.gpus, option, None))
                continue
            stopped = stopped or (option, obstacle)
            opening = None if self.room.rejects(policy, obstacle) else self.room.opening(policy, asked)
            if opening is not None and can_start(offer, evaluation, option, opening.at):
                ends.append((later(opening.at, option.seconds), option.gpus, option, opening))
        if not ends:
            # Only counts that are not free would still be in time, and nothing says when they will be.
            return self._none_in_time(offer, policy, evaluation, stopped)
        _, gpus, option, opening = min(ends, key=lambda end: (end[0], end[3] is not None, end[1]))
        choice = evaluation.on(option)
        if opening is None:
            return choice, None
        self._wake(opening.at)
        # What it waits for is kept for it, or those behind it would take the GPUs one by one.
        self.room.keep(offer, choice, opening)
        at_once = min((end for end in ends if end[3] is None), key=lambda end: end[:2], default=None)
        otherwise = "none of the counts that are free now would be in time"
        if at_once is not None:
            otherwise = f"on {at_once[1]} GPU(s) from now on it would be {rfc3339(at_once[0])}"
        return choice, ends_earlier(evaluation, gpus, opening, later(opening.at, choice.occupies), otherwise)

    def _none_in_time(
        self, offer: OfferView, policy: PolicyView, evaluation: Evaluation, stopped: tuple[Option, Obstacle] | None
    ) -> tuple[Evaluation, Answer]:
        """Answer an offer of which no count is free in time."""
        if stopped is not None and offer.says(stopped[1].reason) and not self.room.rejects(policy, stopped[1]):
            # It has been told, so nothing is put into words for it.
            return evaluation, Answer(Verdict.WAIT, stopped[1].reason, stopped[1].message)
        choice = evaluation.on(stopped[0]) if stopped is not None else evaluation
        obstacle = stopped[1] if stopped is not None else self.room.no_room(policy, evaluation)
        return choice, waits(choice, obstacle, rejects=self.room.rejects(policy, obstacle))

    def _with_spare(self, offer: OfferView, policy: PolicyView, evaluation: Evaluation, share: float) -> Evaluation:
        """Choose the largest count within a share of the GPUs that are free and that nobody else waits for."""
        ledger = self.room.timeline.ledger
        free = sum(max(0, ledger.free(node)) for node in self.room.nodes(policy.name))
        spare = share * (free - (self.wanted - evaluation.gpus))
        now, own = self.snapshot.now, evaluation.gpus
        larger = [it for it in evaluation.options if own < it.gpus <= spare and can_start(offer, evaluation, it, now)]
        choices = (evaluation.on(option) for option in sorted(larger, key=lambda it: it.gpus, reverse=True))
        return next((choice for choice in choices if self.room.obstacle(policy, choice) is None), evaluation)

    def _admit(self, offer: OfferView, policy: PolicyView, evaluation: Evaluation, wanted: int) -> Answer:
        node = self.room.book(policy, offer, evaluation)
        self.wanted -= wanted
        ledger = self.room.timeline.ledger
        booked, devices = node.allocatable - ledger.free(node), ledger.pick(offer.uid, node, evaluation.gpus)
        return admitted(offer, policy, evaluation, node, booked, self.snapshot.now, devices)

    def _resume(self, before: Order | None) -> None:
        """Let jobs go on that were stopped for others and come before this place in the order."""
        while self.resumptions and (before is None or self.resumptions[-1].order(self.snapshot.now) < before):
            move = resume(self.resumptions.pop(), self.snapshot, self.room)
            if move is not None:
                self.moves.append(move)

    def _preempts(self, found: Waiting, policy: PolicyView, obstacle: Obstacle) -> bool:
        """Have running jobs stopped for an offer, where the policy says so; tell whether it waits for that now."""
        offer, evaluation = found.offer, found.evaluation
        if not evaluation.preempts:
            return False
        choice = self.preemptions.choose(self.room, policy, offer, evaluation, obstacle)
        if choice is None:
            self._wake(self.preemptions.next_at(policy.name))
            return False
        self.preemptions.take(self.room, policy, offer, evaluation, choice)
        told = offer.says(Reason.WAITING_FOR_PREEMPTION)
        self._answer(offer, policy, evaluation, None if told else waits_for(evaluation, policy, choice))
        return True

    def _stopped(self, found: Waiting, policy: PolicyView, obstacle: Obstacle) -> bool:
        """Take in that an offer waits: its lane lends nothing, and a large one keeps a node.

        Tell whether others of its kind may keep nodes too.
        """
        evaluation = found.evaluation
        if obstacle.reason is Reason.WAITING_BEHIND_RESERVATION:
            # Once its waiting has raised it, it may come before the offer that the node is kept for.
            self._wake(next_raise(found.offer, evaluation, self.snapshot.now))
        if evaluation.lane is not None:
            self.room.lanes_wanted.add((policy.name, evaluation.lane))
        if not evaluation.reserves or obstacle.reason is not Reason.WAITING_FOR_CAPACITY:
            return False
        return self.room.reserve(policy, found.offer, evaluation)

    def _wait(self, offer: OfferView, policy: PolicyView, evaluation: Evaluation, obstacle: Obstacle) -> None:
        rejects = self.room.rejects(policy, obstacle)
        told = offer.says(obstacle.reason) and not rejects
        self._answer(offer, policy, evaluation, None if told else waits(evaluation, obstacle, rejects=rejects))

    # Borrowing

    def _borrowers(self) -> Stream:
        """Yield the offers that may borrow from other lanes, in order."""
        streams: list[Stream] = [iter(self.borrowers), *(self._group(*group) for group in self.borrowing_groups)]
        return heapq.merge(*streams, key=lambda item: item[0].order)

    def _group(self, policy: PolicyView, queue: Sequence[Waiting], at: int) -> Stream:
        """Yield the offers of a group for as long as some lane lends to them."""
        for found in queue[at:]:
            if self.room.lender(policy, found.evaluation) is not None:
                yield found, policy, None
            elif self.room.lends_nothing(policy, found.evaluation):
                return

    def _borrow(self, found: Waiting, policy: PolicyView, obstacle: Obstacle | None) -> None:
        """Admit an offer into a lane that lends its GPUs, else let it wait for its own; a group's waits already."""
        borrowed = self.room.lender(policy, found.evaluation)
        if borrowed is not None:
            if obstacle is None:
                self.room.passed_over -= 1
            self._answer(found.offer, policy, borrowed, self._admit(found.offer, policy, borrowed, borrowed.gpus))
        elif obstacle is not None and not self._preempts(found, policy, obstacle):
            self._wait(found.offer, policy, found.evaluation, obstacle)

    # The plan

    def _answer(
        self, offer: OfferView, policy: PolicyView | None, evaluation: Evaluation | None, answer: Answer | None
    ) -> None:
        """Put an answer into the plan, unless the offer says it already; None is a wait that it says already."""
        if answer is None or answer.verdict is Verdict.WAIT:
            self.waiting += 1
            self._wake(next_look(offer, evaluation, self.snapshot.now))
        if answer is not None and not (answer.verdict is Verdict.WAIT and offer.says(answer.reason)):
            self.decisions.append(Decision(offer, answer, self._ref(policy) if policy else None))

    def _ref(self, policy: PolicyView) -> PolicyRef:
        """Return the version of a policy, the same value for all its offers."""
        if policy.name not in self._refs:
            self._refs[policy.name] = policy.ref
        return self._refs[policy.name]

    def _wake(self, moment: datetime | None) -> None:
        if moment is not None and (self.wake_at is None or moment < self.wake_at):
            self.wake_at = moment
