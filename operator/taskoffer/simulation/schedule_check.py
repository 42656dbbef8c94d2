"""An independent look at a schedule: it knows nothing of how the schedule was found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from taskoffer.simulation.run import Run
from taskoffer.simulation.task import Task

_TOLERANCE = 1e-6
"""Seconds by which floating-point sums may differ."""


class InfeasibleScheduleError(ValueError):
    """A schedule that could not have been run; the message says what is wrong with it."""


def check_schedule(tasks: Iterable[Task], runs: Sequence[Run], gpus: int = 8, nodes: int = 1) -> None:
    """Check that a schedule could have been run on ``nodes`` nodes of ``gpus`` GPUs each.

    Raises:
        InfeasibleScheduleError: when a run belongs to no task or is its task's second one, starts before the arrival or
            after the last start, ends after the deadline, takes other than its task's time on a GPU count that the task
            can use, earns other than its task's worth, when there are more nodes than given, or a node has too few GPUs
            at some moment.
    """
    by_name = {task.name: task for task in tasks}
    seen: set[str] = set()
    for run in runs:
        if run.name not in by_name:
            raise InfeasibleScheduleError(f"{run.name} is not a task")
        if run.name in seen:
            raise InfeasibleScheduleError(f"{run.name} runs twice")
        seen.add(run.name)
        _check_run(by_name[run.name], run)
    by_node: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_node[run.node].append(run)
    if len(by_node) > nodes:
        raise InfeasibleScheduleError(f"{len(by_node)} nodes are used, there are {nodes}")
    for node, of_node in by_node.items():
        _check_node(node, of_node, gpus)


def _check_run(task: Task, run: Run) -> None:
    if run.gpus not in task.seconds_by_gpus:
        raise InfeasibleScheduleError(f"{run.name} cannot run on {run.gpus} GPUs")
    if run.start < task.arrival - _TOLERANCE:
        raise InfeasibleScheduleError(f"{run.name} starts at {run.start}, before it arrives at {task.arrival}")
    if run.start > task.last_start + _TOLERANCE:
        raise InfeasibleScheduleError(f"{run.name} starts at {run.start}, later than {task.last_start}")
    if run.end > task.deadline + _TOLERANCE:
        raise InfeasibleScheduleError(f"{run.name} ends at {run.end}, later than {task.deadline}")
    seconds = task.seconds_by_gpus[run.gpus]
    if abs(run.end - run.start - seconds) > _TOLERANCE:
        raise InfeasibleScheduleError(f"{run.name} takes {run.end - run.start} s in place of {seconds} s")
    if not math.isclose(run.worth, task.worth, abs_tol=_TOLERANCE):
        raise InfeasibleScheduleError(f"{run.name} earns {run.worth} in place of {task.worth}")


def _check_node(node: str, runs: Iterable[Run], gpus: int) -> None:
    # An end within the tolerance of a start counts as before it: ends are moved back by it, and sort first.
    changes = [(run.start, 1, run.gpus) for run in runs] + [(run.end - _TOLERANCE, 0, -run.gpus) for run in runs]
    used = 0
    for moment, _, change in sorted(changes):
        used += change
        if used > gpus:
            raise InfeasibleScheduleError(f"{used} of {gpus} GPUs are used on {node} at {moment}")
