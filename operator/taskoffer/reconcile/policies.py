"""CapacityPolicies: validate, remember the last good spec, show capacity. Written at most once per interval."""

from __future__ import annotations

import asyncio
import logging

from taskoffer.adapters.clock import monotonic, utcnow
from taskoffer.adapters.events import Subject
from taskoffer.adapters.kube import (
    POLICIES,
    ApiError,
    ConflictError,
    NotFoundError,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.adapters.metrics import GPUS
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicyStatus
from taskoffer.api.v1alpha1.meta import API_VERSION
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import open_ledger
from taskoffer.decision.policy_status import PolicyFacts, policy_status
from taskoffer.decision.snapshot import PolicyView, Snapshot
from taskoffer.reconcile.in_force import node_views
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import PolicyEntry, read
from taskoffer.render.patch import merge_patch

logger = logging.getLogger(__name__)

_REFUSED_PAUSE = 3600.0
"""Seconds until a status that the server has refused is tried again at the same version."""

_WARNINGS = (Reason.INVALID_POLICY, Reason.DEVICES_NOT_AVAILABLE, Reason.ALLOCATABLE_BELOW_BOOKED)


class Policies:
    """The CapacityPolicy loop of a leading replica."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._written: dict[str, float] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        """Versions whose status the server does not store, and when that is tried again."""

    async def run(self) -> None:
        """Write the policies' status whenever something about it may have changed, with a pause between."""
        while True:
            await self._session.policies_wanted.wait()
            self._session.policies_wanted.clear()
            if self._session.world.complete:
                for entry in list(self._session.world.policies):
                    await self._one(entry)
            await asyncio.sleep(self._session.settings.policy_status_interval)

    async def _one(self, entry: PolicyEntry) -> None:
        session, now = self._session, utcnow()
        snapshot = session.world.snapshot(now)
        view = snapshot.policies.get(entry.view.name)
        if view is None:
            # It is gone since the pass began.
            return
        before, _ = read(CapacityPolicyStatus, entry.status, "CapacityPolicy")
        made = policy_status(
            PolicyFacts(
                now=now,
                policy=view,
                generation=entry.generation,
                valid=not view.problem,
                nodes=tuple(node_views(session.world, view)),
                ledger=open_ledger(snapshot.claims),
                pending=_pending(snapshot, view.name),
                before=before or CapacityPolicyStatus(),
                shared=_shared(snapshot, view),
            )
        )
        if made.capacity is not None:
            GPUS.labels(entry.view.name, "total").set(made.capacity.total)
            GPUS.labels(entry.view.name, "used").set(made.capacity.used)
        if made == before:
            return
        version, again = self._refused.get(entry.view.uid, ("", 0.0))
        if version == entry.version and monotonic() < again:
            return
        due = self._written.get(entry.view.uid, 0.0) + session.settings.policy_pending_interval
        if (wait := due - monotonic()) > 0 and _counts_the_queue_only(before, made):
            asyncio.get_running_loop().call_later(wait, session.policies_wanted.set)
            return
        patch = {
            "metadata": {"resourceVersion": entry.version, "uid": entry.view.uid},
            "status": merge_patch(entry.status, made.to_wire()),
        }
        try:
            await session.write_status(session.world.policies, POLICIES, OfferKey("", entry.view.name), patch)
        except (ConflictError, NotFoundError) as error:
            logger.info("policy status overtaken", extra={"policy": entry.view.name, "error": str(error)})
            session.policies_wanted.set()
        except ApiError as error:
            logger.error("policy status refused", extra={"policy": entry.view.name, "error": str(error)})
            self._refused[entry.view.uid] = (entry.version, monotonic() + _REFUSED_PAUSE)
            subject = Subject(API_VERSION, "CapacityPolicy", None, entry.view.name, entry.view.uid)
            message = f"the API server does not store the policy's status: {error}"
            session.events.emit(subject, Reason.INVALID_POLICY, message, warning=True)
        except (ThrottledError, UnknownOutcomeError) as error:
            logger.warning("policy status not written", extra={"policy": entry.view.name, "error": str(error)})
            session.policies_wanted.set()
        else:
            self._written[entry.view.uid] = monotonic()
            self._tell(entry, before, made)

    def _tell(self, entry: PolicyEntry, before: CapacityPolicyStatus | None, made: CapacityPolicyStatus) -> None:
        known = {(c.type, c.reason) for c in before.conditions} if before else set()
        subject = Subject(API_VERSION, "CapacityPolicy", None, entry.view.name, entry.view.uid)
        for condition in made.conditions:
            good = condition.status == "True" and condition.type != "Ready"
            if (condition.type, condition.reason) not in known and not good:
                warning = condition.reason in _WARNINGS
                self._session.events.emit(subject, _reason(condition.reason), condition.message, warning=warning)


def _shared(snapshot: Snapshot, policy: PolicyView) -> dict[str, list[str]]:
    """Return the other policies by the nodes of this one that they hand out too."""
    shared: dict[str, list[str]] = {}
    for node in snapshot.nodes:
        if node.allocatable > 0 and policy.selects(node):
            others = [name for name, other in snapshot.policies.items() if name != policy.name and other.selects(node)]
            if others:
                shared[node.name] = others
    return shared


def _pending(snapshot: Snapshot, policy: str) -> int:
    """Return how many offers wait for a policy's decision or for its capacity."""
    standing = sum(len(group) for shape, group in snapshot.standing.items() if shape.policy == policy)
    return standing + sum(
        1
        for offer in snapshot.offers
        if offer.spec is not None and (found := snapshot.policy_for(offer.spec)[0]) and found.name == policy
    )


def _counts_the_queue_only(before: CapacityPolicyStatus | None, made: CapacityPolicyStatus) -> bool:
    """Tell whether nothing but the number of pending offers has changed."""
    if before is None or before.capacity is None or made.capacity is None:
        return False
    pending = made.capacity.pending
    return made == before.model_copy(update={"capacity": before.capacity.model_copy(update={"pending": pending})})


def _reason(value: str) -> Reason:
    return next(reason for reason in Reason if reason.value == value)
