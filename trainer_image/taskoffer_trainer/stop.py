"""Stops a run between two steps, all ranks together: on SIGTERM, or before the deadline."""

from __future__ import annotations

import signal
from datetime import datetime
from enum import IntEnum
from typing import Any

from taskoffer_trainer.failures import StopRequestedError
from taskoffer_trainer.progress import now

__all__ = ["Stop", "StopCause"]

_left: list[Any] = []
"""Process groups that this process has left, kept until it ends; see `Stop.part`."""


class StopCause(IntEnum):
    """Why to stop. The greater one wins when ranks see different causes."""

    NONE = 0
    DEADLINE = 1
    SIGNAL = 2


class Stop:
    """Remembers a signal, watches the deadline, and lets all ranks agree.

    SIGTERM is noted before torch is imported, so that a pod that is stopped early ends with the right exit
    code too.
    """

    def __init__(self, deadline: datetime | None = None) -> None:
        self.deadline = deadline
        self.signalled = False
        self.cause = StopCause.NONE
        self._group: Any = None

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

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline (negative after it), or ``None`` without one."""
        return None if self.deadline is None else (self.deadline - now()).total_seconds()

    def agree(self, reserve_seconds: float = 0.0) -> StopCause:
        """Let all ranks agree whether to stop; every rank must call it at the same point.

        Args:
            reserve_seconds: time that the rest of the run needs from here: save, evaluate, verify.

        Returns:
            The cause, which is also kept in :attr:`cause`.
        """
        import torch
        import torch.distributed as dist

        left = self.seconds_left()
        mine = StopCause.NONE
        if left is not None and left <= reserve_seconds:
            mine = StopCause.DEADLINE
        if self.signalled:
            mine = StopCause.SIGNAL
        if dist.is_available() and dist.is_initialized():
            if self._group is None:
                # A group of its own on gloo, because a tensor on the CPU cannot travel over NCCL.
                self._group = dist.new_group(backend="gloo")
            flag = torch.tensor([int(mine)])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            mine = StopCause(int(flag.item()))
        self.cause = mine
        return mine

    def part(self) -> None:
        """Wait for all ranks and leave their process group; alone, there is none to leave.

        What is left of the groups is kept until the process ends. With its last reference torch 2.13 joins a gloo
        group's threads while it holds the GIL, and one of these may just want the GIL to let go of the tensors of the
        last collectives: on a busy machine both then wait for ever.
        """
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            _left.extend((dist.group.WORLD, self._group))
            dist.barrier()
            dist.destroy_process_group()
