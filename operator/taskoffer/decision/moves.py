"""Places for the next attempts of jobs that cannot stay where they were."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.devices import assignment
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import best_fit
from taskoffer.decision.placed_jobs import MoveRequest, Resumption
from taskoffer.decision.room import Room
from taskoffer.decision.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Move:
    """GPUs for the next attempt of a job that cannot stay where it was."""

    key: OfferKey
    offer_uid: str
    assignments: tuple[Assignment, ...]


def find_moves(snapshot: Snapshot, room: Room) -> Iterable[Move]:
    """Find GPUs for attempts that must move. Their holder stays charged where its old pods still are."""
    ledger = room.timeline.ledger
    for request in snapshot.moves:
        policy = snapshot.policies.get(request.policy)
        if policy is None or policy.spec is None:
            if (found := _where_it_was(request, snapshot, room)) is not None:
                yield found
            continue
        allowed = [n for n in room.nodes(request.policy) if n.name not in request.avoid_nodes]
        kept = _kept_without_pods(snapshot, request.offer_uid)
        node = best_fit([n for n in allowed if n.name not in kept], ledger, request.count)
        again = node is None
        if node is not None:
            room.take(node.name, request.count)
        else:
            # Nowhere else is room, so the job may use the place again that is still booked for it.
            own = [n for n in allowed if n.ready and ledger.free(n) + kept.get(n.name, 0) >= request.count]
            node = min(own, key=lambda n: n.name, default=None)
        if node is None:
            continue
        devices = ledger.pick(request.offer_uid, node, request.count, again=again)
        made = assignment(policy.spec.resources[0], node.name, request.count, request.lane, devices)
        yield Move(request.key, request.offer_uid, (made,))


def resume(wanted: Resumption, snapshot: Snapshot, room: Room) -> Move | None:
    """Find GPUs for a job that was stopped for another, and book them. Its limits are those of a new job."""
    policy = snapshot.policies.get(wanted.policy)
    if policy is None or policy.spec is None:
        return _where_it_was(wanted, snapshot, room)
    if room.obstacle(policy, wanted) is not None:
        return None
    node = room.place(policy, wanted, wanted.offer_uid, wanted.name)
    devices = room.timeline.ledger.pick(wanted.offer_uid, node, wanted.gpus)
    made = assignment(policy.spec.resources[0], node.name, wanted.gpus, wanted.lane, devices)
    return Move(wanted.key, wanted.offer_uid, (made,))


def _where_it_was(wanted: MoveRequest | Resumption, snapshot: Snapshot, room: Room) -> Move | None:
    """Let a job go on whose policy is gone: on the node that the policy gave it, and on no other.

    Devices are known under a policy only, so a job that has chosen ones waits until there is one again.
    """
    last, ledger = wanted.last, room.timeline.ledger
    avoided = wanted.avoid_nodes if isinstance(wanted, MoveRequest) else frozenset()
    if last is None or last.device_class_name is not None or last.node_name in avoided:
        return None
    node = next((n for n in snapshot.nodes if n.name == last.node_name and n.ready), None)
    kept = _kept_without_pods(snapshot, wanted.offer_uid).get(last.node_name, 0)
    if node is None or ledger.free(node) + kept < last.count:
        return None
    room.take(node.name, last.count - min(kept, last.count))
    return Move(wanted.key, wanted.offer_uid, (last,))


def _kept_without_pods(snapshot: Snapshot, holder: str) -> dict[str, int]:
    """Return the GPUs by node that are booked for a holder although none of its Jobs or pods has them any more."""
    own = [c for c in snapshot.claims if c.holder == holder]
    in_use = {c.node for c in own if c.source in ("job", "pod", "claim")}
    return {c.node: c.count for c in own if c.node not in in_use}
