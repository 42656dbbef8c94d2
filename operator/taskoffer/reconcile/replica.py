"""One replica: keep the cache warm, stand for election, lead, and leave as soon as any part of that ends.

A replica that loses its lease, or any of whose loops ends, exits; whoever started it starts it again. That is the
one way out of every unclear state.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
from collections.abc import Sequence

import aiohttp

from taskoffer.adapters.kube import (
    WATCHED,
    WATCHED_DEVICES,
    ApiError,
    Resource,
    ThrottledError,
    UnknownOutcomeError,
)
from taskoffer.adapters.metrics import LEADER, LEASE_TRANSITIONS, RESYNC_DIFFERENCES
from taskoffer.adapters.progress import fetch_report
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.naming import job_name
from taskoffer.reconcile.admission import Admission
from taskoffer.reconcile.cache import Raw, Store
from taskoffer.reconcile.device_access import find_access
from taskoffer.reconcile.devices import Access
from taskoffer.reconcile.jobs import Jobs
from taskoffer.reconcile.pod_views import PodEntry
from taskoffer.reconcile.policies import Policies
from taskoffer.reconcile.session import Session
from taskoffer.reconcile.views import OfferState

logger = logging.getLogger(__name__)

JOB_SELECTOR = "app.kubernetes.io/managed-by=taskoffer"


class Replica:
    """One process of the operator."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.jobs = Jobs(session)
        self.admission = Admission(session, self.jobs)
        self.jobs.revoke = self.admission.revoke
        self.policies = Policies(session)
        self.leading = False
        self.kinds: dict[str, Resource] = dict(WATCHED)
        """What is listed and watched; complete once ``kinds_known`` is set."""
        self._unreadable: set[str] = set()
        """UIDs of pods whose reports were not understood, so that each is told of once."""
        self.kinds_known = asyncio.Event()

    # Fed by the watches

    def observe(self, kind: str, event_type: str | None, raw: Raw) -> None:
        """Take in a watch event and wake whoever it concerns. Malformed objects are kept out, never raised."""
        world = self.session.world
        if kind == "Pod" and not concerns(raw):
            return
        store = next(s for s in world.stores if s.kind == kind)
        if not store.observe(event_type, raw):
            return
        if not self.leading:
            return
        self.session.cycle_wanted.set()
        if kind not in ("TaskOffer", "TrainingJob") or event_type == "DELETED":
            # What a policy's status counts: GPUs are held by Jobs and pods, foreign ones included, and nodes offer
            # them. Answers and ends of offers ask for it where they are written.
            self.session.policies_wanted.set()
        self._wake_jobs(kind, event_type, raw)

    def _wake_jobs(self, kind: str, event_type: str | None, raw: Raw) -> None:
        metadata = raw["metadata"]
        namespace = metadata.get("namespace", "")
        if kind == "TrainingJob":
            self.session.want_job(OfferKey(namespace, metadata["name"]))
        elif kind in ("Pod", "Job", "ResourceClaim"):
            name = (metadata.get("labels") or {}).get("taskoffer.dev/job")
            if name:
                self.session.want_job(OfferKey(namespace, name))
        elif kind == "TaskOffer":
            offer = self.session.world.offers.get(metadata["uid"])
            # Of a deleted one the store has nothing any more, but its job's name follows from its own.
            if event_type == "DELETED" or (offer is not None and offer.state is OfferState.HOLDING):
                self.session.want_job(OfferKey(namespace, job_name(metadata["name"], metadata["uid"])))
        elif kind == "Node":
            for key in self.session.world.jobs_by_key:
                self.session.want_job(key)

    # Life

    async def run(self) -> None:
        """Stand for election, then lead until the lease or a loop is lost.

        Raises:
            LeadershipLostError: when the lease is lost; the process is to exit.
        """
        session = self.session
        session.world.devices.tell(await find_access(session.kube))
        if session.world.devices.access is Access.WATCHED:
            self.kinds.update(WATCHED_DEVICES)
        self.kinds_known.set()
        # A standby lists as well: its cache is warm, and it is ready only when it can read every kind.
        await self.resync()
        await session.lease.acquire()
        LEASE_TRANSITIONS.set(session.lease.transitions)
        async with asyncio.TaskGroup() as group:
            group.create_task(session.lease.keep())
            group.create_task(self._lead())

    async def _lead(self) -> None:
        session = self.session
        await self._outlast_late_writes()
        await self.resync()
        self.leading = True
        LEADER.set(1)
        logger.info("leading", extra={"offers": len(session.world.offers), "nodes": len(session.world.nodes)})
        revoked = await self.admission.revoke_overbooked()
        if revoked:
            logger.warning("admissions taken back", extra={"count": revoked})
        self.jobs.want_all()
        session.cycle_wanted.set()
        session.policies_wanted.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.admission.run())
            group.create_task(self.jobs.run())
            group.create_task(self.policies.run())
            group.create_task(session.events.run(session.calm))
            group.create_task(self._resync_forever())
            group.create_task(self._poll_progress())

    async def _outlast_late_writes(self) -> None:
        """Wait until nothing can arrive any more that a leader before has sent."""
        session, lease = self.session, self.session.lease
        if not lease.missing_before:
            if not lease.released_before:
                await asyncio.sleep(session.settings.write_timeout)
            return
        # Somebody may have removed the lease of a leader that still believes in it. Where a list that was taken since
        # knows of no offer, there is nothing that anybody could have written about.
        await self.resync()
        if len(session.world.offers) > 0:
            await asyncio.sleep(lease.times.renew_deadline + session.settings.write_timeout)

    async def drain(self, seconds: float) -> bool:
        """Decide nothing more and wait for what is on its way. Tell whether all of it has ended."""
        self.session.draining = True
        try:
            async with asyncio.timeout(seconds):
                # What is watched here for a moment comes at the very end of a process.
                while self.session.world.in_flight or self.jobs.busy or self.session.writing:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            logger.warning("writes left unfinished", extra={"offers": len(self.session.world.in_flight)})
            return False
        return True

    async def resync(self) -> None:
        """List every kind and correct the cache. Tries until it succeeds: without it nothing may be decided."""
        # All at once: a new leader waits for this, and nothing is decided before the last list is there.
        async with asyncio.TaskGroup() as group:
            for store in self.session.world.stores:
                selector = JOB_SELECTOR if store.kind == "Job" else None
                group.create_task(self._list(store, self.kinds[store.kind], selector))
        self.session.world.held_back.clear()

    async def _list(self, store: Store[object], resource: Resource, selector: str | None) -> None:
        delay = 0.2
        while True:
            present: set[str] = set()
            corrected: list[int] = []
            take = functools.partial(_take_page, store, present, corrected)
            try:
                _, version = await self.session.kube.list(resource, label_selector=selector, on_page=take)
            except (ApiError, ThrottledError, UnknownOutcomeError) as error:
                logger.warning("list failed", extra={"kind": store.kind, "error": str(error)})
                await asyncio.sleep(delay)
                delay = min(delay * 2, 10.0)
                continue
            first = not store.listed
            count = sum(corrected) + store.keep_only(present, version)
            if count and not first:
                RESYNC_DIFFERENCES.labels(store.kind).inc(count)
                logger.warning("the watch had missed changes", extra={"kind": store.kind, "count": count})
            return

    async def _resync_forever(self) -> None:
        while True:
            await asyncio.sleep(self.session.settings.resync)
            await self.resync()
            self.jobs.want_all()
            self.session.cycle_wanted.set()
            # A process that leads for weeks looks at everything now and then: see handlers.run.
            gc.collect()

    async def _poll_progress(self) -> None:
        """Ask running trainers for their progress, each once per interval."""
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=32)) as http:
            while True:
                await asyncio.sleep(self.session.settings.progress_interval / 2)
                running = [p for p in self.session.world.pods if _reports(p) and self._is_ours(p)]
                self._unreadable &= {pod.uid for pod in running}
                await asyncio.gather(*(self._ask(http, pod) for pod in running))

    def _is_ours(self, pod: PodEntry) -> bool:
        """Tell whether the policy's trainer runs in a pod: one that an offer has brought is asked nothing."""
        entry = self.session.world.jobs_by_key.get(OfferKey(pod.namespace, pod.training_job or ""))
        return entry is None or entry.job is None or entry.job.spec.run.trainer is None

    async def _ask(self, http: aiohttp.ClientSession, pod: PodEntry) -> None:
        try:
            report = await fetch_report(http, pod.ip or "")
        except ValueError as error:
            if pod.uid not in self._unreadable:
                self._unreadable.add(pod.uid)
                told = {"job": f"{pod.namespace}/{pod.training_job}", "error": str(error)[:500]}
                logger.warning("a trainer's report is not understood", extra=told)
            return
        if report is not None and pod.training_job:
            key = OfferKey(pod.namespace, pod.training_job)
            self.jobs.reports[key] = report
            self.session.want_job(key)


def _take_page(store: Store[object], present: set[str], corrected: list[int], page: Sequence[Raw]) -> None:
    """Take in a part of a list as it comes."""
    wanted = (raw for raw in page if concerns(raw)) if store.kind == "Pod" else page
    corrected.append(store.take_page(wanted, present))


def _reports(pod: PodEntry) -> bool:
    return bool(pod.ip and pod.training_job and pod.view.started_at and not pod.view.terminal)


def concerns(raw: Raw) -> bool:
    """Tell whether a pod matters: it is ours, or it asks for an extended resource.

    Works on the raw object, so that the many other pods of a cluster cost next to nothing.
    """
    if "taskoffer.dev/job" in (raw["metadata"].get("labels") or {}):
        return True
    spec = raw.get("spec") or {}
    for container in (*(spec.get("containers") or ()), *(spec.get("initContainers") or ())):
        resources = container.get("resources") or {}
        for wanted in (resources.get("limits"), resources.get("requests")):
            if wanted and any("/" in name for name in wanted):
                return True
    return False
