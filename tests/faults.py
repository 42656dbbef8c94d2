"""Faults on the way between the operator and the API server: which requests they hit, and what they do to them.

``fault_proxy`` carries them out. An action is a value; a `Fault` puts one on the requests that a `Match` describes, a
`Storm` draws one of several for a share of them.
"""

from __future__ import annotations

import abc
import asyncio
import enum
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Protocol, Self

from fault_requests import WRITES, Match, Object, Record

_REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Then(enum.Enum):
    """How a request goes on after a fault has had it."""

    GO_ON = "as if nothing had been: it is forwarded, unless it was, and gets the server's answer"
    DROP = "its connection is closed without a byte"
    RESET = "its connection is reset"


class Exchange(Protocol):
    """What an action can do with the request that it has struck."""

    record: Record

    @property
    def client_gone(self) -> bool:
        """Whether nobody waits for the answer any more."""

    async def forward(self) -> None:
        """Send the request on and wait for the server's answer, also when nobody waits for it any more."""


class Action(abc.ABC):
    """What a fault does."""

    def __str__(self) -> str:
        # Every action is a dataclass, which a base class cannot say.
        given = [(field, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        words = ", ".join(f"{field.name}={value!r}" for field, value in given if value != field.default)
        return f"{type(self).__name__}({words})"

    def fits(self, record: Record) -> bool:
        """Tell whether this can be done to such a request at all."""
        return not record.watch

    @abc.abstractmethod
    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        """Do it, before anything was forwarded, and say how the request goes on."""


@dataclass(frozen=True)
class Answer(Action):
    """Answer without asking the server, with a proper Status.

    Args:
        status: The HTTP status.
        retry_after: Seconds, for the header Retry-After.
        message: For the Status; by default it says that the fault made it.
        reason: For the Status; by default the one that the API server uses with this code.
        in_stream: Answer a watch with 200 and the Status as an event of type ERROR.
    """

    status: int
    retry_after: int | None = None
    message: str = ""
    reason: str = ""
    in_stream: bool = False

    def fits(self, record: Record) -> bool:
        return record.watch or not self.in_stream

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        return self

    def content(self, record: Record) -> Object:
        """Return the Status (meta/v1) that a request gets."""
        usual = "AlreadyExists" if (self.status, record.verb) == (409, "create") else _REASONS.get(self.status, "")
        made: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        made["message"] = self.message or f"the fault proxy answers {record} with {self.status}"
        made["reason"] = self.reason or usual
        made["details"] = {"name": record.name, "kind": record.plural}
        if self.retry_after is not None:
            made["details"]["retryAfterSeconds"] = self.retry_after
        return {**made, "code": self.status}


GONE = Answer(410, message="too old resource version: the fault proxy says so")
"""The history that a watch asks for is no longer there, said with the HTTP status."""

GONE_IN_STREAM = Answer(410, message=GONE.message, in_stream=True)
"""The same, said with an event of the watch, as API servers mostly do."""


@dataclass(frozen=True)
class Delay(Action):
    """Wait before forwarding. A request whose client has gone away meanwhile is lost."""

    seconds: float

    def fits(self, record: Record) -> bool:
        return True

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        await asyncio.sleep(self.seconds)
        return Then.DROP if exchange.client_gone else Then.GO_ON


@dataclass(frozen=True)
class Hold(Action):
    """Wait, then forward even if the client has gone away meanwhile; then reply, or drop the reply."""

    seconds: float
    drop: bool = False

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        await asyncio.sleep(self.seconds)
        await exchange.forward()
        return Then.DROP if self.drop else Then.GO_ON


@dataclass(frozen=True)
class Drop(Action):
    """Reset the connection before anything is forwarded, or close it without a byte after the server has answered."""

    after_commit: bool = False

    def fits(self, record: Record) -> bool:
        return not (record.watch and self.after_commit)

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        if not self.after_commit:
            return Then.RESET
        await exchange.forward()
        return Then.DROP


@dataclass(frozen=True)
class Hang(Action):
    """Neither forward nor answer until the fault is removed or released; then the connection is reset."""

    def fits(self, record: Record) -> bool:
        return True

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        await fault.stand(exchange.record)
        return Then.RESET


@dataclass(frozen=True)
class Barrier(Action):
    """Stop a request before it is forwarded, or before its answer is passed on, until `Fault.release`.

    It is forwarded then even if its client has gone away meanwhile. Removing the fault lets it go on, too.
    """

    after_commit: bool = False

    def fits(self, record: Record) -> bool:
        return not (record.watch and self.after_commit)

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        if self.after_commit:
            await exchange.forward()
        return await fault.stand(exchange.record)


@dataclass(frozen=True)
class Call(Action):
    """Call a function of the test, in a thread of its own, before forwarding or before the answer is passed on."""

    function: Callable[[Record], Then]
    after_commit: bool = False

    def fits(self, record: Record) -> bool:
        return not (record.watch and self.after_commit)

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        if self.after_commit:
            await exchange.forward()
        return await asyncio.to_thread(self.function, exchange.record)


class StreamAction(Action):
    """What a fault does to the events of watches, also of those that are open already."""

    def fits(self, record: Record) -> bool:
        return record.watch

    async def perform(self, exchange: Exchange, fault: Fault) -> Then | Answer:
        """Let the watch be opened; the rest is done to its stream."""
        return Then.GO_ON


@dataclass(frozen=True)
class Stall(StreamAction):
    """Keep watches open and silent. What comes meanwhile is lost to them; each struck watch counts once."""


@dataclass(frozen=True)
class Swallow(StreamAction):
    """Take single events out of watches; each one that `matches` (type, object) counts. It sees bookmarks, too."""

    matches: Callable[[str, Object], bool]


class Fault:
    """An action on the requests that match. Place it with `FaultProxy.fault`; a context manager that removes it.

    Args:
        on: Which requests.
        action: What happens to them.
        skip: How many of them are let pass first.
        times: How many are struck then; None for all, until the fault is removed.
        name: For `Record.fault`; by default it says what the fault does.

    Attributes:
        matched: How many requests (events for `Swallow`) it was about so far.
        struck: How many of them it struck.
    """

    def __init__(
        self, on: Match, action: Action | None, *, skip: int = 0, times: int | None = None, name: str = ""
    ) -> None:
        self.on = on
        self.action = action
        self.name = name or f"{action} on {on}"
        self.matched = 0
        self.struck = 0
        self._first = skip
        self._end = None if times is None else skip + times
        self._removed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._standing: dict[asyncio.Future[Then], Record] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def active(self) -> bool:
        """Whether it was not removed."""
        return not self._removed

    def remove(self) -> None:
        """Strike no more; what hangs or stands at a barrier goes on."""
        self._removed = True
        self.release()

    def release(self, then: Then = Then.GO_ON) -> int:
        """Let those go on that stand at the barrier now; returns how many. The next one is stopped again."""
        with self._changed:
            waiting = list(self._standing)
            self._standing.clear()
        if waiting and self._loop is not None:
            self._loop.call_soon_threadsafe(_resolve, waiting, then)
        return len(waiting)

    def reached(self, timeout: float) -> Record:
        """Wait until a request stands at the barrier; returns it.

        Raises:
            TimeoutError: when none came.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._standing), timeout):
                raise TimeoutError(f"{self.name}: nothing came in {timeout:g} s ({self.struck} struck before)")
            return next(iter(self._standing.values()))

    def wait_struck(self, timeout: float, count: int = 1) -> None:
        """Wait until it has struck so often.

        Raises:
            TimeoutError: when it has not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.struck >= count, timeout):
                raise TimeoutError(f"{self.name}: struck {self.struck} of {count} in {timeout:g} s")

    # The proxy's side: all of this runs on its event loop.

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell it where requests wait."""
        self._loop = loop

    def fits(self, record: Record, body: Object | None) -> bool:
        """Tell whether it is about this request."""
        return self.active and self.action is not None and self.action.fits(record) and self.on.fits(record, body)

    def strike(self) -> Action | None:
        """Count a request that it is about; returns what happens to it, None when it is let pass."""
        with self._changed:
            number, self.matched = self.matched, self.matched + 1
            action = self.choose(number)
            if action is not None:
                self.struck += 1
                self._changed.notify_all()
        return action

    def choose(self, number: int) -> Action | None:
        """Return what happens to the n-th matching request, counted from 0."""
        struck = number >= self._first and (self._end is None or number < self._end)
        return self.action if struck else None

    async def stand(self, record: Record) -> Then:
        """Wait for `release`; returns at once after the fault was removed."""
        future: asyncio.Future[Then] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._removed:
                return Then.GO_ON
            self._standing[future] = record
            self._changed.notify_all()
        try:
            return await future
        finally:
            with self._changed:
                self._standing.pop(future, None)


def _resolve(waiting: list[asyncio.Future[Then]], then: Then) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(then)


class Storm(Fault):
    """Faults on a random share of the requests; what happens to the n-th one depends on the randomness only.

    Args:
        on: Which requests, by default all writes.
        chance: The randomness; nothing else may draw from it.
        rates: The share of the requests for each action.
    """

    def __init__(self, chance: random.Random, rates: Mapping[Action, float], on: Match | None = None) -> None:
        if sum(rates.values()) > 1 or min(rates.values(), default=0) < 0:
            raise ValueError(f"the shares of a storm must be 0 or more and at most 1 together: {dict(rates)}")
        if unfit := [action for action in rates if isinstance(action, Barrier | StreamAction)]:
            raise ValueError(f"{unfit[0]} strikes no single requests by itself: place it as a fault")
        super().__init__(on or Match(WRITES), None, name="storm")
        self.rates = dict(rates)
        self.counts: Counter[str] = Counter()
        self._chance = chance

    def fits(self, record: Record, body: Object | None) -> bool:
        """Tell whether it is about this request: a watch never is."""
        return self.active and not record.watch and self.on.fits(record, body)

    def choose(self, number: int) -> Action | None:
        """Draw what happens to the next request."""
        drawn = self._chance.random()
        for action, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                self.counts[str(action)] += 1
                return action
        return None
