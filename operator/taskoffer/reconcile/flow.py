"""Proof that events flow: a watch that has gone silent looks exactly like a cluster in which nothing happens.

A stream that is open says something at least once per window: the API server sends a bookmark about two seconds before
the end of each watch request, provided that it has seen anything of the kind at all. (Seen on kube-apiserver 1.36: a
kind without any change gets none, until somebody lists it; then the server asks etcd how far it is, and that counts.)
So each kind is probed now and then, and silence means that the stream is dead, whatever its connection says. Events
that arrive without any being handled mean that their way through this process is blocked.

Neither is held against a replica while the API server does not answer it at all: then a new process would hear
nothing either. Nor is the time in which the process did not run: nobody has listened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from taskoffer.adapters.kube import ApiError, Kube, Resource, ThrottledError, UnknownOutcomeError

SILENT_WINDOWS = 2.25
"""Windows without a word after which a stream is given up: one until kopf opens another stream, and one for that."""
BLOCKED_SECONDS = 15.0
"""Seconds that events may lie there while none of their kind is handled."""
PAUSED_SECONDS = 10.0
"""Seconds without a single look after which this process has not run: it was stopped, or its machine was."""


class SilentWatchError(Exception):
    """Events have ceased to arrive, or to be handled, while the API server answers."""


@dataclass(slots=True)
class _Stream:
    heard_at: float
    listed: bool = False
    waiting_since: float | None = None
    """Since when an event lies unhandled."""


class Flow:
    """What was heard on the watch of each kind, and when.

    Args:
        kinds: The kinds that are watched.
        window: Seconds that one watch request lasts; the API server takes whole ones only.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, kinds: Iterable[str], window: int, clock: Callable[[], float]) -> None:
        self.window = window
        self._clock = clock
        now = clock()
        self._streams = {kind: _Stream(now) for kind in kinds}
        self._away_at = now
        self._ran_at = now

    def watch(self, kinds: Iterable[str]) -> None:
        """Take in that these kinds are watched too, from now on."""
        for kind in kinds:
            self._streams.setdefault(kind, _Stream(self._clock()))

    def heard(self, kind: str, *, event: bool) -> None:
        """Take in that bytes have arrived on a kind's stream; ``event`` where they begin an event."""
        stream = self._streams[kind]
        stream.heard_at = self._clock()
        if event and stream.waiting_since is None:
            stream.waiting_since = stream.heard_at

    def listed(self, kind: str) -> bool:
        """Take in that a kind has been listed for its watch. Tell whether it had been before."""
        stream = self._streams[kind]
        before, stream.listed = stream.listed, True
        stream.heard_at = self._clock()
        return before

    def handled(self, kind: str) -> None:
        """Take in that an event of a kind has reached the cache."""
        self._streams[kind].waiting_since = None

    def server_away(self) -> None:
        """Take in that the API server has not answered."""
        self._away_at = self._clock()

    def runs(self) -> None:
        """Take in that this process runs; call it all the time. After a pause everything gets its time anew."""
        now = self._clock()
        if now - self._ran_at > PAUSED_SECONDS:
            self._away_at = now
            for stream in self._streams.values():
                if stream.waiting_since is not None:
                    stream.waiting_since = now
        self._ran_at = now

    def problem(self) -> str | None:
        """Say which stream has failed and how, or None while events flow."""
        now, limit = self._clock(), SILENT_WINDOWS * self.window
        for kind, stream in self._streams.items():
            if now - max(stream.heard_at, self._away_at) > limit:
                return (
                    f"the watch of {kind} has been silent for {now - stream.heard_at:.0f} s while the API server "
                    f"answers; one word per {self.window} s is usual"
                )
            since = stream.waiting_since
            if since is not None and now - since > BLOCKED_SECONDS:
                return f"events of {kind} have arrived and none has been handled for {now - since:.0f} s"
        return None

    def check(self) -> None:
        """Raise SilentWatchError unless events flow."""
        found = self.problem()
        if found is not None:
            raise SilentWatchError(found)


async def listen(flow: Flow, kube: Kube, kinds: Mapping[str, Resource]) -> None:
    """Probe each kind twice per window and raise SilentWatchError as soon as events have ceased to flow.

    Args:
        flow: What was heard.
        kube: Where to probe.
        kinds: The kinds that are watched; there may be more of them later.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(_probe_for_ever(flow, kube, kinds))
        while True:
            await asyncio.sleep(0.5)
            flow.runs()
            flow.check()


async def _probe_for_ever(flow: Flow, kube: Kube, kinds: Mapping[str, Resource]) -> None:
    while True:
        for resource in tuple(kinds.values()):
            try:
                await kube.probe(resource)
            except (ApiError, ThrottledError, UnknownOutcomeError):
                flow.server_away()
            await asyncio.sleep(flow.window / 2 / len(kinds))
