"""Leader election over a coordination.k8s.io Lease.

The official client's elector goes on leading after a connection error, waits up to minutes on a hung call and renews
after its task has crashed. Here every call has a bound, leadership is judged on a monotonic clock counted from
*before* the renewing request was sent, and a leader that cannot renew in time is told so before anybody else can be
one (as in client-go: renew deadline < lease duration).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from taskoffer.adapters.clock import monotonic, utcnow
from taskoffer.adapters.kube import (
    LEASES,
    ApiError,
    ConflictError,
    Kube,
    NotFoundError,
    ThrottledError,
    UnknownOutcomeError,
)

logger = logging.getLogger(__name__)

_MICRO_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


class LeadershipLostError(Exception):
    """The lease could not be renewed in time, or somebody else holds it."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds: how long a lease counts, how long its holder may act on it, how often it is renewed.

    A candidate looks at it every ``poll_period``, so that one that was given up is soon taken.
    """

    duration: float = 9.0
    renew_deadline: float = 6.5
    retry_period: float = 1.0
    poll_period: float = 0.2

    def __post_init__(self) -> None:
        if not self.retry_period < self.renew_deadline < self.duration:
            raise ValueError(
                f"retry period {self.retry_period} < renew deadline {self.renew_deadline} < lease duration "
                f"{self.duration} does not hold: choose the times in this order"
            )


class Lease:
    """One candidate's view of the lease."""

    def __init__(self, kube: Kube, namespace: str, name: str, identity: str, times: LeaseTimes) -> None:
        self._kube = kube
        self._namespace, self._name = namespace, name
        self.identity = identity
        self.times = times
        self._held_until = 0.0
        self._seen: tuple[str, float] | None = None
        self.transitions = 0
        self.released_before = False
        """Whether the holder before gave the lease up itself, with all its writes finished."""
        self.missing_before = False
        """Whether there was no lease: nobody has led yet, or somebody removed it from a leader."""

    @property
    def held(self) -> bool:
        """Tell whether this candidate may act right now."""
        return monotonic() < self._held_until

    def check(self) -> None:
        """Raise LeadershipLostError unless this candidate may act right now. Call it before each write."""
        if not self.held:
            raise LeadershipLostError(f"{self.identity} does not hold the lease {self._namespace}/{self._name}")

    async def acquire(self) -> None:
        """Wait until this candidate holds the lease."""
        # Polling is the protocol: nothing tells a candidate that a lease has run out.
        while not await self._try():  # noqa: ASYNC110
            await asyncio.sleep(self.times.poll_period)
        logger.info("lease acquired", extra={"lease": self._name, "identity": self.identity})

    async def keep(self) -> None:
        """Renew for ever; raise LeadershipLostError when the renew deadline has passed."""
        while True:
            await asyncio.sleep(self.times.retry_period)
            if not await self._try() and not self.held:
                raise LeadershipLostError(f"{self.identity} could not renew within {self.times.renew_deadline} s")

    async def release(self) -> None:
        """Give the lease up so that another candidate can take it at once."""
        if not self.held:
            return
        self._held_until = 0.0
        try:
            async with asyncio.timeout(self.times.retry_period):
                lease = await self._kube.get(LEASES, self._namespace, self._name)
                if lease["spec"].get("holderIdentity") == self.identity:
                    lease["spec"].update(holderIdentity="", leaseDurationSeconds=1, renewTime=_micro(utcnow()))
                    await self._kube.replace(LEASES, self._namespace, self._name, lease)
        except (ApiError, ThrottledError, UnknownOutcomeError, TimeoutError) as error:
            logger.warning("lease not released, it runs out by itself", extra={"error": str(error)})

    async def _try(self) -> bool:
        """Take or renew the lease once, within half the renew deadline. Tell whether it is held."""
        before = monotonic()
        try:
            # Half the deadline leaves room for a second try, and a slow answer of a busy server still counts.
            async with asyncio.timeout(self.times.renew_deadline / 2):
                if await self._take():
                    self._held_until = before + self.times.renew_deadline
                    return True
        except (ApiError, ThrottledError, UnknownOutcomeError, TimeoutError) as error:
            logger.warning("lease call failed", extra={"error": f"{type(error).__name__} {error}"})
        return False

    async def _take(self) -> bool:
        try:
            lease = await self._kube.get(LEASES, self._namespace, self._name)
        except NotFoundError:
            await self._create()
            self.released_before, self.missing_before = False, True
            return True
        spec: dict[str, Any] = lease.setdefault("spec", {})
        holder = spec.get("holderIdentity") or ""
        if holder not in ("", self.identity) and not self._ran_out(lease):
            self._held_until = 0.0
            return False
        now = _micro(utcnow())
        if holder != self.identity:
            self.released_before, self.missing_before = holder == "", False
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec.update(
            holderIdentity=self.identity,
            leaseDurationSeconds=max(1, round(self.times.duration)),
            renewTime=now,
        )
        try:
            await self._kube.replace(LEASES, self._namespace, self._name, lease)
        except ConflictError:
            return False
        self.transitions = int(spec.get("leaseTransitions") or 0)
        return True

    def _ran_out(self, lease: dict[str, Any]) -> bool:
        """Tell whether the record stayed unchanged for its whole duration, by this candidate's own clock.

        Other machines' clocks do not matter: only how long this one has watched the same record.
        """
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, monotonic())
            return False
        duration = float(lease["spec"].get("leaseDurationSeconds") or self.times.duration)
        return monotonic() - self._seen[1] > duration

    async def _create(self) -> None:
        now = _micro(utcnow())
        await self._kube.create(
            LEASES,
            self._namespace,
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": {
                    "holderIdentity": self.identity,
                    "leaseDurationSeconds": max(1, round(self.times.duration)),
                    "acquireTime": now,
                    "renewTime": now,
                    "leaseTransitions": 0,
                },
            },
        )


def _micro(moment: datetime) -> str:
    return moment.strftime(_MICRO_TIME)
