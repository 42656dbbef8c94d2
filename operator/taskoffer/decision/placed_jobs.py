"""Jobs of admitted offers, as far as a cycle may move, stop or resume them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.moments import later


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """A job whose next attempt needs other GPUs than the last one (its node is lost, or it never started)."""

    key: OfferKey
    offer_uid: str
    policy: str
    count: int
    lane: str | None
    avoid_nodes: frozenset[str]
    last: Assignment | None = None
    """Where it was."""
    goes_on: bool = False
    """Whether it was stopped for another offer: then it holds nothing, and waits for its turn."""


Order = tuple[int, float, int, datetime, str]
"""Where an offer stands among those that wait: negative priority, deadline, negative score, creation time, UID."""


@dataclass(frozen=True, slots=True)
class Running:
    """An admitted job that runs, under a policy that may have it stopped for others."""

    key: OfferKey
    """The TrainingJob."""
    holder: str
    """UID of its offer."""
    name: str
    """Its offer, for people."""
    policy: str
    node: str
    gpus: int
    lane: str | None
    quota: str | None
    """Its namespace, where the policy limits its GPUs."""
    level: int
    """Its priority, 0 for the lowest."""
    started: datetime
    """When its attempt did."""
    ends: datetime
    """When it is predicted to."""
    deadline: datetime | None
    preempted: int = 0
    """How often it has been stopped already."""
    score: float = 0.0
    """What its offer scored: the expected earnings for each GPU-hour, where the policy scores by expected value."""
    at_stake: float = 0.0
    """What it would lose if it were certain to be late instead of certain to be in time."""
    leaving_for: str | None = None
    """UID of the offer for which it has been asked to stop."""
    heir_is_gone: bool = False
    """Whether that offer does not wait any more."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """A job that was stopped for another and waits for GPUs to go on."""

    key: OfferKey
    """The TrainingJob."""
    offer_uid: str
    name: str
    policy: str
    gpus: int
    lane: str | None
    quota: str | None
    level: int
    since: datetime
    """When its offer was created."""
    occupies: float
    """Seconds that it still needs, with what going on costs."""
    left_for: str
    """UID of the offer that it was stopped for."""
    deadline: datetime | None
    last: Assignment | None = None
    """Where it was."""

    def order(self, now: datetime) -> Order:
        """Return its place among the offers: what was promised before comes first in its priority.

        Once it cannot be expected to end in time any more it comes last of all, and only takes what nobody waits for.
        """
        late = self.deadline is not None and later(now, self.occupies) > self.deadline
        level, place = (1, math.inf) if late else (-self.level, -math.inf)
        return level, place, 0, self.since, self.offer_uid
