"""An event loop whose clock jumps to the next timer instead of waiting for it.

Timeouts, backoffs and leases of minutes are tested in milliseconds and always in the same order. A loop in which
nothing can ever happen any more says so instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any, TypeVar

import pytest

from core_builders import NOW
from taskoffer.adapters import events, lease
from taskoffer.reconcile import admission, jobs, observed, policies, views

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Never waits: what would have been waited for is added to the loop's clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("every task waits and no timer is set: nothing can happen any more")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


class Clock:
    """The virtual clock, in the two forms that the operator reads it."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()

    @classmethod
    def utcnow(cls) -> datetime:
        return NOW + timedelta(seconds=cls.monotonic())


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop with virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the operator on the virtual clock."""
    for module in (lease, admission, jobs, observed, policies, views, events):
        for name in ("monotonic", "utcnow"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(Clock, name))
