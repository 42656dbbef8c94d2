"""Places for the next attempts of jobs that cannot stay where they were."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from taskoffer.api.v1alpha1.meta import Assignment
from taskoffer.decision.ledger import best_fit
from taskoffer.decision.room import Room
from taskoffer.decision.snapshot import OfferKey, Resumption, Snapshot


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
            continue
        allowed = [n for n in room.nodes(request.policy) if n.name not in request.avoid_nodes]
        kept = _kept_without_pods(snapshot, request.offer_uid)
        node = best_fit([n for n in allowed if n.name not in kept], ledger, request.count)
        if node is not None:
            ledger.booked[node.name] = ledger.booked.get(node.name, 0) + request.count
        else:
            # Nowhere else is room, so the job may use the place again that is still booked for it.
            own = [n for n in allowed if n.ready and ledger.free(n) + kept.get(n.name, 0) >= request.count]
            node = min(own, key=lambda n: n.name, default=None)
        if node is None:
            continue
        yield Move(
            request.key,
            request.offer_uid,
            (
                Assignment(
                    node_name=node.name,
                    resource_name=policy.spec.resources[0].name,
                    count=request.count,
                    lane=request.lane,
                ),
            ),
        )


def resume(wanted: Resumption, snapshot: Snapshot, room: Room) -> Move | None:
    """Find GPUs for a job that was stopped for another, and book them. Its limits are those of a new job."""
    policy = snapshot.policies.get(wanted.policy)
    if policy is None or policy.spec is None or room.obstacle(policy, wanted) is not None:
        return None
    node = room.place(policy, wanted, wanted.offer_uid, wanted.name)
    return Move(
        wanted.key,
        wanted.offer_uid,
        (
            Assignment(
                node_name=node.name,
                resource_name=policy.spec.resources[0].name,
                count=wanted.gpus,
                lane=wanted.lane,
            ),
        ),
    )


def _kept_without_pods(snapshot: Snapshot, holder: str) -> dict[str, int]:
    """Return the GPUs by node that are booked for a holder although none of its Jobs or pods has them any more."""
    own = [c for c in snapshot.claims if c.holder == holder]
    in_use = {c.node for c in own if c.source in ("job", "pod")}
    return {c.node: c.count for c in own if c.node not in in_use}
