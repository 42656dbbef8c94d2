"""Filters and score: what an offer is worth under a policy, whatever is free at the moment.

The result depends on the offer's spec and the policy's spec alone, so the shell keeps it until one of them changes.
Filters return every cause; only the spec and the policy's constants can make a rejection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.contract import CHAT_TEMPLATES, TaskType, chat_template_of
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.queueing import Queue
from taskoffer.api.v1alpha1.taskoffer import ExplanationItem, TaskOfferSpec
from taskoffer.decision.facts import Facts, gather
from taskoffer.decision.finish import duration_text
from taskoffer.decision.identity import Itself
from taskoffer.decision.items import misnamed, other_format
from taskoffer.decision.outcomes import NOTHING, Group, Learned
from taskoffer.decision.own_trainer import check_trainer
from taskoffer.decision.prediction import NOT_ESTIMATED, Prediction, estimates_of, refusals_of
from taskoffer.decision.remedies import told
from taskoffer.decision.score import PLACES, score_of
from taskoffer.decision.sizing import billions
from taskoffer.decision.step_needs import unserved
from taskoffer.decision.verdict import Refusal, Remedy, Score

_MOST_COUNTS = 2
"""Counts of GPUs that are proposed in the place of one that is not allowed; each is tried."""


class Priority(NamedTuple):
    """Where an offer stands among the policy's priorities."""

    level: int
    """0 for the lowest."""
    highest: int
    raise_after: int | None
    """Seconds of waiting that raise it by one."""


class Option(NamedTuple):
    """A number of GPUs on which the task ends in time."""

    gpus: int
    seconds: float
    """From the admission to the result."""
    needed: float
    """The same with the reserve."""
    prediction: Prediction


class Evaluation(NamedTuple):
    """The part of a decision that does not depend on capacity."""

    refusals: tuple[Refusal, ...]
    score: Score | None
    gpus: int
    size_class: str
    lane: str | None
    rank: int = 0
    """The score in steps of its last place, for sorting."""
    prediction: Prediction | None = None
    """What is predicted on its GPUs; None where the policy does not estimate."""
    seconds: float = 0.0
    """What the task is predicted to take, with the reserve; 0 where nothing is predicted."""
    ttl: int | None = None
    """Seconds after its creation in which the offer is to be admitted."""
    occupies: float = 0.0
    """Seconds for which its GPUs are held: as predicted, else as long as its time limit."""
    priority: Priority | None = None
    """None where the policy knows no priorities: then deadlines do not order its offers either."""
    urgency: int | None = None
    """Seconds left to an offer that discount its score by e in the order; None where the order goes by the score."""
    quota: str | None = None
    """The offer's namespace, where the policy limits its GPUs."""
    borrows_from: tuple[str, ...] = ()
    """Lanes in which it may be placed when its own is booked."""
    options: tuple[Option, ...] = ()
    """Counts of GPUs among which the cycle chooses, the preferred one first; empty where ``gpus`` is all there is."""
    spare_share: float | None = None
    """Share of the GPUs that nobody waits for which an offer may get on top; None where it gets the count with which
    it ends first."""
    reserve_from: int | None = None
    """GPUs from which on a node is kept for an offer while it waits for capacity; None where none is."""
    preempts: bool = False
    """Whether running jobs may be stopped for it."""
    at_stake: float = 0.0
    """What an admitted job would lose if it were certain to be late instead of in time, by expected value."""
    floor: tuple[int, Decimal | None] | None = None
    """Admissions of its task type within a day below which another score suffices, and that score."""

    group: Group | None = None
    """Whose outcomes it rests on; None where the policy does not learn."""
    own_trainer: bool = False
    """Whether the offer brings its own trainer, of which nothing is predicted."""

    @property
    def estimates(self) -> tuple[ExplanationItem, ...]:
        """The prediction as the offer's status tells it, put into words when somebody asks."""
        return (NOT_ESTIMATED,) if self.own_trainer else estimates_of(self.prediction)

    def seconds_on(self, gpus: int) -> float:
        """Return for how long the offer holds so many GPUs, if it may choose them, else its own number."""
        return next((option.seconds for option in self.options if option.gpus == gpus), self.occupies)

    @property
    def least_seconds(self) -> float:
        """What the task takes at least, with the reserve, on any of its counts; 0 where nothing is predicted."""
        return min([option.needed for option in self.options]) if self.options else self.seconds

    @property
    def reserves(self) -> bool:
        """Whether a node is kept for it while it waits for capacity."""
        return self.reserve_from is not None and self.gpus >= self.reserve_from

    def in_lane(self, lane: str) -> Evaluation:
        """Return the same for another lane."""
        return self._replace(lane=lane)

    def on(self, option: Option) -> Evaluation:
        """Return the same for another number of GPUs."""
        return self._replace(gpus=option.gpus, occupies=option.seconds, prediction=option.prediction)


def evaluate(
    spec: TaskOfferSpec,
    policy: CapacityPolicySpec,
    namespace: str = "",
    learned: Learned = NOTHING,
) -> Evaluation:
    """Filter and score an offer of a namespace under a policy.

    Args:
        spec: The offer.
        policy: The policy.
        namespace: The offer's namespace, which the policy may limit.
        learned: What the policy has learned from finished jobs.
    """
    facts = gather(spec, policy, namespace, learned)
    score = score_of(facts)
    refusals = told(_refusals(facts, score), spec, lambda changed: refused(changed, policy, namespace, learned))
    finish = facts.prediction.finish if facts.prediction is not None else None
    priority = _priority(facts)
    return Evaluation(
        refusals=refusals,
        score=score,
        gpus=facts.gpus or 0,
        size_class=facts.size.name if facts.size else "",
        lane=facts.lane.name if facts.lane else None,
        rank=int(score.total / PLACES) if score is not None else 0,
        prediction=facts.prediction,
        ttl=policy.filters.offer_ttl_seconds,
        seconds=facts.prediction.seconds if facts.prediction is not None else 0.0,
        occupies=finish.seconds if finish is not None else float(spec.time_limit_seconds),
        priority=priority,
        urgency=policy.scoring.expected_value.urgency_seconds if policy.scoring.expected_value else None,
        quota=namespace if facts.limit is not None and facts.limit.gpus is not None else None,
        borrows_from=facts.lane.borrow_from if facts.lane else (),
        options=tuple(
            Option(gpus, found.finish.seconds, found.seconds, found)
            for gpus, found in facts.options
            if found.finish is not None
        ),
        spare_share=facts.spare_share,
        reserve_from=policy.queue.reserve_from_gpus if policy.queue is not None else None,
        preempts=_preempts(facts, priority),
        at_stake=facts.stakes.lateness(facts.known) if facts.stakes is not None and policy.preemption else 0.0,
        floor=_floor(facts),
        group=facts.group if policy.learning is not None else None,
        own_trainer=spec.trainer is not None,
    )


def refused(
    spec: TaskOfferSpec, policy: CapacityPolicySpec, namespace: str = "", learned: Learned = NOTHING
) -> list[Refusal]:
    """Return what stands against an offer, without a word about remedies."""
    facts = gather(spec, policy, namespace, learned)
    return _refusals(facts, score_of(facts))


def _refusals(facts: Facts, score: Score | None) -> list[Refusal]:
    refusals = [refusal for check in _FILTERS for refusal in check(facts)]
    if score is not None:
        refusals.extend(_check_score(facts, score))
    return refusals


def _priority(facts: Facts) -> Priority | None:
    if facts.policy.queue is None:
        return None
    highest = facts.limit.highest_priority if facts.limit is not None else None
    return _priority_in(Itself(facts.policy.queue), facts.spec.priority_class_name, highest)


@lru_cache(maxsize=4096)
def _priority_in(among: Itself[Queue], asked: str | None, highest: str | None) -> Priority:
    """Return the priority of all offers that ask for this class, where they may ask for one up to the highest."""
    queue = among.value
    names, name = queue.priorities, asked or queue.default_priority
    level = names.index(name) if name in names else 0
    if highest in names:
        # Nobody has asked for the default, so it gives way to the namespace's limit instead of being refused.
        level = min(level, names.index(highest))
    return Priority(level, max(0, len(names) - 1), queue.raise_after_seconds)


def _preempts(facts: Facts, priority: Priority | None) -> bool:
    rules = facts.policy.preemption
    if rules is None:
        return False
    names = facts.policy.queue.priorities if facts.policy.queue is not None else ()
    return not rules.rules or any(names[priority.level if priority else 0] in rule.by for rule in rules.rules)


def _floor(facts: Facts) -> tuple[int, Decimal | None] | None:
    if facts.task is None or facts.task.daily_floor is None:
        return None
    least = facts.policy.filters.floor_min_score
    return facts.task.daily_floor, Decimal(least) if least is not None else None


def _check_task_type(facts: Facts) -> Iterator[Refusal]:
    if facts.task is None or not facts.task.accepted:
        accepted = [t.name.value for t in facts.policy.task_types if t.accepted]
        yield Refusal(
            Reason.TASK_TYPE_NOT_ACCEPTED,
            f"taskType {facts.spec.task_type.value} is not accepted by the policy, which takes {', '.join(accepted)}",
            remedies=(Remedy(f"with taskType {' or '.join(accepted)}"),),
        )


def _check_features(facts: Facts) -> Iterator[Refusal]:
    for field, remedy in (*unserved(facts.spec, facts.policy.steps), *_unserved(facts.spec)):
        yield Refusal(Reason.FEATURE_NOT_SERVED, f"spec.{field} is not served: {remedy}", remedy)
    for field, wrong in misnamed(facts.spec, facts.policy.steps):
        remedy = f"correct {field}, or use a claim"
        yield Refusal(Reason.FEATURE_NOT_SERVED, f"spec.{field} is not served: {wrong}; {remedy}", remedy)


def _unserved(spec: TaskOfferSpec) -> Iterator[tuple[str, str]]:
    """Name each field that asks for something this version does not do, with the remedy."""
    chat = spec.dataset.chat
    if chat is not None and chat_template_of(chat.chat_template) is None:
        yield "dataset.chat.chatTemplate", f"set it to one of {', '.join(CHAT_TEMPLATES)}"
    format_remedy = other_format(spec)
    if format_remedy is not None:
        yield "dataset.fileFormat", format_remedy
    if spec.kl_coefficient is not None:
        yield "klCoefficient", "remove it"
    if spec.extra_datasets:
        yield "extraDatasets", "remove it"
    if spec.model.yarn_factor is not None and spec.task_type is TaskType.IMAGE:
        yield "model.yarnFactor", "remove it; a model of pictures has no context to be stretched"
    if spec.tracking is not None and spec.tracking.mode != "Disabled":
        yield "tracking.mode", "set it to Disabled; progress is in the TrainingJob's status"


def _check_model(facts: Facts) -> Iterator[Refusal]:
    name = facts.spec.model.name
    if facts.family is None and facts.policy.filters.unknown_family is None:
        families = ", ".join(f.name for f in facts.policy.families) or "none"
        yield Refusal(
            Reason.MODEL_FAMILY_NOT_ACCEPTED,
            f"model {name} belongs to no family that the policy accepts ({families})",
            remedies=(Remedy(f"with a model of the families {families}"),),
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
            remedies=(Remedy("with a model inside one of the size classes"),),
        )


def _check_time_limit(facts: Facts) -> Iterator[Refusal]:
    longest = facts.policy.filters.max_time_limit_seconds
    asked = facts.spec.time_limit_seconds
    if longest is not None and asked >= longest:
        yield Refusal(
            Reason.TIME_LIMIT_TOO_LONG,
            f"timeLimitSeconds {asked} ({duration_text(asked)}) is not below the policy's {longest} "
            f"({duration_text(longest)})",
            remedies=(Remedy(f"with timeLimitSeconds below {longest}", {"time_limit_seconds": max(1, longest - 1)}),),
        )


def _check_priority(facts: Facts) -> Iterator[Refusal]:
    queue, asked = facts.policy.queue, facts.spec.priority_class_name
    if queue is None or not queue.priorities or asked is None:
        return
    allowed = queue.priorities
    highest = facts.limit.highest_priority if facts.limit is not None else None
    if facts.limit is not None and highest is not None:
        allowed = allowed[: allowed.index(highest) + 1]
    if asked not in allowed:
        whose = f"namespace {facts.limit.name}" if facts.limit is not None and asked in queue.priorities else "offers"
        yield Refusal(
            Reason.PRIORITY_NOT_ALLOWED,
            f"priorityClassName {asked} is not among those that the policy lets {whose} ask for: {', '.join(allowed)}",
            remedies=(Remedy(f"with priorityClassName {' or '.join(allowed)}", {"priority_class_name": allowed[0]}),),
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
            remedies=_counts(facts, gpus),
        )
    elif facts.lane is not None and gpus > facts.lane.gpus:
        yield Refusal(
            Reason.GPU_COUNT_NOT_ALLOWED,
            f"{gpus} x {resource.name} is more than lane {facts.lane.name} has ({facts.lane.gpus})",
            remedies=(*_counts(facts, gpus), Remedy(f"once lanes[{facts.lane.name}].gpus is raised")),
        )
    elif facts.limit is not None and facts.limit.gpus is not None and gpus > facts.limit.gpus:
        yield Refusal(
            Reason.GPU_COUNT_NOT_ALLOWED,
            f"{gpus} x {resource.name} is more than the policy lets namespace {facts.limit.name} hold "
            f"({facts.limit.gpus})",
            remedies=(*_counts(facts, gpus), Remedy(f"once namespaces[{facts.limit.name}].gpus is raised")),
        )


def _counts(facts: Facts, gpus: int) -> tuple[Remedy, ...]:
    """Return the nearest counts that the policy hands out here, as remedies."""
    nearest = sorted(facts.possible_counts, key=lambda n: (abs(n - gpus), n))[:_MOST_COUNTS]
    return tuple(Remedy(f"with gpuCount {n}", {"gpu_count": n}) for n in nearest)


def _check_prediction(facts: Facts) -> Iterator[Refusal]:
    if facts.outlook is not None and facts.gpus is not None:
        yield from refusals_of(facts.outlook, facts.spec, facts.policy, facts.gpus, facts.possible_counts)


def _check_trainer(facts: Facts) -> Iterator[Refusal]:
    return check_trainer(facts.spec, facts.policy)


def _check_score(facts: Facts, score: Score) -> Iterator[Refusal]:
    least = facts.policy.filters.min_score
    if least is not None and score.total <= Decimal(least):
        yield Refusal(
            Reason.SCORE_TOO_LOW,
            f"score {score.total} does not exceed the policy's {least}",
            remedies=(
                Remedy(f"with a score above {least}; it lacks {(Decimal(least) - score.total).quantize(PLACES)}"),
            ),
        )


_FILTERS: tuple[Callable[[Facts], Iterator[Refusal]], ...] = (
    _check_task_type,
    _check_model,
    _check_time_limit,
    _check_priority,
    _check_gpus,
    _check_prediction,
    _check_trainer,
    _check_features,
)
