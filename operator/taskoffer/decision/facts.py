"""What a policy knows about an offer: its type, family, size, lane and GPUs, and what is predicted of it."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, GpuChoice
from taskoffer.api.v1alpha1.lanes import Lane, LaneRule
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.profiles import FamilyRule, SizeClass, TaskTypeRule
from taskoffer.api.v1alpha1.queueing import NamespaceLimit
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.fit import Subject
from taskoffer.decision.footing import Footings, footings_under
from taskoffer.decision.identity import Itself
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Group, Learned
from taskoffer.decision.prediction import Outlook, Prediction
from taskoffer.decision.sizing import family_of, size_class_of, size_of
from taskoffer.decision.value import Stakes, by_value


class Traits(NamedTuple):
    """What a policy knows about a model and a task type, whatever else an offer says; None where it knows nothing."""

    task: TaskTypeRule | None
    family: FamilyRule | None
    parameters: int | None
    size: SizeClass | None
    lane: Lane | None
    lane_rule: LaneRule | None
    usual_gpus: int | None
    """Those of the size class of the effective size."""
    footings: Footings | None
    """What is predicted of all such tasks, where the policy estimates."""
    group: Group | None
    """Whose outcomes count for such a task, where it has a size class."""


def traits_of(spec: TaskOfferSpec, policy: CapacityPolicySpec) -> Traits:
    """Return what a policy knows about an offer's model and task type; worked out once for all that are alike."""
    model, image = spec.model, spec.dataset.image
    resolution = image.resolution if image is not None else None
    return _traits(Itself(policy), model.name, model.parameters, model.architecture, spec.task_type, resolution)


@lru_cache(maxsize=4096)
def _traits(
    under: Itself[CapacityPolicySpec],
    name: str,
    stated: int | None,
    architecture: Architecture | None,
    task_type: TaskType,
    resolution: int | None,
) -> Traits:
    policy = under.value
    parameters = size_of(stated, name, architecture) or policy.filters.unknown_parameters
    family = family_of(name, policy.families)
    size = size_class_of(parameters, policy.size_classes) if parameters is not None else None
    lane, lane_rule = _lane_of(task_type, architecture, size, policy)
    task = next((t for t in policy.task_types if t.name is task_type), None)
    footings = None
    if policy.estimation is not None and parameters is not None:
        footings = footings_under(under, Subject(name, architecture, parameters, task_type, resolution or 1024))
    return Traits(
        task=task,
        family=family,
        parameters=parameters,
        size=size,
        lane=lane,
        lane_rule=lane_rule,
        usual_gpus=_usual_gpus(parameters, size, task, policy),
        footings=footings,
        group=Group(task_type, family.name if family else "", size.name) if size is not None else None,
    )


class Facts(NamedTuple):
    """What a policy knows about an offer; None where it knows nothing."""

    spec: TaskOfferSpec
    policy: CapacityPolicySpec
    task: TaskTypeRule | None
    family: FamilyRule | None
    parameters: int | None
    size: SizeClass | None
    lane: Lane | None
    group: Group | None = None
    """Whose outcomes count for its task; None where it brings its own trainer."""
    limit: NamespaceLimit | None = None
    """What the policy says about the offer's namespace."""
    gpus: int | None = None
    """GPUs to book."""
    options: tuple[tuple[int, Prediction], ...] = ()
    """Counts among which the cycle may choose, the preferred one first, with what is predicted on them."""
    spare_share: float | None = None
    """Share of the GPUs that nobody waits for which it may get on top; None where it gets the count that ends first."""
    prediction: Prediction | None = None
    outlook: Outlook | None = None
    """What is predicted on any count, where the policy has settings for such a task."""
    stakes: Stakes | None = None
    """What the task may earn and cost, where the policy scores by that."""
    learned: Learned = NOTHING
    known: Estimate = UNKNOWN
    """What outcomes have shown of tasks like this one."""

    @property
    def possible_counts(self) -> list[int]:
        """The counts of GPUs that the policy hands out and that the offer's lane and namespace hold."""
        bounds = [self.lane.gpus] if self.lane is not None else []
        if self.limit is not None and self.limit.gpus is not None:
            bounds.append(self.limit.gpus)
        return [n for n in self.policy.resources[0].counts if all(n <= bound for bound in bounds)]


def gather(
    spec: TaskOfferSpec,
    policy: CapacityPolicySpec,
    namespace: str,
    learned: Learned,
) -> Facts:
    """Find out what the policy knows, and has learned, about an offer of a namespace."""
    traits = traits_of(spec, policy)
    task, parameters, size, lane_rule = traits.task, traits.parameters, traits.size, traits.lane_rule
    limit = next((n for n in policy.namespaces if n.name == namespace), None) if policy.namespaces else None
    outlook, stakes = None, None
    # The policy knows how its own recipe fits and how long that takes, and nothing of anybody else's.
    footings, group = (traits.footings, traits.group) if spec.trainer is None else (None, None)
    if size is not None and task is not None:
        outlook = Outlook(spec, policy.resources[0].counts, footings, group, learned)
    scoring = policy.scoring.expected_value
    if scoring is not None and task is not None and parameters is not None:
        stakes = Stakes(spec, task, parameters, scoring, learned)
    options: tuple[tuple[int, Prediction], ...] = ()
    if spec.gpu_count is not None:
        gpus: int | None = spec.gpu_count
    elif lane_rule is not None:
        gpus = lane_rule.gpus_per_task
    else:
        chosen, options = _choose(spec, outlook, policy, limit, stakes) if outlook is not None else (None, ())
        gpus = chosen if chosen is not None else traits.usual_gpus
    return Facts(
        spec=spec,
        policy=policy,
        task=task,
        family=traits.family,
        parameters=parameters,
        size=size,
        lane=traits.lane,
        group=group,
        limit=limit,
        gpus=gpus,
        options=options,
        spare_share=_spare_share(policy),
        prediction=outlook.on(gpus) if outlook is not None and gpus is not None else None,
        outlook=outlook,
        stakes=stakes,
        learned=learned,
        known=outlook.known(gpus) if outlook is not None and gpus is not None else UNKNOWN,
    )


def _choose(
    spec: TaskOfferSpec,
    outlook: Outlook,
    policy: CapacityPolicySpec,
    limit: NamespaceLimit | None,
    stakes: Stakes | None,
) -> tuple[int | None, tuple[tuple[int, Prediction], ...]]:
    """Choose the number of GPUs where neither the offer nor a lane says it, and the counts for the cycle to choose."""
    most = limit.gpus if limit is not None else None
    if policy.gpu_choice is GpuChoice.EARLIEST_END:
        found = tuple((gpus, it) for gpus, it, _ in outlook.holding() if most is None or gpus <= most)
        # The smallest count stands for the offer as long as nothing is free for it.
        return min((gpus for gpus, _ in found), default=None), found
    ranked: list[tuple[int, Prediction]] = []
    if policy.gpu_choice is GpuChoice.FEWEST_GPU_HOURS:
        ranked = outlook.by_gpu_hours()
    elif policy.gpu_choice is GpuChoice.MOST_VALUE and stakes is not None:
        ranked = by_value(outlook, stakes)
    # Where its namespace may hold none of them, the refusal is to say how many the task takes.
    ranked = [(gpus, it) for gpus, it in ranked if most is None or gpus <= most] or ranked
    if not ranked:
        return None, ()
    chosen = ranked[0][0]
    if spec.deadline is None and not _spare_share(policy):
        # All of them stay in time however long the offer waits, so it never gets another one.
        return chosen, ()
    # One that is smaller and not slower would take fewer GPU-hours and be preferred, so it is of no use here.
    return chosen, tuple((gpus, it) for gpus, it in ranked if gpus >= chosen)


def _spare_share(policy: CapacityPolicySpec) -> float | None:
    if policy.gpu_choice is GpuChoice.EARLIEST_END:
        return None
    scoring = policy.scoring.expected_value if policy.gpu_choice is GpuChoice.MOST_VALUE else None
    return float(scoring.spare_share) if scoring is not None and scoring.spare_share is not None else 0.0


def _usual_gpus(
    parameters: int | None, size: SizeClass | None, task: TaskTypeRule | None, policy: CapacityPolicySpec
) -> int | None:
    """Return the GPUs of the size class of the effective size: parameters times the task type's factor."""
    if parameters is not None and task is not None and task.parameter_factor is not None:
        size = size_class_of(int(parameters * Decimal(task.parameter_factor)), policy.size_classes) or size
    return size.gpus if size is not None else None


def _lane_of(
    task_type: TaskType, architecture: Architecture | None, size: SizeClass | None, policy: CapacityPolicySpec
) -> tuple[Lane, LaneRule] | tuple[None, None]:
    for lane in policy.lanes:
        for item in lane.rules:
            if item.task_types and task_type not in item.task_types:
                continue
            if item.size_classes and (size is None or size.name not in item.size_classes):
                continue
            if item.architectures and architecture not in item.architectures:
                continue
            return lane, item
    return None, None
