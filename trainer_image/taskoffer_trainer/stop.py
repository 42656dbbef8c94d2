"""Stops a run between two steps, all ranks together: on SIGTERM, or before the deadline."""

from __future__ import annotations

import signal
from enum import IntEnum
from typing import Any

from taskoffer_trainer.clock import Clock, now
from taskoffer_trainer.failures import StopRequestedError

__all__ = ["Stop", "StopCause"]


class StopCause(IntEnum):
    """Why to stop. The greater one wins when ranks see different causes."""

    NONE = 0
    DEADLINE = 1
    SIGNAL = 2


class Stop:
    """Remembers a signal, watches the deadline, and lets all ranks agree, once :attr:`world` is known.

    SIGTERM is noted before torch is imported, so that a pod that is stopped early ends with the right exit
    code too.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock(now())
        self.signalled = False
        self.cause = StopCause.NONE
        self.world: Any = None

    def listen(self) -> None:
        """Note SIGTERM and SIGINT from now on. Main thread only."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.signalled = True

    def check(self) -> None:
        """Leave at once when a signal came; for work that this rank does alone and that can be done again.

        Raises:
            StopRequestedError: when a signal came.
        """
        if self.signalled:
            raise StopRequestedError

    def agree(self, needed_seconds: float = 0.0, at_the_latest: bool = False) -> StopCause:
        """Let all ranks agree whether to stop; every rank must call it at the same point.

        Args:
            needed_seconds: time that the rest of the run needs from here: save, evaluate, verify.
            at_the_latest: hold it against the deadline itself and use up the reserve before it.

        Returns:
            The cause, which is also kept in :attr:`cause`.
        """
        left = self.clock.left() if at_the_latest else self.clock.planned_left()
        mine = StopCause.NONE
        if left is not None and left <= needed_seconds:
            mine = StopCause.DEADLINE
        if self.signalled:
            mine = StopCause.SIGNAL
        if self.world is not None:
            mine = StopCause(int(self.world.largest(mine)[0]))
        self.cause = mine
        return mine
