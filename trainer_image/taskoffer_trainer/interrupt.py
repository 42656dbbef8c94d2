"""Ends a step that waits for the network or the disk as soon as a signal comes."""

from __future__ import annotations

import signal
import time
from datetime import datetime

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.clock import now
from taskoffer_trainer.failures import TrainerError

__all__ = ["Interrupt", "InterruptedBySignal"]


class InterruptedBySignal(BaseException):
    """SIGTERM or SIGINT came. Not an Exception, so that nothing on the way takes it for a fault of its own."""


class Interrupt:
    """Turns the first SIGTERM or SIGINT into :class:`InterruptedBySignal` and watches a deadline.

    Unlike a training step, whose ranks must agree when to stop, a download may be left at any instruction: all that
    it leaves on disk must survive SIGKILL anyhow. So a read that hangs does not hold the pod up.
    """

    def __init__(self, deadline: datetime | None = None) -> None:
        self.deadline = deadline
        self.signalled = False

    def listen(self) -> None:
        """Raise out of whatever is running from now on. Main thread only."""
        signal.signal(signal.SIGTERM, self._raise)
        signal.signal(signal.SIGINT, self._raise)

    def ignore(self) -> None:
        """Raise no more: the step is over, and all that is left is to say how it ended."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _raise(self, number: int, _frame: object) -> None:
        # Once only: what is cleaned up on the way out must not be interrupted in its turn.
        if not self.signalled:
            self.signalled = True
            raise InterruptedBySignal(signal.Signals(number).name)

    def check(self) -> None:
        """Leave when a signal came (it may have been raised where exceptions are ignored) or the deadline has passed.

        Raises:
            InterruptedBySignal: when a signal came.
            TrainerError: ``BAD_CONFIG`` when the deadline has passed.
        """
        if self.signalled:
            raise InterruptedBySignal("a signal")
        if self.deadline is not None and now() >= self.deadline:
            raise TrainerError(
                ExitCode.BAD_CONFIG, "DeadlinePassed", f"deadline: {self.deadline:%Y-%m-%dT%H:%M:%SZ} has passed"
            )

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than until the deadline or a signal."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 1.0))
        self.check()
