"""Filters and score: what an offer is worth under a policy, whatever is free at the moment.

The result depends on the offer's spec and the policy's spec alone, so the shell keeps it until one of them changes.
Filters return every cause; only the spec and the policy's constants can make a rejection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

from taskoffer.api.contract import SERVED_TASK_TYPES
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import (
    CapacityPolicySpec,
    FamilyRule,
    GpuChoice,
    Lane,
    LaneRule,
    SizeClass,
    TaskTypeRule,
    TermName,
)
from taskoffer.api.v1alpha1.taskoffer import ExplanationItem, TaskOfferSpec
from taskoffer.decision.finish import duration_text
from taskoffer.decision.outcomes import NOTHING, UNKNOWN, Estimate, Group, Learned, group_of
from taskoffer.decision.prediction import Prediction, estimates_of, fewest_gpu_hours, predict, refusals_of
from taskoffer.decision.sizing import billions, family_of, parameters_of, size_class_of
from taskoffer.decision.verdict import Refusal, Score

_PLACES = Decimal("0.0001")
_HIGHEST = Decimal("99999999.9999")
"""The most that status.score can hold."""


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
    chosen: int | None = None
    """The count with the fewest GPU-hours, where the policy wants that one."""
    prediction: Prediction | None = None
    learned: Learned = NOTHING
    known: Estimate = UNKNOWN
    """What outcomes have shown of tasks like this one."""

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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The part of a decision that does not depend on capacity."""

    refusals: tuple[Refusal, ...]
    score: Score | None
    gpus: int
    size_class: str
    lane: str | None
    rank: int = 0
    """The score in steps of its last place, for sorting."""
    estimates: tuple[ExplanationItem, ...] = ()
    seconds: float = 0.0
    """What the task is predicted to take, with the reserve; 0 where nothing is predicted."""
    ttl: int | None = None
    """Seconds after its creation in which the offer is to be admitted."""
    group: Group | None = None
    """Whose outcomes it rests on; None where the policy does not learn."""


def evaluate(spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned = NOTHING) -> Evaluation:
    """Filter and score an offer under a policy and what that has learned."""
    facts = _gather(spec, policy, learned)
    refusals = [refusal for check in _FILTERS for refusal in check(facts)]
    score = score_of(facts)
    if score is not None:
        refusals.extend(_check_score(facts, score))
    return Evaluation(
        refusals=tuple(refusals),
        score=score,
        gpus=facts.gpus or 0,
        size_class=facts.size.name if facts.size else "",
        lane=facts.lane.name if facts.lane else None,
        rank=int(score.total / _PLACES) if score is not None else 0,
        estimates=estimates_of(facts.prediction),
        ttl=policy.filters.offer_ttl_seconds,
        seconds=facts.prediction.seconds if facts.prediction is not None else 0.0,
        group=group_of(spec, policy) if policy.learning is not None else None,
    )


def _gather(spec: TaskOfferSpec, policy: CapacityPolicySpec, learned: Learned) -> Facts:
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
    )
    if facts.size is None or facts.task is None:
        return facts
    if policy.gpu_choice is GpuChoice.FEWEST_GPU_HOURS and spec.gpu_count is None and lane_rule is None:
        facts = replace(facts, chosen=fewest_gpu_hours(spec, policy, learned))
    if facts.gpus is None:
        return facts
    known = learned.about(spec, policy, facts.gpus)
    return replace(facts, prediction=predict(spec, policy, facts.gpus, learned), known=known)


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


def _check_task_type(facts: Facts) -> Iterator[Refusal]:
    accepted = [t.name.value for t in facts.policy.task_types if t.accepted]
    if facts.task is None or not facts.task.accepted:
        yield Refusal(
            Reason.TASK_TYPE_NOT_ACCEPTED,
            f"taskType {facts.spec.task_type.value} is not accepted by the policy, which takes {', '.join(accepted)}",
            f"accepted with taskType {' or '.join(accepted)}",
        )
    if facts.spec.task_type not in SERVED_TASK_TYPES:
        served = ", ".join(sorted(t.value for t in SERVED_TASK_TYPES))
        yield Refusal(
            Reason.TASK_TYPE_NOT_SERVED,
            f"no trainer method serves taskType {facts.spec.task_type.value} yet; this version trains {served}",
            f"accepted with taskType {served}",
        )


def _check_features(facts: Facts) -> Iterator[Refusal]:
    for field, remedy in _unserved(facts.spec):
        yield Refusal(Reason.FEATURE_NOT_SERVED, f"spec.{field} is not served by this version: {remedy}", remedy)


def _unserved(spec: TaskOfferSpec) -> Iterator[tuple[str, str]]:
    """Name each field that asks for something this version does not do, with the remedy."""
    if spec.model.source is None or spec.model.source.persistent_volume_claim is None:
        yield "model.source", "put the model on a claim and set model.source.persistentVolumeClaim"
    if spec.dataset.source is None or spec.dataset.source.persistent_volume_claim is None:
        yield "dataset.source", "put the data on a claim and set dataset.source.persistentVolumeClaim"
    if spec.output is None or spec.output.persistent_volume_claim is None:
        yield "output", "set output.persistentVolumeClaim, the claim that receives the adapter"
    if spec.output is not None and spec.output.repository is not None:
        yield "output.repository", "remove it and take the adapter from the output claim"
    if spec.trainer is not None:
        yield "trainer", "remove it; the policy's trainer image is used"
    if spec.kl_coefficient is not None:
        yield "klCoefficient", "remove it"
    if spec.extra_datasets:
        yield "extraDatasets", "remove it"
    if spec.model.yarn_factor is not None:
        yield "model.yarnFactor", "remove it"
    if spec.tracking is not None and spec.tracking.mode != "Disabled":
        yield "tracking.mode", "set it to Disabled; progress is in the TrainingJob's status"


def _check_model(facts: Facts) -> Iterator[Refusal]:
    name = facts.spec.model.name
    if facts.family is None and facts.policy.filters.unknown_family is None:
        families = ", ".join(f.name for f in facts.policy.families) or "none"
        yield Refusal(
            Reason.MODEL_FAMILY_NOT_ACCEPTED,
            f"model {name} belongs to no family that the policy accepts ({families})",
            f"accepted with a model of the families {families}",
        )
    if facts.parameters is None:
        yield Refusal(
            Reason.PARAMETERS_UNKNOWN,
            f"the size of {name} is neither in model.parameters nor readable from its name: set model.parameters",
            "decided once model.parameters is set",
        )
    elif facts.size is None:
        sizes = ", ".join(f"{s.name} from {billions(s.min_parameters)}" for s in facts.policy.size_classes)
        yield Refusal(
            Reason.MODEL_SIZE_NOT_ACCEPTED,
            f"no size class of the policy takes {billions(facts.parameters)} parameters (classes: {sizes})",
            "accepted with a model inside one of the size classes",
        )


def _check_time_limit(facts: Facts) -> Iterator[Refusal]:
    longest = facts.policy.filters.max_time_limit_seconds
    asked = facts.spec.time_limit_seconds
    if longest is not None and asked >= longest:
        yield Refusal(
            Reason.TIME_LIMIT_TOO_LONG,
            f"timeLimitSeconds {asked} ({duration_text(asked)}) is not below the policy's {longest} "
            f"({duration_text(longest)})",
            f"accepted with timeLimitSeconds below {longest}",
        )


def _check_gpus(facts: Facts) -> Iterator[Refusal]:
    if facts.policy.lanes and facts.lane is None:
        lanes = ", ".join(lane.name for lane in facts.policy.lanes)
        yield Refusal(
            Reason.NO_LANE,
            f"no lane of the policy takes {facts.spec.task_type.value} on a "
            f"{facts.size.name if facts.size else 'model of unknown size'} model (lanes: {lanes})",
        )
    gpus = facts.gpus
    if gpus is None:
        return
    resource = facts.policy.resources[0]
    if gpus not in resource.counts:
        allowed = ", ".join(map(str, resource.counts))
        yield Refusal(
            Reason.GPU_COUNT_NOT_ALLOWED,
            f"{gpus} x {resource.name} is not allowed; the policy hands out {allowed}",
            f"accepted with gpuCount {allowed}",
        )
    elif facts.lane is not None and gpus > facts.lane.gpus:
        yield Refusal(
            Reason.GPU_COUNT_NOT_ALLOWED,
            f"{gpus} x {resource.name} is more than lane {facts.lane.name} has ({facts.lane.gpus})",
            f"accepted with gpuCount up to {facts.lane.gpus}",
        )


def _check_prediction(facts: Facts) -> Iterator[Refusal]:
    lane_gpus = facts.lane.gpus if facts.lane is not None else None
    if facts.prediction is not None and facts.gpus is not None:
        yield from refusals_of(facts.prediction, facts.spec, facts.policy, facts.gpus, lane_gpus, facts.learned)


def _check_score(facts: Facts, score: Score) -> Iterator[Refusal]:
    least = facts.policy.filters.min_score
    if least is not None and score.total <= Decimal(least):
        yield Refusal(
            Reason.SCORE_TOO_LOW,
            f"score {score.total} does not exceed the policy's {least}",
            f"accepted with a score above {least}; it lacks {(Decimal(least) - score.total).quantize(_PLACES)}",
        )


_FILTERS: tuple[Callable[[Facts], Iterator[Refusal]], ...] = (
    _check_task_type,
    _check_model,
    _check_time_limit,
    _check_gpus,
    _check_prediction,
    _check_features,
)


def score_of(facts: Facts) -> Score | None:
    """Return the weighted sum of the policy's terms, or None when the offer lacks what a term needs."""
    values = _term_values(facts)
    if values is None:
        return None
    total = Decimal(0)
    items: list[ExplanationItem] = []
    for term in facts.policy.scoring.terms:
        value = Decimal(term.value) if term.value is not None else values[term.name]
        part = (Decimal(term.weight) * value).quantize(_PLACES, ROUND_HALF_UP)
        total += part
        basis = _success_basis(facts) if term.name is TermName.TASK_SUCCESS_RATE else ""
        items.append(_term(term.name.value, str(part), f"{term.weight} x {value.normalize():f}{basis}"))
    cap = facts.policy.scoring.cap
    highest = min(Decimal(cap), _HIGHEST) if cap is not None else _HIGHEST
    if total > highest:
        excess = (highest - total).quantize(_PLACES)
        message = f"the policy caps scores at {cap}" if highest < _HIGHEST else f"no score can be above {_HIGHEST}"
        items.append(ExplanationItem(type="Term", name="Cap", value=str(excess), message=message))
        total += excess
    return Score(total.quantize(_PLACES), tuple(items))


def _success_basis(facts: Facts) -> str:
    """Say what a success rate was made of, where outcomes have changed it."""
    if facts.known.judged == 0 or facts.task is None:
        return ""
    return f" (policy {facts.task.success_rate}, {facts.known.successes} of {facts.known.judged} succeeded)"


@lru_cache(maxsize=4096)
def _term(name: str, value: str, message: str) -> ExplanationItem:
    """Return a term of a score. Offers of a queue share most of theirs, and the values are immutable."""
    return ExplanationItem(type="Term", name=name, value=value, message=message)


def _term_values(facts: Facts) -> dict[TermName, Decimal] | None:
    family_rate = facts.family.success_rate if facts.family else facts.policy.filters.unknown_family
    if facts.task is None or facts.size is None or family_rate is None:
        return None
    longest = facts.policy.filters.max_time_limit_seconds
    if longest is None:
        time_efficiency = Decimal(1)
    else:
        time_efficiency = max(Decimal(0), 1 - Decimal(facts.spec.time_limit_seconds) / longest).quantize(_PLACES)
    return {
        TermName.TASK_WEIGHT: Decimal(facts.task.weight),
        TermName.MODEL_PERFORMANCE: Decimal(family_rate),
        TermName.TASK_SUCCESS_RATE: facts.learned.success_rate(facts.known, Decimal(facts.task.success_rate)),
        TermName.TIME_EFFICIENCY: time_efficiency,
        TermName.SIZE_EFFICIENCY: Decimal(facts.size.size_efficiency),
        TermName.BONUS: Decimal(1),
    }
