"""An independent auditor: it watches a cluster with its own client and proves that the ledger stayed true.

    with Auditor(kubeconfig) as audit:
        ...                       # start the operator, create offers, break things
        with audit.excused():     # nobody is there to act while this block runs
            operator.kill()
            operator.start()

Leaving the block judges the whole history and raises :class:`AuditFailure` with every violation. Start it
before the operator. It shares no code with the operator: ``auditor_history`` says how it remembers, and
``auditor_rules`` what it judges.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import yaml

from auditor_history import JOB, NODE, OFFER, POD, TRAINING_JOB, Event, Object, name_of
from auditor_judgement import Limits, Violation
from auditor_rules import audit

PATHS = {
    OFFER: "/apis/taskoffer.dev/v1alpha1/taskoffers",
    TRAINING_JOB: "/apis/taskoffer.dev/v1alpha1/trainingjobs",
    JOB: "/apis/batch/v1/jobs",
    POD: "/api/v1/pods",
    NODE: "/api/v1/nodes",
}
START_SECONDS = 60.0
CATCH_UP_SECONDS = 60.0
CLOSE_SECONDS = 30.0
RELIST_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_LIST_TIMEOUT = aiohttp.ClientTimeout(total=10)
_TIMELINE = 12
_T = TypeVar("_T")


class AuditFailure(AssertionError):  # noqa: N818 - a failed assertion in a report
    """The ledger was not true, or the auditor could not see whether it was."""


@dataclass(frozen=True)
class Access:
    """How to reach the API server."""

    server: str
    tls: ssl.SSLContext
    headers: dict[str, str]

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Self:
        """Read the current context of a kubeconfig that holds certificates or a token.

        Raises:
            ValueError: when the user logs in by another way, such as a plugin.
        """
        config: Any = yaml.safe_load(path.read_text())

        def named(part: str, name: str) -> Object:
            return next(entry for entry in config[part] if entry["name"] == name)

        context = named("contexts", config["current-context"])["context"]
        cluster = named("clusters", context["cluster"])["cluster"]
        user = named("users", context["user"])["user"]
        authority = _content(cluster, "certificate-authority", path)
        tls = ssl.create_default_context(cadata=None if authority is None else authority.decode())
        headers = {"Accept": "application/json"}
        certificate, key = _content(user, "client-certificate", path), _content(user, "client-key", path)
        if certificate is not None and key is not None:
            with tempfile.NamedTemporaryFile(prefix="auditor-", suffix=".pem") as both:
                both.write(certificate + b"\n" + key)
                both.flush()
                tls.load_cert_chain(both.name)
        elif "token" in user:
            headers["Authorization"] = f"Bearer {user['token']}"
        else:
            raise ValueError(f"{path}: user {context['user']} has neither a client certificate nor a token")
        return cls(cluster["server"].rstrip("/"), tls, headers)


def _content(entry: Object, key: str, kubeconfig: Path) -> bytes | None:
    if f"{key}-data" in entry:
        return base64.b64decode(entry[f"{key}-data"])
    return (kubeconfig.parent / entry[key]).read_bytes() if key in entry else None


@dataclass(frozen=True)
class Gap:
    """A piece of history that could not be watched, as after a restart of the API server."""

    at: float
    text: str


def unexcused(gaps: list[Gap], excused: list[tuple[float, float]]) -> list[Gap]:
    """Return the gaps outside of the excused intervals and the seconds after each that a new list may take."""
    return [gap for gap in gaps if not any(a <= gap.at <= b + RELIST_SECONDS for a, b in excused)]


class Watch:
    """Lists one kind, watches it from there, and writes down every event."""

    def __init__(self, kind: str, session: aiohttp.ClientSession, events: list[Event], gaps: list[Gap]) -> None:
        self.kind = kind
        self.listed = False
        self._session = session
        self._events = events
        self._gaps = gaps
        self._live: dict[str, Object] = {}

    async def run(self) -> None:
        """List and watch until cancelled; a lost connection is resumed where it broke."""
        revision = await self._list_when_served(since=0)
        self.listed = True
        while True:
            try:
                async for entry in self._follow(revision):
                    revision = self._take(entry, revision)
            except _GoneError:
                revision = await self._list_when_served(since=revision)
            except (aiohttp.ClientError, TimeoutError, ConnectionError):
                await asyncio.sleep(_RETRY_SECONDS)

    async def fetch(self) -> tuple[list[Object], int]:
        """Return all objects and the revision of the list."""
        async with self._session.get(PATHS[self.kind], timeout=_LIST_TIMEOUT) as answer:
            answer.raise_for_status()
            content = await answer.json()
        return content["items"], int(content["metadata"]["resourceVersion"])

    async def caught_up(self) -> bool:
        """Tell whether everything that the server has now was also seen."""
        items, revision = await self.fetch()
        known = {uid: int(obj["metadata"]["resourceVersion"]) for uid, obj in self._live.items()}
        there = {item["metadata"]["uid"]: int(item["metadata"]["resourceVersion"]) for item in items}
        deleted = {event.uid for event in self._events if event.kind == self.kind and event.type == "DELETED"}
        changes_seen = all(known.get(uid, -1) >= number or uid in deleted for uid, number in there.items())
        # What is known, not listed and no newer than the list was deleted, and that event has not come yet.
        deletions_seen = all(uid in there or number > revision for uid, number in known.items())
        return changes_seen and deletions_seen

    async def _list_when_served(self, since: int) -> int:
        while True:
            try:
                items, revision = await self.fetch()
            except (aiohttp.ClientError, TimeoutError, ConnectionError):
                # A kind that is not installed yet answers 404; the auditor is started before everything else.
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self.take_list(items, since, revision)
            return revision

    def take_list(self, items: list[Object], since: int, revision: int) -> None:
        """Take a list in that tells what happened between two revisions, but not in which order.

        Doubt is resolved in favour of the operator: what changed or went did so at once, and a Job that is new
        came last. Jobs are still judged, so that a restart of the API server hides no overbooking.
        """
        before = len(self._events)
        uids = {item["metadata"]["uid"] for item in items}
        for uid in self._live.keys() - uids:
            self._note("DELETED", self._live[uid], since)
        for item in items:
            known = self._live.get(item["metadata"]["uid"])
            if known is None and self.kind == JOB and since:
                self._note("ADDED", item, revision)
            elif known is None or known["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                self._note("LISTED", item, since)
        missed = len(self._events) - before
        if since and missed:
            text = f"{missed} changes of {self.kind} between revisions {since} and {revision} were not watched"
            self._gaps.append(Gap(time.monotonic(), text))

    async def _follow(self, revision: int) -> AsyncIterator[Object]:
        query = {"watch": "1", "resourceVersion": str(revision), "allowWatchBookmarks": "true"}
        async with self._session.get(PATHS[self.kind], params=query) as answer:
            if answer.status == 410:
                raise _GoneError
            answer.raise_for_status()
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)

    def _take(self, entry: Object, revision: int) -> int:
        if entry["type"] == "ERROR":
            if entry["object"].get("code") == 410:
                raise _GoneError
            raise aiohttp.ClientError(json.dumps(entry["object"]))
        seen = int(entry["object"]["metadata"]["resourceVersion"])
        if entry["type"] != "BOOKMARK":
            self._note(entry["type"], entry["object"], seen)
        return max(seen, revision)

    def _note(self, type_: str, obj: Object, revision: int) -> None:
        obj["metadata"].pop("managedFields", None)
        obj.setdefault("kind", self.kind)
        event = Event(self.kind, type_, obj, time.monotonic(), revision)
        if type_ == "DELETED":
            self._live.pop(event.uid, None)
        else:
            self._live[event.uid] = obj
        self._events.append(event)


class _GoneError(Exception):
    """The server no longer holds the history that a watch asked for."""


class Auditor:
    """Watches TaskOffers, TrainingJobs, Jobs, Pods and Nodes from ``__enter__`` to ``__exit__``.

    Args:
        kubeconfig: Access to the cluster, with leave to list and watch those kinds.
        limits: How strictly time is judged.
    """

    def __init__(self, kubeconfig: Path | str, limits: Limits | None = None) -> None:
        self._access = Access.from_kubeconfig(Path(kubeconfig))
        self._limits = limits or Limits()
        self._excused: list[tuple[float, float]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="auditor", daemon=True)
        self._watches: list[Watch] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._sockets: list[socket.socket] = []
        self.events: list[Event] = []
        self.gaps: list[Gap] = []

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._start())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            found = self.check()
        finally:
            self._stop()
        if found and error is not None:
            # The test has failed already; what the auditor saw may well say why.
            error.add_note(self.report(found))
        elif found:
            raise AuditFailure(self.report(found))

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Do not count the time of this block towards bounds: the test has stopped whoever ought to act.

        History that is lost in the block or shortly after it is accepted too; everywhere else it is a violation,
        because an auditor that did not look cannot vouch. Wrap restarts of the API server.
        """
        start = time.monotonic()
        try:
            yield
        finally:
            self._excused.append((start, time.monotonic()))

    def excuse(self, start: float, end: float) -> None:
        """As `excused`, for a time that has passed already; times that were excused before count once."""
        for a, b in sorted(self._excused):
            if a < end and b > start:
                if start < a:
                    self._excused.append((start, a))
                start = max(start, b)
        if start < end:
            self._excused.append((start, end))

    def check(self) -> list[Violation]:
        """Wait until everything that happened was seen, and return the violations so far."""
        found = [] if self._call(self._catch_up()) else [_blind("did not see all that the server has")]
        found += [_blind(gap.text) for gap in unexcused(self.gaps, self._excused)]
        limits = replace(self._limits, excused=tuple(self._excused))
        return found + audit(list(self.events), time.monotonic(), limits)

    def report(self, found: list[Violation]) -> str:
        """Return the violations as text, with the last events of each object that they name."""
        lines = [f"the auditor found {len(found)} violation(s) in {len(self.events)} events:"]
        for violation in found:
            lines.append(f"  {violation}")
            lines += [f"      {line}" for line in self._timeline(violation.subject)]
        return "\n".join(lines)

    def _timeline(self, subject: str) -> list[str]:
        words = subject.split()
        mine = [e for e in self.events if e.kind == words[0] and name_of(e.object) in words[1:]]
        start = self.events[0].at
        return [
            f"+{e.at - start:.2f}s r{e.revision} {e.type} {json.dumps(e.object.get('status', {}))[:240]}"
            for e in mine[-_TIMELINE:]
        ]

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            self._access.server,
            connector=aiohttp.TCPConnector(ssl=self._access.tls, socket_factory=self._socket),
            headers=self._access.headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        )
        self._watches = [Watch(kind, self._session, self.events, self.gaps) for kind in PATHS]
        self._tasks = [asyncio.create_task(watch.run()) for watch in self._watches]
        deadline = time.monotonic() + START_SECONDS
        while not all(watch.listed for watch in self._watches):
            self._raise_if_broken()
            if time.monotonic() > deadline:
                missing = ", ".join(watch.kind for watch in self._watches if not watch.listed)
                raise AuditFailure(f"cannot list {missing} at {self._access.server}: are the CRDs applied?")
            await asyncio.sleep(0.02)

    async def _catch_up(self) -> bool:
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while time.monotonic() < deadline:
            self._raise_if_broken()
            try:
                if all([await watch.caught_up() for watch in self._watches]):
                    return True
            except (aiohttp.ClientError, TimeoutError, ConnectionError):
                await asyncio.sleep(_RETRY_SECONDS)
            await asyncio.sleep(0.02)
        return False

    def _raise_if_broken(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        # TLS connections close a little later, on a busy machine a good deal; Python warns of sockets left open.
        deadline = time.monotonic() + CLOSE_SECONDS
        while any(one.fileno() >= 0 for one in self._sockets) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _socket(self, address: tuple[int | socket.AddressFamily, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        self._sockets.append(made)
        return made

    def _stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(START_SECONDS + CATCH_UP_SECONDS)


def _blind(why: str) -> Violation:
    return Violation("blind", "Auditor", f"{why}: its silence proves nothing")
