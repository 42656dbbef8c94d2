"""The ranked offers and the standing groups of a cycle, merged into one order."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from taskoffer.decision.in_time import none_in_time
from taskoffer.decision.placed_jobs import Order
from taskoffer.decision.room import Room
from taskoffer.decision.snapshot import Shape, Snapshot, Waiting

Queue = tuple[Shape | None, Sequence[Waiting]]
Head = tuple[Order, int, int]
"""The first offer of a queue that has not had its turn: its place in the order, the queue's number, and where in it."""


def by_rank(
    ranked: Sequence[Waiting],
    snapshot: Snapshot,
    room: Room,
    passed_over: Callable[[Shape, Sequence[Waiting], int], int],
    may_sleep: Callable[[], bool],
) -> Iterator[tuple[Shape | None, Waiting]]:
    """Yield the offers that need a look, in order, with the shape of those from a standing group.

    A group of offers for which no count that is free is in time sleeps until the room changes, and goes on from its
    place then.

    Args:
        ranked: The offers that are in no group, in order.
        snapshot: The groups, and the policies.
        room: What is free; it changes while the caller decides what was yielded.
        passed_over: How many offers of a group, from one on, need no look, and takes that in.
        may_sleep: Whether nothing but what is yielded changes the room any more.
    """
    queues: list[Queue] = [(None, ranked), *snapshot.standing.items()]
    heads: list[Head] = [(queue[0].order, number, 0) for number, (_, queue) in enumerate(queues) if queue]
    heapq.heapify(heads)
    asleep: list[tuple[int, int]] = []
    while heads:
        order, number, at = heads[0]
        shape, queue = queues[number]
        if shape is not None and shape.in_time and may_sleep() and _hopeless(shape, queue[at], snapshot, room):
            asleep.append((number, at))
            heapq.heappop(heads)
            continue
        changes = room.changes
        step = passed_over(shape, queue, at) if shape is not None else 0
        if step == 0:
            yield shape, queue[at]
            step = 1
        if at + step < len(queue):
            heapq.heapreplace(heads, (queue[at + step].order, number, at + step))
        else:
            heapq.heappop(heads)
        if asleep and room.changes != changes:
            for head in _woken(queues, asleep, order, room):
                heapq.heappush(heads, head)
    room.passed_over += sum(len(queues[number][1]) - at for number, at in asleep)


def _hopeless(shape: Shape, found: Waiting, snapshot: Snapshot, room: Room) -> bool:
    return none_in_time(room, snapshot.policies[shape.policy], found.evaluation, shape.in_time, shape.reason)


def _woken(queues: Sequence[Queue], asleep: list[tuple[int, int]], order: Order, room: Room) -> Iterator[Head]:
    """Wake up all groups: those before this place in the order have slept through their turn."""
    for number, slept in asleep:
        queue = queues[number][1]
        at = bisect_left(queue, order, lo=slept, key=lambda found: found.order)
        room.passed_over += at - slept
        if at < len(queue):
            yield queue[at].order, number, at
    asleep.clear()
