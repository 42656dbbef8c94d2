"""What a policy knows about an offer: its type, family, size, lane and GPUs, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from taskoffer.api.contract import SERVED_TASK_TYPES
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, GpuChoice
from taskoffer.api.v1alpha1.lanes import Lane, LaneRule
from taskoffer.api.v1alpha1.profiles import FamilyRule, SizeClass, TaskTypeRule
from taskoffer.api.v1alpha1.queueing import NamespaceLimit
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Learned
from taskoffer.decision.prediction import Prediction, fewest_gpu_hours, holding_counts, predict
from taskoffer.decision.sizing import family_of, parameters_of, size_class_of
from taskoffer.decision.value import most_valuable


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
    sized = size is not None and task is not None
    options: tuple[tuple[int, Prediction], ...] = ()
    if spec.gpu_count is not None:
        gpus: int | None = spec.gpu_count
    elif lane_rule is not None:
        gpus = lane_rule.gpus_per_task
    else:
        chosen, options = _choose(spec, policy, limit, learned) if sized else (None, ())
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
        prediction=predict(spec, policy, gpus, learned) if sized and gpus is not None else None,
        known=learned.about(spec, policy, gpus) if sized and gpus is not None else UNKNOWN,
        served=served,
    )


def _choose(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, limit: NamespaceLimit | None, learned: Learned
) -> tuple[int | None, tuple[tuple[int, Prediction], ...]]:
    """Choose the number of GPUs where neither the offer nor a lane says it, or the counts for the cycle to choose."""
    if policy.gpu_choice is GpuChoice.FEWEST_GPU_HOURS:
        return fewest_gpu_hours(spec, policy, learned), ()
    if policy.gpu_choice is GpuChoice.MOST_VALUE:
        most = limit.gpus if limit is not None else None
        chosen, scoring = most_valuable(spec, policy, learned), policy.scoring.expected_value
        if chosen is None or scoring is None or scoring.spare_share is None:
            return chosen, ()
        larger = (it for it in holding_counts(spec, policy, learned) if it[0] >= chosen)
        return chosen, tuple(it for it in larger if most is None or it[0] <= most)
    if policy.gpu_choice is GpuChoice.EARLIEST_END:
        most = limit.gpus if limit is not None else None
        found = tuple((gpus, it) for gpus, it in holding_counts(spec, policy, learned) if most is None or gpus <= most)
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
