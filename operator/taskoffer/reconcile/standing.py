"""Offers that wait with an answer that still holds, kept in the order in which they would be admitted.

A long queue hardly changes from one cycle to the next. So offers that a cycle need not look at one by one are kept in
groups of like ones; a cycle asks once per group whether what stands in its way still does.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from datetime import datetime

from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.snapshot import OfferView, Shape, Waiting, end_of


class Standing:
    """The groups, and where each offer is in them."""

    def __init__(self) -> None:
        self.groups: dict[Shape, list[Waiting]] = {}
        self._place: dict[str, tuple[Shape, Waiting]] = {}
        self._ends: list[tuple[datetime, str]] = []

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, uid: str) -> bool:
        return uid in self._place

    def add(self, shape: Shape, offer: OfferView, evaluation: Evaluation) -> None:
        """Add an offer that is in no group."""
        waiting = (-evaluation.rank, offer.created, offer.uid, offer, evaluation)
        insort(self.groups.setdefault(shape, []), waiting)
        self._place[offer.uid] = shape, waiting
        ends = end_of(offer, evaluation)
        if ends is not None:
            heapq.heappush(self._ends, (ends, offer.uid))

    def drop(self, uid: str) -> bool:
        """Take an offer out. Tell whether it was there."""
        found = self._place.pop(uid, None)
        if found is None:
            return False
        shape, waiting = found
        group = self.groups[shape]
        del group[bisect_left(group, waiting)]
        if not group:
            del self.groups[shape]
        return True

    def clear(self) -> list[str]:
        """Take all offers out and return their UIDs."""
        uids = list(self._place)
        self.groups.clear()
        self._place.clear()
        self._ends.clear()
        return uids

    def drop_ended(self, now: datetime) -> list[str]:
        """Take out the offers whose time has come, and return their UIDs."""
        ended = []
        while self._ends and (self._ends[0][0] <= now or self._stale(*self._ends[0])):
            _, uid = heapq.heappop(self._ends)
            if self.drop(uid):
                ended.append(uid)
        return ended

    @property
    def soonest_end(self) -> datetime | None:
        """The next end of a standing offer, as far as ``drop_ended`` has left one."""
        return self._ends[0][0] if self._ends else None

    def _stale(self, ends: datetime, uid: str) -> bool:
        """Tell whether an offer has left, or came back with another end."""
        found = self._place.get(uid)
        return found is None or end_of(found[1][3], found[1][4]) != ends
