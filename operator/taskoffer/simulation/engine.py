"""Runs a trace through the operator's own admission cycle, with a virtual clock and simulated nodes.

What happens is what the operator would do: ``decision.cycle.plan`` is asked whenever an offer arrives, a job ends, or
time alone changes an answer (the plan's own ``wake_at``). An admission books its GPUs from that moment until the job
really ends. A job that is stopped for another saves and stops at once, and pays for its next start. The shell around
the cycle takes no time here: no pod is late, nothing is written, nothing is lost.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import Condition, ConditionStatus
from taskoffer.decision.cycle import Decision, plan
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, NodeView, Release
from taskoffer.decision.moments import later
from taskoffer.decision.moves import Move
from taskoffer.decision.placed_jobs import Resumption, Running
from taskoffer.decision.preemption import Eviction, left_of
from taskoffer.decision.snapshot import OfferView, PolicyView, Sibling, Snapshot
from taskoffer.decision.verdict import Verdict
from taskoffer.simulation.run import Outcome, Run, Stretch
from taskoffer.simulation.trace import Trace
from taskoffer.simulation.truth import (
    START,
    again_of,
    course_of,
    expiry_of,
    hardware_of,
    measured_after,
    moment,
    seconds_at,
    settings_under,
)

_DAY = 86_400.0
_END, _ARRIVAL, _WORD = 0, 1, 2
"""What happens: a job ends, an offer arrives, a trainer says when it will end; at the same moment in this order."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The simulated nodes. All are alike and carry the labels that the policy selects by."""

    nodes: int = 1
    gpus: int = 8

    @property
    def total(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a trace under a policy. Every offer is in exactly one of runs, refusals and waiting."""

    policy: str
    fleet: Fleet
    runs: tuple[Run, ...]
    """Accepted offers, in the order of their admission."""
    refusals: Mapping[str, Reason]
    """Refused offers and why."""
    waiting: Mapping[str, Reason]
    """Offers that still wait, and for what, although nothing is to happen any more."""
    seconds: float
    """From the start of the trace until its end or that of the last job, whichever is later."""
    units: int = 1
    """Units that the policy shares a GPU out as; a run's GPUs are such units."""

    @property
    def busy(self) -> float:
        """GPU-seconds that jobs held, whatever came of them."""
        return sum(run.gpus * run.seconds for run in self.runs) / self.units

    @property
    def idle(self) -> float:
        """GPU-seconds that nobody held."""
        return self.fleet.total * self.seconds - self.busy


def simulate(trace: Trace, policy: CapacityPolicySpec, *, name: str = "policy", fleet: Fleet | None = None) -> Result:
    """Run a trace under a policy.

    Args:
        trace: The offers. A ``policyName`` of theirs does not count: this policy decides them all.
        policy: The policy.
        name: What the policy is called in the result.
        fleet: The nodes; absent means one of 8 GPUs.
    """
    world = _World(trace, policy, name, fleet or Fleet())
    while (now := world.next_moment()) is not None:
        world.advance(now)
        world.cycle(now)
    return world.result()


@dataclass(frozen=True, slots=True)
class _Job:
    """An accepted offer whose job has not ended: where it runs, or ran until it was stopped."""

    node: str
    gpus: int
    lane: str | None
    view: OfferView
    evaluation: Evaluation
    """On the GPUs that it has got."""
    started: float
    """When it did so on this node."""
    needs: float
    """What was predicted then, in seconds."""
    due: datetime | None
    ends: float
    """When it really ends, if it is not stopped before."""
    whole: float
    """When it would end if it did not fail and had all the time it wants."""
    tells: float
    """From when on its trainer says that."""
    preempted: int = 0
    left_for: str = ""
    """UID of the offer that it was stopped for last."""

    def left(self, now: float) -> float:
        """Return the seconds that it still needs: as its trainer says, before that as predicted at the start."""
        return left_of(self.whole, now) if now >= self.tells else left_of(self.needs, now - self.started)

    def predicted_end(self, now: float) -> datetime:
        """Return when it ends as far as the operator knows: as predicted or told, at the latest at its deadline."""
        ends = moment(self.whole) if now >= self.tells else later(moment(self.started), self.needs)
        return ends if self.due is None else min(ends, self.due)

    @property
    def name(self) -> str:
        return str(self.view.key)

    @property
    def level(self) -> int:
        return self.evaluation.priority.level if self.evaluation.priority is not None else 0


class _World:
    """Offers, nodes and running jobs while the clock runs."""

    def __init__(self, trace: Trace, policy: CapacityPolicySpec, name: str, fleet: Fleet) -> None:
        labels = dict(policy.node_selector.match_labels)
        # What the result calls the policy may be a file, which is no name that an object can have.
        self._title = name
        self._policy = PolicyView("policy", "policy-uid", 1, policy, is_default=True, created=START)
        self._spec = policy
        self._units = policy.resources[0].units_per_gpu or 1
        gpus = fleet.gpus * self._units
        self._nodes = [NodeView(f"node-{number + 1}", gpus, True, labels) for number in range(fleet.nodes)]
        self._hardware = hardware_of(policy)
        self._counts_days = any(task.daily_floor is not None for task in policy.task_types)
        self._trace, self._fleet = trace, fleet
        self._offers = {_uid(number): offer for number, offer in enumerate(trace.offers)}
        self._events = [(offer.at, _ARRIVAL, uid) for uid, offer in self._offers.items()]
        heapq.heapify(self._events)
        self._wake: float | None = None
        self._pending: dict[str, OfferView] = {}
        self._waits_for: dict[str, Reason] = {}
        self._evaluations: dict[tuple[str, str], Evaluation] = {}
        self._running: dict[str, _Job] = {}
        self._away: dict[str, _Job] = {}
        """Jobs that were stopped for others."""
        self._admitted: deque[tuple[float, TaskType]] = deque()
        self._siblings: dict[tuple[str, str], dict[str, Sibling]] = {}
        self._shared: set[tuple[str, str]] = set()
        """Where several offers have one task id."""
        self._left: dict[str, tuple[float, float, Outcome]] = {}
        """What jobs that were stopped really take still, would take without failing, and what then comes of them."""
        self._runs: dict[str, Run] = {}
        self._refusals: dict[str, Reason] = {}

    def next_moment(self) -> float | None:
        """Return when something happens next, None when nothing does any more."""
        coming = self._events[0][0] if self._events else None
        return min((at for at in (coming, self._wake) if at is not None), default=None)

    def advance(self, now: float) -> None:
        """Let happen what happens at this moment; a trainer's word is there for the cycle."""
        while self._events and self._events[0][0] <= now:
            _, kind, uid = heapq.heappop(self._events)
            if kind == _END:
                self._end(uid, now)
            elif kind == _ARRIVAL:
                self._arrive(uid)

    def cycle(self, now: float) -> None:
        """Decide as the operator does, and carry the decisions out."""
        made = plan(self._snapshot(now))
        self._wake = None if made.wake_at is None else seconds_at(made.wake_at)
        if self._wake is not None and self._wake <= now:
            # The operator would go round again at once; a second later is soon enough to see what becomes of it.
            self._wake = now + 1
        for decision in made.decisions:
            self._carry_out(decision, now)
        for move in made.moves:
            self._go_on(move, now)
        for eviction in made.evictions:
            self._stop(eviction, now)
            # What it frees is given away in the next cycle.
            self._wake = now + 1

    def result(self) -> Result:
        """Return what came of it all."""
        return Result(
            policy=self._title,
            fleet=self._fleet,
            runs=tuple(self._runs.values()),
            refusals=self._refusals,
            waiting={self._offers[uid].name: self._waits_for[uid] for uid in self._pending},
            seconds=max([self._trace.seconds, *(run.end for run in self._runs.values())]),
            units=self._units,
        )

    def _snapshot(self, now: float) -> Snapshot:
        """Build what a cycle decides on. Whatever the cycle comes to look at beside this is to be added here."""
        policy, jobs = self._policy.name, self._running.items()
        return Snapshot(
            now=moment(now),
            offers=tuple(self._pending.values()),
            policies={policy: self._policy},
            nodes=self._nodes,
            claims=[
                Claim(uid, job.node, job.gpus, "job", policy, job.lane, job.view.key.namespace) for uid, job in jobs
            ],
            siblings={place: tuple(self._siblings[place].values()) for place in self._shared},
            evaluations=self._evaluations,
            releases=[
                Release(
                    uid, job.node, job.gpus, job.predicted_end(now), policy, job.lane, job.view.key.namespace, job.name
                )
                for uid, job in jobs
            ],
            running=[self._preemptible(uid, job, now) for uid, job in jobs] if self._spec.preemption else (),
            resumptions=[self._resumption(uid, job) for uid, job in self._away.items()],
            admitted_today=self._admitted_since(now - _DAY) if self._counts_days else {},
        )

    def _admitted_since(self, since: float) -> dict[tuple[str, TaskType], int]:
        while self._admitted and self._admitted[0][0] < since:
            self._admitted.popleft()
        return Counter((self._policy.name, task) for _, task in self._admitted)

    def _arrive(self, uid: str) -> None:
        offer = self._offers[uid]
        namespace, _, name = offer.name.rpartition("/")
        key, created = OfferKey(namespace or "default", name), moment(offer.at)
        ends = expiry_of(offer)
        spec = offer.spec.model_copy(update={"policy_name": None, "expires_at": None if ends is None else moment(ends)})
        self._pending[uid] = OfferView(key, uid, "1", 1, created, spec)
        self._evaluations[uid, self._policy.name] = evaluate(spec, self._spec, key.namespace)
        place = (key.namespace, spec.task_id)
        same = self._siblings.setdefault(place, {})
        same[uid] = Sibling(created, uid, name, "undecided")
        if len(same) > 1:
            self._shared.add(place)

    def _carry_out(self, decision: Decision, now: float) -> None:
        view, answer = decision.offer, decision.answer
        offer = self._offers[view.uid]
        assert view.spec is not None  # noqa: S101
        place = (view.key.namespace, view.spec.task_id)
        self._siblings[place][view.uid] = replace(self._siblings[place][view.uid], reason=answer.reason.value)
        if answer.verdict is Verdict.WAIT:
            self._waits_for[view.uid] = answer.reason
            self._pending[view.uid] = replace(view, conditions=(_said(answer.reason),), observed_generation=1)
            return
        del self._pending[view.uid]
        if answer.admission is None:
            self._refusals[offer.name] = answer.reason
            return
        (given,) = answer.admission.assignments
        self._admitted.append((now, view.spec.task_type))
        counted = offer.spec.model_copy(update={"gpu_count": given.count})
        evaluation = evaluate(counted, self._spec, view.key.namespace)
        settings = settings_under(self._spec, offer.spec, given.count)
        course = course_of(offer, settings, given.count, now, self._hardware)
        end, earned = now + course.seconds, offer.worth if course.outcome == "InTime" else 0.0
        self._runs[view.uid] = Run(offer.name, now, end, given.count, given.node_name, course.outcome, earned)
        job = _Job(
            node=given.node_name,
            gpus=given.count,
            lane=given.lane,
            view=view,
            evaluation=evaluation,
            started=now,
            needs=evaluation.occupies,
            due=answer.admission.deadline,
            ends=end,
            whole=now + course.whole,
            tells=now + measured_after(offer, course.whole),
        )
        self._start(view.uid, job)

    def _start(self, uid: str, job: _Job) -> None:
        self._running[uid] = job
        heapq.heappush(self._events, (job.ends, _END, uid))
        heapq.heappush(self._events, (job.tells, _WORD, uid))

    def _end(self, uid: str, now: float) -> None:
        """Let a job end, unless it was stopped before and is to end at another time."""
        if uid in self._running and self._running[uid].ends == now:
            del self._running[uid]
        elif uid in self._away and self._away[uid].ends == now:
            del self._away[uid], self._left[uid]

    # Preemption

    def _preemptible(self, uid: str, job: _Job, now: float) -> Running:
        evaluation = job.evaluation
        return Running(
            key=job.view.key,
            holder=uid,
            name=job.name,
            policy=self._policy.name,
            node=job.node,
            gpus=job.gpus,
            lane=job.lane,
            quota=evaluation.quota,
            level=job.level,
            started=moment(job.started),
            ends=job.predicted_end(now),
            deadline=job.due,
            preempted=job.preempted,
            score=float(evaluation.score.total) if evaluation.score is not None else 0.0,
            at_stake=evaluation.at_stake,
        )

    def _resumption(self, uid: str, job: _Job) -> Resumption:
        return Resumption(
            key=job.view.key,
            offer_uid=uid,
            name=job.name,
            policy=self._policy.name,
            gpus=job.gpus,
            lane=job.lane,
            quota=job.evaluation.quota,
            level=job.level,
            since=job.view.created,
            occupies=job.needs,
            left_for=job.left_for,
            deadline=job.due,
        )

    def _stop(self, eviction: Eviction, now: float) -> None:
        """Let a job save and stop. Unless it goes on it is late at its deadline."""
        uid, rules = eviction.holder, self._spec.preemption
        assert rules is not None  # noqa: S101
        job, run = self._running.pop(uid), self._runs[uid]
        needs = job.left(now) + rules.resume_seconds
        due = math.inf if job.due is None else seconds_at(job.due)
        away = replace(job, needs=needs, ends=due, preempted=job.preempted + 1, left_for=eviction.preemptor_uid)
        self._away[uid] = away
        if due < math.inf:
            heapq.heappush(self._events, (due, _END, uid))
        stretches = (*run.stretches[:-1], Stretch(job.started, now, job.node))
        self._runs[uid] = replace(run, end=now, outcome="Late", worth=0.0, stretches=stretches)
        again = again_of(self._offers[uid])
        self._left[uid] = job.ends - now + again, job.whole - now + again, run.outcome

    def _go_on(self, move: Move, now: float) -> None:
        """Let a job go on that was stopped for another."""
        uid, (given,) = move.offer_uid, move.assignments
        job, run = self._away.pop(uid), self._runs[uid]
        again, whole, outcome = self._left.pop(uid)
        due = math.inf if job.due is None else seconds_at(job.due)
        ends = now + again
        if ends > due:
            ends, outcome = due, "Late"
        earned = self._offers[uid].worth if outcome == "InTime" else 0.0
        stretches = (*run.stretches, Stretch(now, ends, given.node_name))
        self._runs[uid] = replace(run, end=ends, outcome=outcome, worth=earned, stretches=stretches)
        tells = now + again_of(self._offers[uid])
        self._start(uid, replace(job, node=given.node_name, started=now, ends=ends, whole=now + whole, tells=tells))


def _uid(number: int) -> str:
    """Return the UID of an offer by its place in the trace, so that ties are broken in this order."""
    return f"{number:08d}"


@lru_cache(maxsize=64)
def _said(reason: Reason) -> Condition:
    return Condition(
        type="Admitted", status=ConditionStatus.FALSE, reason=reason.value, message="", last_transition_time=START
    )
