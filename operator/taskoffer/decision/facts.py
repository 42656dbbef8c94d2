"""What a policy knows about an offer: its type, family, size, lane and GPUs, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from taskoffer.api.contract import SERVED_TASK_TYPES
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import (
    CapacityPolicySpec,
    FamilyRule,
    GpuChoice,
    Lane,
    LaneRule,
    SizeClass,
    TaskTypeRule,
)
from taskoffer.api.v1alpha1.queueing import NamespaceLimit
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Learned
from taskoffer.decision.prediction import Outlook, Prediction
from taskoffer.decision.sizing import family_of, parameters_of, size_class_of
from taskoffer.decision.value import Stakes, most_valuable


@dataclass(frozen=True, slots=True)
class Facts:
    """What the policy knows about an offer; None where it knows nothing."""

    spec: TaskOfferSpec
    policy: CapacityPolicySpec
    task: TaskTypeRule | None
    family: FamilyRule | None
    parameters: int | None
    size: SizeClass | None
    lane: Lane | None
    lane_rule: LaneRule | None
    limit: NamespaceLimit | None = None
    """What the policy says about the offer's namespace."""
    gpus: int | None = None
    """GPUs to book."""
    options: tuple[tuple[int, Prediction], ...] = ()
    """Counts among which the cycle may choose, with what is predicted on them."""
    prediction: Prediction | None = None
    outlook: Outlook | None = None
    """What is predicted on any count, where the policy has settings for such a task."""
    stakes: Stakes | None = None
    """What the task may earn and cost, where the policy scores by that."""
    learned: Learned = NOTHING
    known: Estimate = UNKNOWN
    """What outcomes have shown of tasks like this one."""
    served: frozenset[TaskType] = SERVED_TASK_TYPES
    """Task types that a trainer has a method for."""


def gather(
    spec: TaskOfferSpec,
    policy: CapacityPolicySpec,
    namespace: str,
    learned: Learned,
    served: frozenset[TaskType] = SERVED_TASK_TYPES,
) -> Facts:
    """Find out what the policy knows, and has learned, about an offer of a namespace."""
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    size = size_class_of(parameters, policy.size_classes) if parameters is not None else None
    lane, lane_rule = _lane_of(spec, size, policy)
    task = next((t for t in policy.task_types if t.name is spec.task_type), None)
    limit = next((n for n in policy.namespaces if n.name == namespace), None)
    outlook = Outlook(spec, policy, learned) if size is not None and task is not None else None
    scoring, stakes = policy.scoring.expected_value, None
    if scoring is not None and task is not None and parameters is not None:
        stakes = Stakes(spec, task, parameters, scoring, learned)
    options: tuple[tuple[int, Prediction], ...] = ()
    if spec.gpu_count is not None:
        gpus: int | None = spec.gpu_count
    elif lane_rule is not None:
        gpus = lane_rule.gpus_per_task
    else:
        chosen, options = _choose(outlook, policy, limit, stakes) if outlook is not None else (None, ())
        gpus = chosen if chosen is not None else _usual_gpus(parameters, size, task, policy)
    return Facts(
        spec=spec,
        policy=policy,
        task=task,
        family=family_of(spec.model.name, policy.families),
        parameters=parameters,
        size=size,
        lane=lane,
        lane_rule=lane_rule,
        learned=learned,
        limit=limit,
        gpus=gpus,
        options=options,
        prediction=outlook.on(gpus) if outlook is not None and gpus is not None else None,
        outlook=outlook,
        stakes=stakes,
        known=outlook.known(gpus) if outlook is not None and gpus is not None else UNKNOWN,
        served=served,
    )


def _choose(
    outlook: Outlook, policy: CapacityPolicySpec, limit: NamespaceLimit | None, stakes: Stakes | None
) -> tuple[int | None, tuple[tuple[int, Prediction], ...]]:
    """Choose the number of GPUs where neither the offer nor a lane says it, or the counts for the cycle to choose."""
    most = limit.gpus if limit is not None else None
    if policy.gpu_choice is GpuChoice.FEWEST_GPU_HOURS:
        return outlook.fewest_gpu_hours(), ()
    if policy.gpu_choice is GpuChoice.MOST_VALUE:
        chosen, scoring = most_valuable(outlook, stakes) if stakes is not None else None, policy.scoring.expected_value
        if chosen is None or scoring is None or scoring.spare_share is None:
            return chosen, ()
        larger = ((gpus, it) for gpus, it, _ in outlook.holding() if gpus >= chosen)
        return chosen, tuple((gpus, it) for gpus, it in larger if most is None or gpus <= most)
    if policy.gpu_choice is GpuChoice.EARLIEST_END:
        found = tuple((gpus, it) for gpus, it, _ in outlook.holding() if most is None or gpus <= most)
        # The smallest count stands for the offer as long as nothing is free for it.
        return min((gpus for gpus, _ in found), default=None), found
    return None, ()


def _usual_gpus(
    parameters: int | None, size: SizeClass | None, task: TaskTypeRule | None, policy: CapacityPolicySpec
) -> int | None:
    """Return the GPUs of the size class of the effective size: parameters times the task type's factor."""
    if parameters is not None and task is not None and task.parameter_factor is not None:
        size = size_class_of(int(parameters * Decimal(task.parameter_factor)), policy.size_classes) or size
    return size.gpus if size is not None else None


def _lane_of(
    spec: TaskOfferSpec, size: SizeClass | None, policy: CapacityPolicySpec
) -> tuple[Lane, LaneRule] | tuple[None, None]:
    for lane in policy.lanes:
        for item in lane.rules:
            if item.task_types and spec.task_type not in item.task_types:
                continue
            if item.size_classes and (size is None or size.name not in item.size_classes):
                continue
            if item.architectures and spec.model.architecture not in item.architectures:
                continue
            return lane, item
    return None, None
