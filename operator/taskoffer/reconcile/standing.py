"""Offers that wait with an answer that still holds, kept in the order in which they would be admitted.

A long queue hardly changes from one cycle to the next. So offers that a cycle need not look at one by one are kept in
groups of like ones; a cycle asks once per group whether what stands in its way still does.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from datetime import datetime

from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.in_time import next_look
from taskoffer.decision.snapshot import OfferView, Shape, Waiting, next_raise, waiting

_FEW = 256
"""As long as changes are fewer than one in so many, they are made one by one; more are sorted in together."""


class _Group:
    """Offers in order. What comes and goes is taken in when somebody looks, so that many cost one pass."""

    def __init__(self) -> None:
        self._ordered: list[Waiting] = []
        self._come: dict[str, Waiting] = {}
        self._gone: dict[str, Waiting] = {}

    def add(self, place: Waiting) -> None:
        self._come[place.offer.uid] = place

    def drop(self, place: Waiting) -> None:
        if self._come.pop(place.offer.uid, None) is None:
            self._gone[place.offer.uid] = place

    def in_order(self) -> list[Waiting]:
        ordered = self._ordered
        if len(self._gone) * _FEW > len(ordered):
            self._ordered = ordered = [place for place in ordered if place.offer.uid not in self._gone]
        else:
            for place in self._gone.values():
                del ordered[bisect_left(ordered, place)]
        if len(self._come) * _FEW > len(ordered):
            ordered.extend(self._come.values())
            ordered.sort()
        else:
            for place in self._come.values():
                insort(ordered, place)
        self._gone.clear()
        self._come.clear()
        return ordered


class Standing:
    """The groups, and where each offer is in them."""

    def __init__(self) -> None:
        self._groups: dict[Shape, _Group] = {}
        self._place: dict[str, tuple[Shape, Waiting, datetime | None, datetime | None]] = {}
        self._ends: list[tuple[datetime, str]] = []
        self._turns: list[tuple[datetime, str]] = []

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, uid: str) -> bool:
        return uid in self._place

    @property
    def groups(self) -> dict[Shape, list[Waiting]]:
        """The offers of each group, in order."""
        found = {shape: group.in_order() for shape, group in self._groups.items()}
        for shape in [shape for shape, ordered in found.items() if not ordered]:
            del self._groups[shape], found[shape]
        return found

    def add(self, shape: Shape, offer: OfferView, evaluation: Evaluation, now: datetime) -> None:
        """Add an offer that is in no group.

        It stays until it ends, until its waiting raises its priority, or until it has become too late for one of the
        counts that it may choose from.
        """
        place = waiting(offer, evaluation, now)
        self._groups.setdefault(shape, _Group()).add(place)
        ends, turns = next_look(offer, evaluation, now), next_raise(offer, evaluation, now)
        self._place[offer.uid] = shape, place, ends, turns
        if ends is not None:
            heapq.heappush(self._ends, (ends, offer.uid))
        if turns is not None:
            heapq.heappush(self._turns, (turns, offer.uid))
        self._tidy()

    def _tidy(self) -> None:
        """Leave out moments of offers that have changed since, once they are most of what is kept."""
        if len(self._ends) + len(self._turns) <= 4 * len(self._place) + 64:
            return
        self._ends = [(ends, uid) for uid, (_, _, ends, _) in self._place.items() if ends is not None]
        self._turns = [(turns, uid) for uid, (_, _, _, turns) in self._place.items() if turns is not None]
        heapq.heapify(self._ends)
        heapq.heapify(self._turns)

    def drop(self, uid: str) -> bool:
        """Take an offer out. Tell whether it was there."""
        found = self._place.pop(uid, None)
        if found is None:
            return False
        shape, place, _, _ = found
        self._groups[shape].drop(place)
        return True

    def clear(self) -> list[str]:
        """Take all offers out and return their UIDs."""
        uids = list(self._place)
        self._groups.clear()
        self._place.clear()
        self._ends.clear()
        self._turns.clear()
        return uids

    def drop_ended(self, now: datetime) -> list[str]:
        """Take out the offers whose time has come, or that count more by now, and return their UIDs."""
        ended = []
        for moments, which in ((self._ends, 2), (self._turns, 3)):
            while moments and (moments[0][0] <= now or self._stale(moments[0], which)):
                moment = heapq.heappop(moments)
                if not self._stale(moment, which) and self.drop(moment[1]):
                    ended.append(moment[1])
        return ended

    @property
    def soonest_end(self) -> datetime | None:
        """When the next standing offer ends or loses one of its counts, as far as ``drop_ended`` has left one."""
        return self._ends[0][0] if self._ends else None

    def _stale(self, moment: tuple[datetime, str], which: int) -> bool:
        """Tell whether an offer has left, or came back with another moment."""
        found = self._place.get(moment[1])
        return found is None or found[which] != moment[0]
