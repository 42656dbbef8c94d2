"""Training settings of a policy that models cannot hold: ranks above a layer, sizes that fit no GPU."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache

from taskoffer.api.tasks import Architecture, TaskType
from taskoffer.api.v1alpha1.capacitypolicy import LintFinding
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.lanes import Lane
from taskoffer.api.v1alpha1.profiles import SizeClass, TaskTypeRule, lora_of, train_of
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import by_layer, shape_of_size
from taskoffer.decision.fit import Subject, fit
from taskoffer.decision.sizing import billions

_USUAL, _LARGEST = 1_000_000_000, 1_000_000_000_000
"""The size of model that a class without a lower bound is looked at with, and where one without an upper bound ends."""


@lru_cache(maxsize=32)
def lint_profiles(
    sizes: tuple[SizeClass, ...],
    task_types: tuple[TaskTypeRule, ...],
    lanes: tuple[Lane, ...],
    estimation: Estimation | None,
) -> tuple[LintFinding, ...]:
    """Return the size classes whose settings the models of the class cannot hold."""
    tasks = tuple(task for task in task_types if task.accepted and task.name is not TaskType.IMAGE)
    found: list[LintFinding] = []
    for size in sizes if tasks else ():
        largest = max(1, (size.max_parameters or _LARGEST) - 1)
        smallest = max(1, size.min_parameters or min(_USUAL, largest // 2))
        found.extend(_lint_rank(size, tasks, smallest))
        if estimation is not None:
            cases = [(task, gpus) for task in tasks for gpus in counts(size, task, lanes)]
            found.extend(_lint_memory(estimation, size, cases, smallest, largest))
    return tuple(found)


def counts(
    size: SizeClass, task: TaskTypeRule, lanes: tuple[Lane, ...], architecture: Architecture | None = None
) -> tuple[int, ...]:
    """Return the GPUs that a task of a size class gets: its lanes' number, or the class's where there are none."""
    if not lanes:
        return (size.gpus,)
    rules = (rule for lane in lanes for rule in lane.rules)
    first = next(
        (
            rule.gpus_per_task
            for rule in rules
            if (not rule.task_types or task.name in rule.task_types)
            and (not rule.size_classes or size.name in rule.size_classes)
            and (not rule.architectures or architecture in rule.architectures)
        ),
        None,
    )
    return () if first is None else (first,)


def _lint_rank(size: SizeClass, tasks: tuple[TaskTypeRule, ...], smallest: int) -> Iterator[LintFinding]:
    """Look at the largest rank that a size class gives, with a usual model of its smallest size."""
    task = max(tasks, key=lambda task: lora_of(size, task).r)
    lora = lora_of(size, task)
    rank, caps = lora.r, shape_of_size(smallest).rank_caps(lora.target_modules)
    low = {cap: names for cap, names in caps.items() if cap < rank}
    if low:
        yield finding(
            f"sizeClasses[{size.name}].lora.r",
            f"{rank} for {task.name.value} is more than layers of a usual {billions(smallest)} model hold: "
            f"{by_layer(low)}",
        )


def _lint_memory(
    estimation: Estimation, size: SizeClass, cases: list[tuple[TaskTypeRule, int]], smallest: int, largest: int
) -> Iterator[LintFinding]:
    """Say up to which size models of a class fit, where that is not all of them."""
    field = f"sizeClasses[{size.name}].gpus"
    bounds: dict[tuple[str, int], int] = {}
    for task, gpus in cases:
        asked = Settings(lora=lora_of(size, task), train=train_of(size, task))

        def too_large(parameters: int, task: TaskTypeRule = task, gpus: int = gpus, asked: Settings = asked) -> bool:
            return not fit(Subject("", None, parameters, task.name), asked, estimation, gpus).fits

        if too_large(largest):
            step = max(1, (largest - smallest) // 256)
            steps = bisect_left(range(smallest, largest, step), True, key=too_large)
            bounds[task.name.value, gpus] = smallest + (steps - 1) * step if steps else 0
    if bounds and len(bounds) == len(cases) and not any(bounds.values()):
        several = "/".join(str(gpus) for gpus in sorted({gpus for _, gpus in bounds}))
        message = f"no usual model of the class fits {several} GPU(s), not even with one row at a time and a small rank"
        yield finding(field, message, "Error")
        return
    for (name, gpus), bound in bounds.items():
        which = f"models above about {billions(bound)}" if bound else "usual models of the class"
        yield finding(field, f"{which} do not fit {gpus} GPU(s) with {name} and are refused")


def finding(field: str, message: str, severity: str = "Warning") -> LintFinding:
    """Return a finding; its message begins with the field."""
    return LintFinding.model_validate(
        {"field": field[:253], "severity": severity, "message": f"{field}: {message}"[:512]}
    )
