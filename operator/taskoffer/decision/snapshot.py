"""The world at one moment, as far as decisions see it. All values; whoever builds it has done the IO before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import NamedTuple

from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import Condition, PolicyRef
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.decision.conditions import condition_of
from taskoffer.decision.evaluate import Evaluation, Option, Priority
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, NodeView, Release
from taskoffer.decision.moments import later
from taskoffer.decision.outcomes import Learned
from taskoffer.decision.placed_jobs import MoveRequest, Order, Resumption, Running


@dataclass(frozen=True, slots=True)
class OfferTerms:
    """What of an offer's spec still counts once it has been evaluated, under the same names.

    A queue can be long, and a whole spec takes thirty times the memory.
    """

    task_id: str
    task_type: TaskType
    policy_name: str | None
    time_limit_seconds: int
    clock_mode: ClockMode | None
    deadline: datetime | None
    expires_at: datetime | None
    is_active: bool
    source_ends: datetime | None

    @classmethod
    def of(cls, spec: TaskOfferSpec) -> OfferTerms:
        """Take the terms from a spec."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class OfferView:
    """An undecided or waiting offer at one resourceVersion."""

    key: OfferKey
    uid: str
    resource_version: str
    generation: int
    created: datetime
    spec: TaskOfferSpec | OfferTerms | None
    invalid: str | None = None
    conditions: tuple[Condition, ...] = ()
    observed_generation: int | None = None

    @property
    def reason(self) -> str | None:
        """The reason that its Admitted condition gives now, or None while it is undecided."""
        admitted = condition_of(self.conditions, "Admitted") if self.conditions else None
        return admitted.reason if admitted is not None else None

    def says(self, reason: Reason) -> bool:
        """Tell whether the offer's status gives this reason already, for this generation."""
        return self.reason == reason.value and self.observed_generation == self.generation

    @property
    def full_spec(self) -> TaskOfferSpec | None:
        """The whole spec, where the view has more of it than its terms."""
        return self.spec if isinstance(self.spec, TaskOfferSpec) else None

    @property
    def ends(self) -> datetime | None:
        """The moment after which it is refused unless it was admitted: it is over, or its data cannot be fetched."""
        if self.spec is None:
            return None
        return _sooner(_sooner(self.spec.expires_at, self.spec.deadline), self.spec.source_ends)


@dataclass(frozen=True, slots=True)
class Sibling:
    """An offer with the same task id in the same namespace."""

    created: datetime
    uid: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class PolicyView:
    """A policy: the spec in force, or why there is none."""

    name: str
    uid: str
    generation: int
    spec: CapacityPolicySpec | None
    is_default: bool = False
    created: datetime | None = None
    problem: str = ""
    cause: Reason = Reason.INVALID_POLICY
    """Of what kind the problem is, if there is one."""
    last: tuple[int, CapacityPolicySpec] | None = None
    """Generation and spec that were in force last, as its status keeps them."""

    @property
    def ref(self) -> PolicyRef:
        """The exact version that decisions under it are pinned to."""
        return PolicyRef(name=self.name, uid=self.uid, generation=self.generation)

    def selects(self, node: NodeView) -> bool:
        """Tell whether the policy hands out this node."""
        if self.spec is None:
            return False
        return self.spec.node_selector.matches(node.labels)


class Shape(NamedTuple):
    """What offers have in common that wait for the same thing: whatever stops one of them stops all."""

    policy: str
    gpus: int
    lane: str | None
    reason: str
    """The reason that their status gives."""
    quota: str | None = None
    """Their namespace, where the policy limits its GPUs."""
    borrows_from: tuple[str, ...] = ()
    reserves: bool = False
    preempts: bool = False
    counts: tuple[int, ...] = ()
    """Counts of GPUs among which the cycle chooses."""
    in_time: tuple[int, ...] = ()
    """Those of them on which it may still be in time for its deadline."""


def shape_of(policy: str, evaluation: Evaluation, reason: str, in_time: tuple[int, ...] = ()) -> Shape:
    """Return what an offer has in common with others that wait for the same reason."""
    return Shape(
        policy,
        evaluation.gpus,
        evaluation.lane,
        reason,
        evaluation.quota,
        evaluation.borrows_from,
        evaluation.reserves,
        evaluation.preempts,
        tuple([option.gpus for option in evaluation.options]),
        in_time,
    )


def end_of(offer: OfferView, evaluation: Evaluation | None) -> datetime | None:
    """Return the moment from which an offer cannot be admitted any more.

    It is the first of what the offer says, the end of the time that its policy gives it, and its last start in time.
    """
    ends = offer.ends
    if evaluation is None:
        return ends
    deadline = offer.spec.deadline if offer.spec is not None else None
    if deadline is not None and evaluation.least_seconds > 0:
        ends = _sooner(ends, later(deadline, -evaluation.least_seconds))
    return _sooner(ends, ttl_end(offer, evaluation))


def _sooner(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return one or other
    return min(one, other)


def can_start(offer: OfferView, evaluation: Evaluation, option: Option, moment: datetime) -> bool:
    """Tell whether an offer can still be admitted at a moment, and on so many GPUs is in time for its deadline."""
    ends = [offer.ends, ttl_end(offer, evaluation)]
    if offer.spec is not None and offer.spec.deadline is not None:
        ends.append(later(offer.spec.deadline, -option.needed))
    return all(end is None or moment < end for end in ends)


def on_count_in_time(offer: OfferView, evaluation: Evaluation, moment: datetime) -> Evaluation:
    """Return an offer's evaluation on the first of its counts on which it is in time when it starts at a moment.

    Where it gets the count with which it ends first, one stands for all of them, and this changes nothing.
    """
    if evaluation.spare_share is None:
        return evaluation
    in_time = (option for option in evaluation.options if can_start(offer, evaluation, option, moment))
    first = next(in_time, None)
    return evaluation if first is None or first.gpus == evaluation.gpus else evaluation.on(first)


def ttl_end(offer: OfferView, evaluation: Evaluation | None) -> datetime | None:
    """Return when the time ends that the policy gives an offer, or None where it gives any time."""
    ttl = evaluation.ttl if evaluation is not None else None
    return later(offer.created, ttl) if ttl is not None else None


class Waiting(NamedTuple):
    """An offer in the order of admission. Orders differ in the UID at last, so that nothing else is compared."""

    order: Order
    offer: OfferView
    evaluation: Evaluation


def waiting(offer: OfferView, evaluation: Evaluation, now: datetime, *, is_heir: bool = False) -> Waiting:
    """Return an offer with its place in the order: priority, then the earliest deadline, then score, then age.

    Where the policy knows no priorities its offers have the lowest one, and deadlines do not count. Where it scores by
    expected value with an urgency, both score and the end of the wait count, in the place of the deadline. An offer for
    which jobs have been stopped comes first in its priority, or others would take what is freed for it. What it waits
    for is the first of its counts on which it is in time now.
    """
    evaluation = on_count_in_time(offer, evaluation, now)
    level, deadline = 0, math.inf
    if evaluation.priority is not None:
        level = evaluation.priority.level + raises(offer, evaluation.priority, now)
        if offer.spec is not None and offer.spec.deadline is not None:
            deadline = offer.spec.deadline.timestamp()
    if evaluation.urgency is not None:
        deadline = -_pressing(offer, evaluation, evaluation.urgency)
    if is_heir:
        return Waiting((-level, -math.inf, -1, offer.created, offer.uid), offer, evaluation)
    return Waiting((-level, deadline, -evaluation.rank, offer.created, offer.uid), offer, evaluation)


_UNHURRIED = 8
"""An offer without an end counts as if it ended after so many urgencies, so that its turn comes."""


def _pressing(offer: OfferView, evaluation: Evaluation, urgency: int) -> float:
    """Return how pressing an offer is: the logarithm of score * exp(-(end - now) / urgency), less what all share.

    This is the index of the dispatching rule for apparent tardiness costs (Vepsalainen and Morton, 1987): value for
    each GPU-hour, discounted by the slack. ``now`` discounts all offers alike, so the order does not change with time.
    """
    end = end_of(offer, evaluation) or later(offer.created, _UNHURRIED * urgency)
    return math.log(max(evaluation.rank, 1)) - end.timestamp() / urgency


def raises(offer: OfferView, priority: Priority, now: datetime) -> int:
    """Return by how many priorities an offer's waiting has raised it: one per interval, up to the highest."""
    if priority.raise_after is None:
        return 0
    waited = (now - offer.created).total_seconds()
    return max(0, min(priority.highest - priority.level, int(waited // priority.raise_after)))


def next_raise(offer: OfferView, evaluation: Evaluation, now: datetime) -> datetime | None:
    """Return when waiting raises an offer next, or None when it does not any more."""
    priority = evaluation.priority
    if priority is None or priority.raise_after is None:
        return None
    done = raises(offer, priority, now)
    if priority.level + done >= priority.highest:
        return None
    return later(offer.created, (done + 1) * priority.raise_after)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one cycle decides on."""

    now: datetime
    offers: Sequence[OfferView]
    policies: Mapping[str, PolicyView]
    nodes: Sequence[NodeView]
    claims: Sequence[Claim]
    siblings: Mapping[tuple[str, str], Sequence[Sibling]] = field(default_factory=dict)
    evaluations: Mapping[tuple[str, str], Evaluation] = field(default_factory=dict)
    """Evaluations by offer UID and policy name; every offer with a spec and a policy in force has one."""
    moves: Sequence[MoveRequest] = ()
    standing: Mapping[Shape, Sequence[Waiting]] = field(default_factory=dict)
    """Offers beside ``offers`` whose answer still holds as long as the same thing stands in their way: they have a
    policy in force, are refused by nothing in it, are active, are no duplicates and have not expired. In order."""
    standing_end: datetime | None = None
    """No standing offer expires, or becomes too late for one of its counts, before."""
    releases: Sequence[Release] = ()
    """When what is booked is predicted to come free; what nothing is known of is not in it."""
    learned: Mapping[str, Learned] = field(default_factory=dict)
    """What policies have learned, by policy; what is not in it has learned nothing."""
    running: Sequence[Running] = ()
    """Jobs that may be stopped for others, or have been asked to."""
    resumptions: Sequence[Resumption] = ()
    admitted_today: Mapping[tuple[str, TaskType], int] = field(default_factory=dict)
    """Offers that were admitted within the last 24 hours, by policy and task type, where a policy counts them."""

    @property
    def heirs(self) -> frozenset[str]:
        """UIDs of the offers for which jobs stop or have stopped."""
        leaving = (running.leaving_for for running in self.running if running.leaving_for is not None)
        return frozenset(leaving) | {waits.left_for for waits in self.resumptions}

    def policy_for(self, spec: TaskOfferSpec | OfferTerms) -> tuple[PolicyView | None, Reason | None, str]:
        """Return the policy that decides an offer, or the reason and message why there is none.

        Without a name it is the policy annotated as default; of several the newest, as with StorageClasses.
        """
        if spec.policy_name is not None:
            policy = self.policies.get(spec.policy_name)
            if policy is None:
                return (
                    None,
                    Reason.POLICY_NOT_FOUND,
                    f"CapacityPolicy {spec.policy_name} does not exist: create it",
                )
        else:
            defaults = [p for p in self.policies.values() if p.is_default]
            if not defaults:
                return (
                    None,
                    Reason.POLICY_NOT_FOUND,
                    (
                        "spec.policyName is empty and no CapacityPolicy is annotated "
                        "taskoffer.dev/is-default-policy=true: name one or annotate one"
                    ),
                )
            policy = max(defaults, key=lambda p: (p.created is not None, p.created, p.name))
        if policy.spec is None:
            return (
                None,
                Reason.POLICY_NOT_READY,
                f"CapacityPolicy {policy.name} is not usable: {policy.problem}",
            )
        return policy, None, ""
