"""Kubernetes Events: written in the background, never in the way of a decision."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass

from taskoffer.adapters.clock import utcnow
from taskoffer.adapters.kube import EVENTS, ApiError, Kube, Object, ThrottledError, UnknownOutcomeError
from taskoffer.adapters.metrics import EVENTS_DROPPED, WRITES
from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason

logger = logging.getLogger(__name__)

COMPONENT = "taskoffer"


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an event is about."""

    api_version: str
    kind: str
    namespace: str | None
    name: str
    uid: str
    resource_version: str = ""


class EventWriter:
    """A bounded queue of events and the task that writes them. When it is full, new ones are dropped and counted."""

    def __init__(self, kube: Kube, *, size: int = 2000, writers: int = 2) -> None:
        self._kube = kube
        self._queue: asyncio.Queue[tuple[Subject, Reason, str, bool]] = asyncio.Queue(size)
        self._writers = writers
        self.written = 0

    def emit(self, subject: Subject, reason: Reason, message: str, *, warning: bool = False) -> None:
        """Queue an event."""
        try:
            self._queue.put_nowait((subject, reason, message, warning))
        except asyncio.QueueFull:
            EVENTS_DROPPED.inc()

    async def run(self, calm: asyncio.Event) -> None:
        """Write events for ever: all writers while it is calm, one otherwise."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._writers):
                group.create_task(self._write_all(calm if number else None))

    async def flush(self, *, seconds: float) -> None:
        """Write what is left in the queue after `run` has ended, for at most this long."""
        writers = [asyncio.create_task(self._write_all(None)) for _ in range(self._writers)]
        try:
            async with asyncio.timeout(seconds):
                await self._queue.join()
        except TimeoutError:
            logger.warning("events left unwritten", extra={"count": self._queue.qsize()})
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)

    async def _write_all(self, calm: asyncio.Event | None) -> None:
        while True:
            if calm is not None:
                await calm.wait()
            subject, reason, message, warning = await self._queue.get()
            try:
                await self._kube.create(
                    EVENTS, subject.namespace or "default", _event(subject, reason, message, warning)
                )
                self.written += 1
                WRITES.labels("Event", "done").inc()
            except ThrottledError as error:
                EVENTS_DROPPED.inc()
                await asyncio.sleep(error.retry_after)
            except (ApiError, UnknownOutcomeError) as error:
                EVENTS_DROPPED.inc()
                logger.debug("event not written", extra={"error": str(error), "reason": reason.value})
            finally:
                self._queue.task_done()


def _event(subject: Subject, reason: Reason, message: str, warning: bool) -> Object:
    now = rfc3339(utcnow().replace(microsecond=0))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{subject.name[:200]}.{uuid.uuid4().hex[:16]}",
            "namespace": subject.namespace or "default",
        },
        "involvedObject": {
            "apiVersion": subject.api_version,
            "kind": subject.kind,
            "namespace": subject.namespace,
            "name": subject.name,
            "uid": subject.uid,
            "resourceVersion": subject.resource_version,
        },
        "reason": reason.value,
        "message": message[:1024],
        "type": "Warning" if warning else "Normal",
        "source": {"component": COMPONENT},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
