"""What a policy knows about an offer: its type, family, size, lane and GPUs, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    chosen: int | None = None
    """The count that the policy's gpuChoice has found."""
    options: tuple[tuple[int, Prediction], ...] = ()
    """Counts among which the cycle may choose, with what is predicted on them."""
    prediction: Prediction | None = None
    learned: Learned = NOTHING
    known: Estimate = UNKNOWN
    """What outcomes have shown of tasks like this one."""
    served: frozenset[TaskType] = SERVED_TASK_TYPES
    """Task types that a trainer has a method for."""

    @property
    def gpus(self) -> int | None:
        """GPUs to book: what the offer asks for, else what the lane, the choice or the size class give."""
        if self.spec.gpu_count is not None:
            return self.spec.gpu_count
        if self.lane_rule is not None:
            return self.lane_rule.gpus_per_task
        if self.chosen is not None:
            return self.chosen
        return self.size_for_gpus.gpus if self.size_for_gpus else None

    @property
    def size_for_gpus(self) -> SizeClass | None:
        """Size class of the effective size: parameters times the task type's factor."""
        if self.parameters is None or self.task is None or self.task.parameter_factor is None:
            return self.size
        effective = int(self.parameters * Decimal(self.task.parameter_factor))
        return size_class_of(effective, self.policy.size_classes) or self.size


def gather(spec: TaskOfferSpec, policy: CapacityPolicySpec, namespace: str, learned: Learned) -> Facts:
    """Find out what the policy knows, and has learned, about an offer of a namespace."""
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    size = size_class_of(parameters, policy.size_classes) if parameters is not None else None
    lane, lane_rule = _lane_of(spec, size, policy)
    facts = Facts(
        spec=spec,
        policy=policy,
        task=next((t for t in policy.task_types if t.name is spec.task_type), None),
        family=family_of(spec.model.name, policy.families),
        parameters=parameters,
        size=size,
        lane=lane,
        lane_rule=lane_rule,
        learned=learned,
        limit=next((n for n in policy.namespaces if n.name == namespace), None),
    )
    if facts.size is None or facts.task is None:
        return facts
    if spec.gpu_count is None and lane_rule is None:
        facts = _choose(facts)
    if facts.gpus is None:
        return facts
    known = learned.about(spec, policy, facts.gpus)
    return replace(facts, prediction=predict(spec, policy, facts.gpus, learned), known=known)


def _choose(facts: Facts) -> Facts:
    """Choose the number of GPUs where neither the offer nor a lane says it."""
    spec, policy = facts.spec, facts.policy
    if policy.gpu_choice is GpuChoice.FEWEST_GPU_HOURS:
        return replace(facts, chosen=fewest_gpu_hours(spec, policy, facts.learned))
    if policy.gpu_choice is GpuChoice.MOST_VALUE:
        return replace(facts, chosen=most_valuable(spec, policy, facts.learned))
    if policy.gpu_choice is GpuChoice.EARLIEST_END:
        most = facts.limit.gpus if facts.limit is not None else None
        found = tuple(
            (gpus, it) for gpus, it in holding_counts(spec, policy, facts.learned) if most is None or gpus <= most
        )
        # The smallest count stands for the offer as long as nothing is free for it.
        return replace(facts, chosen=min((gpus for gpus, _ in found), default=None), options=found)
    return facts


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
