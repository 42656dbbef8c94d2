"""Which running jobs are to stop for an offer that waits.

A job that is stopped saves, gives its GPUs back and goes on later, so what it loses is time. It is chosen only where
it is predicted to end in time all the same. Of those, the lowest priorities go first, then those that are expected to
lose the least for each GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.preemption import Preemption
from taskoffer.api.v1alpha1.trainingjob import TrainingJobStatus
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.lack import Lack
from taskoffer.decision.moments import later
from taskoffer.decision.placed_jobs import Resumption, Running
from taskoffer.decision.room import Obstacle, Room
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot, end_of

_CURABLE = frozenset(
    {
        Reason.WAITING_FOR_CAPACITY,
        Reason.WAITING_FOR_LANE,
        Reason.WAITING_FOR_JOB_SLOT,
        Reason.WAITING_FOR_QUOTA,
    }
)
"""What stands in an offer's way that the end of a running job can remove."""
_LEAST_REMAINING = 60.0
"""Seconds that a running job is taken to need at least."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """A running job that is to save and stop, and the offer that gets its GPUs."""

    key: OfferKey
    """The TrainingJob."""
    holder: str
    """UID of the job's own offer."""
    preemptor: OfferKey
    preemptor_uid: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Where an offer is to start, and which jobs end there for it."""

    node: str
    leaving: tuple[Running, ...]
    """All that it waits for: those that were asked to stop before, and those that are to be asked now."""
    cost: float
    """What those that are asked now are expected to lose."""

    @property
    def asked_now(self) -> tuple[Running, ...]:
        """Those that have not been asked to stop yet."""
        return tuple(running for running in self.leaving if running.leaving_for is None)

    @property
    def gpus(self) -> int:
        """GPUs that come free."""
        return sum(running.gpus for running in self.leaving)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running job that may end for an offer."""

    level: int
    """Its priority; below all others once it has been asked to stop anyhow."""
    cost: float
    running: Running

    @property
    def place(self) -> tuple[int, float, int, int, str]:
        """Where it stands among all: the lowest first."""
        running = self.running
        return self.level, self.cost / running.gpus, running.preempted, running.gpus, running.holder


@dataclass(slots=True)
class Preemptions:
    """What can be taken back while a cycle decides. What one offer is promised no other one counts on."""

    snapshot: Snapshot
    evictions: list[Eviction] = field(default_factory=list)
    _jobs: dict[str, dict[str, list[Running]]] = field(init=False)
    """By policy and node: those that may be asked to stop, and those that have been."""
    _young: dict[str, datetime] = field(default_factory=dict)
    """By policy: when the next job has run long enough to be asked."""
    _in_vain: dict[tuple[object, ...], list[tuple[float, float]]] = field(init=False)
    """By kind of offer: how long those would run and what they would earn for which nobody can be stopped."""
    _heirs: Collection[str] = field(init=False)

    def __post_init__(self) -> None:
        self._jobs = defaultdict(lambda: defaultdict(list))
        self._in_vain = defaultdict(list)
        self._heirs = self.snapshot.heirs
        for running in self.snapshot.running:
            policy = self.snapshot.policies.get(running.policy)
            rules = policy.spec.preemption if policy is not None and policy.spec is not None else None
            if rules is not None:
                self._sort_in(running, rules)

    def _sort_in(self, running: Running, rules: Preemption) -> None:
        if running.leaving_for is None and running.preempted >= rules.max_preemptions:
            return
        ripe = later(running.started, rules.min_run_seconds)
        if running.leaving_for is None and ripe > self.snapshot.now:
            self._young[running.policy] = min(ripe, self._young.get(running.policy, ripe))
            return
        self._jobs[running.policy][running.node].append(running)

    def next_at(self, policy: str) -> datetime | None:
        """Return when another job of the policy has run long enough, or None where time changes nothing."""
        return self._young.get(policy)

    def may_stop_any(self, policy: PolicyView, room: Room) -> bool:
        """Tell whether there is any job of the policy left to stop, on a node that is not kept."""
        return any(name not in room.reservations for name in self._jobs.get(policy.name, ()))

    def deserves_a_look(self, policy: PolicyView, offer: OfferView, evaluation: Evaluation, room: Room) -> bool:
        """Tell whether jobs may be stopped for an offer, as far as that can be told without a search."""
        if policy.spec is None or policy.spec.preemption is None or not self.may_stop_any(policy, room):
            return False
        # That something ends in time for an heir is because of it.
        weighed = policy.spec.preemption.gain_factor is not None and offer.uid not in self._heirs
        return not weighed or self._would_miss(room, policy, offer, evaluation)

    def choose(
        self, room: Room, policy: PolicyView, offer: OfferView, evaluation: Evaluation, obstacle: Obstacle
    ) -> Choice | None:
        """Return which jobs are to end for an offer that something stands in the way of, or None."""
        spec = policy.spec
        if obstacle.reason not in _CURABLE or not evaluation.preempts or spec is None or spec.preemption is None:
            return None
        if not self.deserves_a_look(policy, offer, evaluation, room):
            return None
        if self._tried_in_vain(policy, offer, evaluation):
            return None
        nodes = (n for n in room.nodes(policy.name) if n.ready and n.allocatable >= evaluation.gpus)
        # Whoever stops goes on later, so on a kept node each stop would put off the start that it is kept for.
        jobs = {name: on for name, on in self._jobs[policy.name].items() if name not in room.reservations}
        found = (
            self._on(spec, room.lack(policy, n, evaluation), offer, evaluation, jobs[n.name])
            for n in nodes
            if n.name in jobs
        )
        best = min((c for c in found if c is not None), key=lambda c: (c.cost, c.gpus, c.node), default=None)
        if best is None or not self._gains(spec.preemption, evaluation, best.cost):
            tried = evaluation.occupies, _earns(spec.preemption, evaluation)
            self._in_vain[_kind_of(policy, evaluation)].append(tried)
            return None
        return best

    def _tried_in_vain(self, policy: PolicyView, offer: OfferView, evaluation: Evaluation) -> bool:
        """Tell whether the search was in vain for an offer of the kind that runs no longer and earns no less.

        During a cycle less and less can be stopped, and the longer an offer runs the more it costs the others.
        """
        rules = policy.spec.preemption if policy.spec is not None else None
        if rules is None or offer.uid in self._heirs:
            # Those who stop for it count for nobody else.
            return False
        earns = _earns(rules, evaluation)
        tried = self._in_vain.get(_kind_of(policy, evaluation), ())
        return any(runs <= evaluation.occupies and earned >= earns for runs, earned in tried)

    def take(self, room: Room, policy: PolicyView, offer: OfferView, evaluation: Evaluation, choice: Choice) -> None:
        """Promise an offer what its choice frees; what it needs beside that is kept for it now."""
        on_node = self._jobs[policy.name][choice.node]
        left = [running for running in on_node if running not in choice.leaving]
        if left:
            self._jobs[policy.name][choice.node] = left
        else:
            del self._jobs[policy.name][choice.node]
        self.evictions.extend(
            Eviction(running.key, running.holder, offer.key, offer.uid) for running in choice.asked_now
        )
        beside = evaluation.gpus - choice.gpus
        if beside > 0:
            room.hold(policy.name, offer.uid, choice.node, beside, evaluation)

    @staticmethod
    def _gains(rules: Preemption, evaluation: Evaluation, cost: float) -> bool:
        """Tell whether an offer is expected to earn enough for what it costs the others."""
        if rules.gain_factor is None or cost <= 0:
            return True
        return _earns(rules, evaluation) >= float(rules.gain_factor) * cost

    @staticmethod
    def _would_miss(room: Room, policy: PolicyView, offer: OfferView, evaluation: Evaluation) -> bool:
        """Tell whether an offer is gone before anything comes free for it by itself."""
        ends = end_of(offer, evaluation)
        if ends is None:
            return False
        opening = room.opening(policy, evaluation)
        return opening is None or opening.at >= ends

    def _on(
        self, spec: CapacityPolicySpec, lack: Lack, offer: OfferView, evaluation: Evaluation, jobs: Sequence[Running]
    ) -> Choice | None:
        """Return which jobs are to end so that an offer can start on a node, or None."""
        rules = spec.preemption
        assert rules is not None  # noqa: S101
        candidates: list[Candidate] = []
        for running in jobs:
            if running.leaving_for is not None:
                if running.leaving_for == offer.uid or running.heir_is_gone:
                    candidates.append(Candidate(-1, 0.0, running))
            elif _allows(rules, spec, evaluation, running):
                cost = self._cost(rules, spec, evaluation, running)
                if cost is not None:
                    candidates.append(Candidate(running.level, cost, running))
        chosen = min(_enough(lack, candidates), key=_dearness, default=None)
        if chosen is None:
            return None
        return Choice(lack.node, tuple(one.running for one in chosen), sum(one.cost for one in chosen))

    def _cost(
        self, rules: Preemption, spec: CapacityPolicySpec, evaluation: Evaluation, running: Running
    ) -> float | None:
        """Return what a job is expected to lose when it goes on after the offer, or None where it would be late.

        That is the GPU-hours that going on takes and, by expected value, what those are worth and what the probability
        of ending in time loses.
        """
        now = self.snapshot.now
        left = max(_LEAST_REMAINING, (running.ends - now).total_seconds())
        again = left + rules.resume_seconds
        scoring = spec.scoring.expected_value
        worth = max(0.0, running.score) if scoring is not None else 1.0
        cost = worth * running.gpus * rules.resume_seconds / 3600
        if running.deadline is None:
            return cost
        until = (running.deadline - now).total_seconds()
        then = until - evaluation.occupies
        if then < again:
            return None
        spread = float(scoring.duration_spread) if scoring is not None else 0.0
        if spread > 0:
            cost += running.at_stake * max(0.0, _in_time(until, left, spread) - _in_time(then, again, spread))
        return cost


def _kind_of(policy: PolicyView, evaluation: Evaluation) -> tuple[object, ...]:
    """Return what offers have in common for which the same jobs may be stopped."""
    level = evaluation.priority.level if evaluation.priority is not None else 0
    return policy.name, evaluation.gpus, evaluation.lane, evaluation.quota, level


def _earns(rules: Preemption, evaluation: Evaluation) -> float:
    """Return what an offer is expected to earn more than others would with its GPU-hours; unweighed it is enough."""
    if rules.gain_factor is None or evaluation.score is None:
        return math.inf
    gained = float(evaluation.score.total) - float(rules.gpu_hour_price)
    return gained * evaluation.gpus * evaluation.occupies / 3600


def goes_on(gone: Running, now: datetime, resume_seconds: float) -> Resumption:
    """Return the wait of a job that has been stopped, of which nothing is known but what was predicted at a moment."""
    assert gone.leaving_for is not None  # noqa: S101
    return Resumption(
        key=gone.key,
        offer_uid=gone.holder,
        name=gone.name,
        policy=gone.policy,
        gpus=gone.gpus,
        lane=gone.lane,
        quota=gone.quota,
        level=gone.level,
        since=gone.started,
        occupies=left_of((gone.ends - now).total_seconds(), 0) + resume_seconds,
        left_for=gone.leaving_for,
        deadline=gone.deadline,
    )


def seconds_left(status: TrainingJobStatus, needed: float) -> float:
    """Return the seconds that a stopped job still needs: as its trainer said last, else as predicted less its runs.

    Args:
        status: The job's.
        needed: What was predicted for the whole of it.
    """
    runs = [(a.started_at, a.finished_at) for a in status.attempts if a.started_at and a.finished_at]
    told = status.trainer_status
    if told is not None and told.estimated_remaining_seconds is not None and runs:
        since, until = runs[-1]
        if since <= told.last_updated_time:
            passed = max(0.0, (until - told.last_updated_time).total_seconds())
            return left_of(told.estimated_remaining_seconds, passed)
    return left_of(needed, sum((until - since).total_seconds() for since, until in runs))


def left_of(needed: float, ran: float) -> float:
    """Return the seconds that a job is taken to need still when it has run for some of those that it was to need."""
    return max(_LEAST_REMAINING, needed - ran)


def _allows(rules: Preemption, spec: CapacityPolicySpec, evaluation: Evaluation, running: Running) -> bool:
    """Tell whether the policy lets an offer take from a running job, by their priorities."""
    if not rules.rules:
        return True
    names = spec.queue.priorities if spec.queue is not None else ()
    own = evaluation.priority.level if evaluation.priority is not None else 0
    return any(names[own] in rule.by and names[running.level] in rule.of for rule in rules.rules)


def _enough(lack: Lack, candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Yield who could end to give what is lacking: each one that does alone, and several, the least dear first."""
    yield from ([one] for one in candidates if lack.met_by((one.running,)))
    if not lack.met_by(one.running for one in candidates):
        return
    taken: list[Candidate] = []
    left = lack
    for one in sorted(candidates, key=lambda it: it.place):
        if left.met_by(()):
            break
        if left.helped_by(one.running):
            taken.append(one)
            left = left.without(one.running)
    for one in reversed(tuple(taken)):
        others = [it for it in taken if it is not one]
        if lack.met_by(it.running for it in others):
            taken = others
    yield taken


def _dearness(chosen: Sequence[Candidate]) -> tuple[int, float, int, int, list[str]]:
    """Return how dear it is that some jobs end: the highest priority, the cost, the GPUs, their number, and names."""
    level, cost = max(one.level for one in chosen), sum(one.cost for one in chosen)
    gpus, names = sum(one.running.gpus for one in chosen), sorted(one.running.holder for one in chosen)
    return level, round(cost, 6), gpus, len(chosen), names


def _in_time(limit: float, predicted: float, spread: float) -> float:
    """Return the probability that what is predicted to take so long ends within the limit, as ``value.py`` does."""
    return 0.5 * (1 + math.erf(math.log(limit / predicted) / (spread * math.sqrt(2)))) if limit > 0 else 0.0
