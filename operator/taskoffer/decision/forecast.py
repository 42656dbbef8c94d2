"""When waiting offers are predicted to be admitted: the admission cycle itself, run on ahead on a virtual clock.

At each predicted end of a job its GPUs come free and a whole cycle decides. What it admits holds its GPUs for as long
as is predicted of it. Offers that are yet to come are not known, so this is what happens if none does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from taskoffer.api.base import rfc3339
from taskoffer.decision.cycle import Decision, plan
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, Release
from taskoffer.decision.moments import later
from taskoffer.decision.moves import Move
from taskoffer.decision.placed_jobs import Resumption, Running
from taskoffer.decision.preemption import Eviction, goes_on
from taskoffer.decision.rerun import undecided
from taskoffer.decision.snapshot import OfferView, Snapshot
from taskoffer.decision.timeline import end_expected
from taskoffer.decision.verdict import Verdict

STEPS = 64
"""Ends of jobs that are looked ahead to."""
_STOPS_IN = 60
"""Seconds that a job is taken to need to save and stop."""
SPREAD = 0.15
"""Standard deviation of the logarithm of measured over predicted time where a policy does not say it; the default of
``scoring.expectedValue.durationSpread``."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one run ahead has found."""

    starts: dict[str, datetime]
    """When offers are admitted, by UID."""
    refused: dict[str, str]
    """Why others are refused before that."""
    complete: bool
    """Whether the run ended because no end of a job is predicted any more, and not at its number of steps."""


@dataclass(slots=True)
class _Run:
    """One run ahead, with all remaining times longer or shorter by a factor."""

    snapshot: Snapshot
    factor: float
    pending: dict[str, OfferView]
    claims: list[Claim] = field(init=False)
    releases: list[Release] = field(init=False)
    running: dict[str, Running] = field(init=False)
    resumptions: dict[OfferKey, Resumption] = field(init=False)
    starts: dict[str, datetime] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = self.snapshot.now
        self.running = {running.holder: running for running in self.snapshot.running}
        self.resumptions = {waits.key: waits for waits in self.snapshot.resumptions}
        self.claims = list(self.snapshot.claims)
        self.releases = [
            replace(release, ends=later(now, (end_expected(release, now) - now).total_seconds() * self.factor))
            for release in self.snapshot.releases
        ]

    def run(self, steps: int) -> Forecast:
        """Decide now and at each of the next ends of jobs."""
        now = self.snapshot.now
        for _ in range(steps):
            self._cycle(now)
            if not self.pending or not self.releases:
                return Forecast(self.starts, self.refused, True)
            now = min(release.ends for release in self.releases)
            ended = {(r.holder, r.node) for r in self.releases if r.ends <= now}
            self.releases = [r for r in self.releases if r.ends > now]
            self.claims = [c for c in self.claims if (c.holder, c.node) not in ended]
            self._make_room({holder for holder, _ in ended})
        return Forecast(self.starts, self.refused, False)

    def _cycle(self, now: datetime) -> None:
        made = plan(
            replace(
                self.snapshot,
                now=now,
                offers=list(self.pending.values()),
                claims=self.claims,
                releases=self.releases,
                running=list(self.running.values()),
                resumptions=list(self.resumptions.values()),
                standing={},
                standing_end=None,
            )
        )
        for decision in made.decisions:
            if decision.answer.verdict is Verdict.WAIT:
                continue
            self.pending.pop(decision.offer.uid)
            if decision.answer.verdict is Verdict.ADMIT:
                self._start(decision, now)
            else:
                self.refused[decision.offer.uid] = (
                    f"refused as {decision.answer.reason} at about {rfc3339(now.replace(microsecond=0))}"
                )

        for move in made.moves:
            if move.key in self.resumptions:
                self._go_on(move, now)
        for eviction in made.evictions:
            self._stop(eviction, now)

    def _stop(self, eviction: Eviction, now: datetime) -> None:
        """Have a job end soon, for an offer."""
        self.running[eviction.holder] = replace(self.running[eviction.holder], leaving_for=eviction.preemptor_uid)
        soon = later(now, _STOPS_IN)
        self.releases = [replace(r, ends=soon) if r.holder == eviction.holder else r for r in self.releases]

    def _make_room(self, ended: Collection[str]) -> None:
        """Let the jobs that have ended for others wait to go on."""
        for holder in ended:
            gone = self.running.pop(holder, None)
            policy = self.snapshot.policies.get(gone.policy) if gone is not None else None
            rules = policy.spec.preemption if policy is not None and policy.spec is not None else None
            if gone is not None and gone.leaving_for is not None and rules is not None:
                self.resumptions[gone.key] = goes_on(gone, self.snapshot.now, rules.resume_seconds)

    def _go_on(self, move: Move, now: datetime) -> None:
        """Book what a job goes on with that was stopped for another."""
        waits, (part,) = self.resumptions.pop(move.key), move.assignments
        where = (move.offer_uid, part.node_name, part.count)
        ends = later(now, waits.occupies * self.factor)
        self.claims.append(Claim(*where, "admission", waits.policy, part.lane, waits.quota))
        self.releases.append(Release(*where, ends, waits.policy, part.lane, waits.quota, waits.name))

    def _start(self, decision: Decision, now: datetime) -> None:
        offer, admission, policy = decision.offer, decision.answer.admission, decision.policy
        assert admission is not None  # noqa: S101
        assert policy is not None  # noqa: S101
        self.starts[offer.uid] = now
        for part in admission.assignments:
            held = self.snapshot.evaluations[offer.uid, policy.name].seconds_on(part.count)
            ends = later(now, held * self.factor)
            where = (offer.uid, part.node_name, part.count)
            namespace = offer.key.namespace
            self.claims.append(Claim(*where, "admission", policy.name, part.lane, namespace, part.device_keys))
            self.releases.append(Release(*where, ends, policy.name, part.lane, namespace, str(offer.key)))


def forecasts(snapshot: Snapshot, offers: Sequence[OfferView], steps: int = STEPS) -> tuple[Forecast, ...]:
    """Run ahead with these waiting offers: as predicted, and with all remaining times shorter and longer by the spread.

    Args:
        snapshot: The world; of its offers only the given ones count.
        offers: Offers that have an evaluation in the snapshot.
        steps: Cycles that each of the three runs makes.
    """
    spread = spread_of(snapshot)
    factors = (1.0, math.exp(-spread), math.exp(spread))
    return tuple(_Run(snapshot, factor, {o.uid: undecided(o) for o in offers}).run(steps) for factor in factors)


def spread_of(snapshot: Snapshot) -> float:
    """Return how sure predicted times are: the widest spread that a policy states, else the usual one."""
    specs = (policy.spec for policy in snapshot.policies.values() if policy.spec is not None)
    stated = [float(s.scoring.expected_value.duration_spread) for s in specs if s.scoring.expected_value is not None]
    return max(stated, default=SPREAD)
