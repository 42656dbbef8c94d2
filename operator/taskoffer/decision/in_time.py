"""Offers that may choose their count of GPUs: on which they are in time, and whether one of those may be free."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from taskoffer.api.reasons import Reason
from taskoffer.decision.evaluate import Evaluation
from taskoffer.decision.moments import later
from taskoffer.decision.room import Room
from taskoffer.decision.snapshot import OfferView, PolicyView, can_start, end_of
from taskoffer.decision.want import Asked


def counts_in_time(offer: OfferView, evaluation: Evaluation, moment: datetime) -> tuple[int, ...]:
    """Return the counts, of those that an offer may choose from, on which it is in time when it starts at a moment.

    They only become fewer with time.
    """
    return tuple([option.gpus for option in evaluation.options if can_start(offer, evaluation, option, moment)])


def next_too_slow(offer: OfferView, evaluation: Evaluation, now: datetime) -> datetime | None:
    """Return when the next of the counts that an offer may choose from becomes too slow for it; None when none does."""
    if not evaluation.options or offer.spec is None or offer.spec.deadline is None:
        return None
    ends = (later(offer.spec.deadline, -option.needed) for option in evaluation.options)
    return min((end for end in ends if end > now), default=None)


def next_look(offer: OfferView, evaluation: Evaluation | None, now: datetime) -> datetime | None:
    """Return when time alone changes what an offer waits for: it ends, or one of its counts becomes too slow."""
    moments = (end_of(offer, evaluation), next_too_slow(offer, evaluation, now) if evaluation is not None else None)
    return min((moment for moment in moments if moment is not None), default=None)


def none_in_time(room: Room, policy: PolicyView, evaluation: Evaluation, in_time: Collection[int], reason: str) -> bool:
    """Tell whether offers of one kind go on waiting for this reason.

    They do when none of the counts that are free now is in time for them, and nothing says when another one will be.
    That holds until the room changes, and for all of them: where a reservation lends GPUs to the shorter ones only,
    nothing is said.

    Args:
        room: What is free.
        policy: Their policy.
        evaluation: The evaluation of one of them; of the others the counts are the same.
        in_time: The counts on which one of them may still be in time for its deadline.
        reason: What their status gives.
    """
    if evaluation.spare_share is not None:
        # They wait for one count at a time, and that is one on which they are in time.
        return False
    told = None
    for option in evaluation.options:
        asked = Asked(option.gpus, evaluation.lane, evaluation.quota, option.seconds)
        obstacle, may_be = room.obstacle(policy, asked), option.gpus in in_time
        if not room.same_for_all(policy, asked):
            return False
        if obstacle is None:
            if may_be:
                return False
            continue
        if option.gpus == evaluation.gpus or room.rejects(policy, obstacle):
            return False
        if may_be and room.opening(policy, asked) is not None:
            return False
        told = told or obstacle.reason
    return (told or Reason.WAITING_FOR_CAPACITY).value == reason
