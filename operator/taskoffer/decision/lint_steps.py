"""Training settings of a policy with which a task of usual size has hardly an optimizer step to learn in.

A pass over the data is many steps for text and one for pictures, of which a task has a few dozen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from taskoffer.api.contract import EVAL_FRACTION, EVAL_ROWS_MAX, GRPOSettings, TrainSettings
from taskoffer.api.tasks import Architecture, TaskType
from taskoffer.api.v1alpha1.capacitypolicy import LintFinding
from taskoffer.api.v1alpha1.lanes import Lane
from taskoffer.api.v1alpha1.profiles import SizeClass, TaskTypeRule, train_of
from taskoffer.decision.lint_profiles import counts, finding

FEWEST_STEPS = 10
"""Optimizer steps below which a run is not worth its start: a choice. Adam's step is about
the learning rate whatever the gradient, so ten of them move a weight by ten times 2e-4 at most."""
FEWEST_PICTURES, FEWEST_ROWS = 10, 2_000
"""The smallest tasks of the market: pairs of picture and caption, rows of text."""


@lru_cache(maxsize=32)
def lint_steps(
    sizes: tuple[SizeClass, ...], task_types: tuple[TaskTypeRule, ...], lanes: tuple[Lane, ...]
) -> tuple[LintFinding, ...]:
    """Return the size classes whose settings leave the smallest usual task too few steps."""
    tasks = tuple(task for task in task_types if task.accepted)
    return tuple(found for size in sizes for found in _lint_size(size, tasks, lanes))


def optimizer_steps(train: TrainSettings, task: TaskType, rows: int, gpus: int) -> tuple[int, int]:
    """Return how many optimizer steps a run has, and the rows of a step.

    Args:
        train: How is trained.
        task: The task type; for GRPO each row of the data counts as often as completions are drawn of it.
        rows: Rows of the data, a tenth of which is held out.
        gpus: Its GPUs.
    """
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    drawn = 1
    if task is TaskType.GRPO:
        drawn = (train.grpo or GRPOSettings()).num_generations
        per_step = -(-per_step // drawn) * drawn
    held_out = min(max(1, round(rows * EVAL_FRACTION)), train.eval_rows_max or EVAL_ROWS_MAX)
    trained = (rows - held_out) * train.num_train_epochs * drawn
    steps = train.max_steps if train.max_steps > 0 else math.ceil(trained / per_step)
    return steps, per_step


def _lint_size(size: SizeClass, tasks: tuple[TaskTypeRule, ...], lanes: tuple[Lane, ...]) -> Iterator[LintFinding]:
    """Say which tasks of a class have too few steps, those that are alike together."""
    few: dict[tuple[int, int, str], list[str]] = {}
    for task in tasks:
        picture = task.name is TaskType.IMAGE
        rows, what = (FEWEST_PICTURES, "pictures") if picture else (FEWEST_ROWS, "rows")
        for architecture in Architecture if picture else (None,):
            train = train_of(size, task, architecture)
            for gpus in counts(size, task, lanes, architecture):
                steps, per_step = optimizer_steps(train, task.name, rows, gpus)
                names = few.setdefault((steps, per_step, f"{rows} {what}"), [])
                if steps < FEWEST_STEPS and task.name.value not in names:
                    names.append(task.name.value)
    for (steps, per_step, data), names in few.items():
        if names:
            yield finding(
                f"sizeClasses[{size.name}].train",
                f"{data} of {', '.join(names)} make {steps} optimizer step(s) of {per_step}, fewer than "
                f"{FEWEST_STEPS}: lower gradientAccumulationSteps or perDeviceTrainBatchSize, or set maxSteps, "
                "here or in taskTypes[].train",
            )
