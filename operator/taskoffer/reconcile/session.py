"""What the reconcilers of one replica share: the world, the connection, the lease, and the wake-up calls."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from taskoffer.adapters.events import EventWriter
from taskoffer.adapters.kube import ApiError, Kube, Object, Resource, ThrottledError
from taskoffer.adapters.lease import Lease
from taskoffer.adapters.metrics import WRITES
from taskoffer.decision.keys import OfferKey
from taskoffer.reconcile.cache import Store
from taskoffer.reconcile.world import World


@dataclass(slots=True)
class Settings:
    """Settings of a replica. Times are seconds."""

    lease_namespace: str = "taskoffer-system"
    lease_name: str = "taskoffer"
    coalesce: float = 0.001
    """How long a wake-up waits for others, so that a burst becomes one cycle."""
    concurrent_writes: int = 24
    write_timeout: float = 4.0
    resync: float = 300.0
    watch_window: int = 20
    """How long one watch request lasts; the server says at least one word in it."""
    progress_interval: float = 10.0
    policy_status_interval: float = 2.0
    policy_pending_interval: float = 5.0
    """Shortest times between two writes of a policy's status, and of the number of pending offers alone. It is the
    largest object of all, and costs the API server three times what an answer does."""


@dataclass(slots=True)
class Session:
    """The shared state of one replica."""

    kube: Kube
    lease: Lease
    events: EventWriter
    settings: Settings
    world: World = field(default_factory=World)
    cycle_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    policies_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    jobs_wanted: asyncio.Queue[OfferKey] = field(default_factory=asyncio.Queue)
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while many answers are on their way: then what follows from answers has to wait for its turn."""
    draining: bool = False
    """Set when the replica is about to stop: nothing new is decided."""
    jobs_queued: set[OfferKey] = field(default_factory=set)
    writing: int = 0
    """How many writes are under way."""

    def __post_init__(self) -> None:
        self.calm.set()

    def answers_on_their_way(self, count: int) -> None:
        """Take in how many answers are being written, or wait for being written."""
        if count > self.settings.concurrent_writes:
            self.calm.clear()
        elif count <= self.settings.concurrent_writes // 2:
            self.calm.set()

    def want_job(self, key: OfferKey) -> None:
        """Have a TrainingJob looked at; several calls before that become one."""
        if key not in self.jobs_queued:
            self.jobs_queued.add(key)
            self.jobs_wanted.put_nowait(key)

    async def write_status(self, store: Store[Any], resource: Resource, key: OfferKey, patch: Object) -> Object:
        """Patch a status under the lease and take the answer into the store.

        Raises:
            LeadershipLostError: when this replica may not write.
            ApiError, ThrottledError, UnknownOutcomeError: as :meth:`Kube.request`.
        """
        self.lease.check()
        self.writing += 1
        try:
            made = await self.kube.patch_status(resource, key.namespace or None, key.name, patch)
        except Exception as error:
            WRITES.labels(f"{store.kind}.status", outcome(error)).inc()
            raise
        finally:
            self.writing -= 1
        WRITES.labels(f"{store.kind}.status", "done").inc()
        store.observe("MODIFIED", made)
        return made

    async def create(self, store: Store[Any] | None, resource: Resource, namespace: str, manifest: Object) -> Object:
        """Create an object under the lease and take the answer into the store."""
        self.lease.check()
        self.writing += 1
        try:
            made = await self.kube.create(resource, namespace, manifest)
        except Exception as error:
            WRITES.labels(str(manifest["kind"]), outcome(error)).inc()
            raise
        finally:
            self.writing -= 1
        WRITES.labels(str(manifest["kind"]), "done").inc()
        if store is not None:
            store.observe("ADDED", made)
        return made


def outcome(error: Exception) -> str:
    """Name how a write failed: refused (4xx), throttled (429), or unknown, which may have been committed."""
    if isinstance(error, ApiError):
        return "refused"
    return "throttled" if isinstance(error, ThrottledError) else "unknown"
