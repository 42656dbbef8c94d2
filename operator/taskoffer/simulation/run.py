"""A task's run on the GPUs of one node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a task that was started. Times are seconds since the trace's start.

    ``outcome`` is one of ``InTime``, ``Late`` and ``Failed``; ``worth`` is what the run has earned.
    """

    name: str
    start: float
    end: float
    gpus: int
    node: str
    outcome: str
    worth: float
