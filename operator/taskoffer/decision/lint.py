"""What is odd about a policy although it is valid: rules that never bind, or ask for what is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec, FullMode, LintFinding
from taskoffer.api.v1alpha1.lanes import LaneRule
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.scoring import TermName, TermWeight
from taskoffer.api.v1alpha1.taskoffer import LONGEST_TIME_LIMIT
from taskoffer.decision.ledger import NodeView
from taskoffer.decision.lint_hand_over import lint_hand_over
from taskoffer.decision.lint_profiles import finding, lint_profiles
from taskoffer.decision.lint_steps import lint_steps
from taskoffer.decision.lint_trainers import lint_trainers

_PRESSURE = Decimal("0.90")
"""Share of a GPU's memory above which running jobs are under pressure, in both strategy documents."""


def lint(
    spec: CapacityPolicySpec, nodes: tuple[NodeView, ...] = (), shared: Mapping[str, Sequence[str]] | None = None
) -> tuple[LintFinding, ...]:
    """Return what is odd about a policy although it is valid.

    Args:
        spec: The policy.
        nodes: The nodes that it selects, where they are known.
        shared: Names of other policies by the nodes of this one that they select too.
    """
    found = (
        *_scores(spec),
        *_limits(spec, nodes),
        *_lanes(spec, nodes),
        *_queue(spec),
        *_preemption(spec),
        *_memory(spec),
        *lint_trainers(spec),
        *lint_hand_over(spec),
        *_shared(shared or {}),
        *lint_profiles(spec.size_classes, spec.task_types, spec.lanes, spec.estimation),
        *lint_steps(spec.size_classes, spec.task_types, spec.lanes),
    )
    return found[:32]


def score_range(spec: CapacityPolicySpec) -> tuple[Decimal, Decimal] | None:
    """Return the lowest and the highest score that an accepted offer can get, before the time limit is known.

    Time efficiency runs from 0 (at the longest limit) to 1, and is 1 where the policy names no longest limit; the other
    terms take the values that the policy lists. None for expected values: what an offer is worth has no bound.
    """
    if spec.scoring.expected_value is not None:
        return None
    low, high = _uncapped_range(spec)
    cap = Decimal(spec.scoring.cap) if spec.scoring.cap is not None else high
    return min(low, cap), min(high, cap)


def _uncapped_range(spec: CapacityPolicySpec) -> tuple[Decimal, Decimal]:
    accepted = [t for t in spec.task_types if t.accepted]
    rates = [Decimal(f.success_rate) for f in spec.families]
    if spec.filters.unknown_family is not None:
        rates.append(Decimal(spec.filters.unknown_family))
    longest = spec.filters.max_time_limit_seconds
    values = {
        TermName.TASK_WEIGHT: [Decimal(t.weight) for t in accepted],
        TermName.MODEL_PERFORMANCE: rates,
        TermName.TASK_SUCCESS_RATE: [Decimal(t.success_rate) for t in accepted],
        TermName.TIME_EFFICIENCY: [Decimal(0), Decimal(1)] if longest is not None else [Decimal(1)],
        TermName.SIZE_EFFICIENCY: [Decimal(s.size_efficiency) for s in spec.size_classes],
        TermName.BONUS: [Decimal(1)],
        TermName.ACCURACY_BONUS: [Decimal(1)],
    }
    low = high = Decimal(0)
    for term in spec.scoring.terms:
        options = _options(term) or values[term.name]
        low += Decimal(term.weight) * min(options, default=Decimal(0))
        high += Decimal(term.weight) * max(options, default=Decimal(0))
    return low, high


def _options(term: TermWeight) -> list[Decimal]:
    if term.value is not None:
        return [Decimal(term.value)]
    values = [Decimal(step.value) for step in term.table]
    open_ended = any(step.below is None for step in term.table)
    return values if open_ended or not values else [*values, Decimal(0)]


def _scores(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    least, bounds = spec.filters.min_score, score_range(spec)
    if bounds is None:
        return
    low, high = bounds
    uncapped = _uncapped_range(spec)
    if least is not None and low > Decimal(least):
        before = f" ({uncapped[0]} to {uncapped[1]} before the cap)" if uncapped[1] > high else ""
        message = f"{least} rejects nothing: scores of accepted offers run from {low} to {high}{before}"
        yield finding("filters.minScore", message)
    if least is not None and high <= Decimal(least):
        yield finding("filters.minScore", f"{least} rejects everything: scores end at {high}", "Error")
    if low == high and len(spec.task_types) > 1:
        yield finding("scoring", f"every accepted offer scores {low}: the score orders nothing")
    weights = sum((Decimal(term.weight) for term in spec.scoring.terms), Decimal(0))
    if weights != 1:
        yield finding("scoring.terms", f"the weights sum to {weights}, not to 1", "Info")


def _limits(spec: CapacityPolicySpec, nodes: tuple[NodeView, ...]) -> Iterator[LintFinding]:
    most, slots = _most_jobs(spec, nodes), spec.filters.max_concurrent_jobs
    offered = sum(n.allocatable for n in nodes if n.ready)
    if slots is not None and most is not None and slots > most:
        what = "shared GPUs" if spec.resources[0].units_per_gpu is not None else "whole GPUs"
        yield finding(
            "filters.maxConcurrentJobs", f"{slots} never binds: with {what} at most {most} jobs run at a time"
        )
    longest = spec.filters.max_time_limit_seconds
    if longest is not None and longest > LONGEST_TIME_LIMIT:
        yield finding(
            "filters.maxTimeLimitSeconds", f"{longest} never binds: no offer can ask for more than {LONGEST_TIME_LIMIT}"
        )
    for limit in spec.namespaces:
        if limit.gpus is not None and offered and limit.gpus >= offered:
            yield finding(f"namespaces[{limit.name}].gpus", f"{limit.gpus} never binds: the nodes offer {offered}")
    for task in spec.task_types:
        if task.daily_floor is not None and spec.filters.min_score is None:
            yield finding(
                f"taskTypes[{task.name.value}].dailyFloor", "relaxes nothing: there is no filters.minScore to relax"
            )
    counts = spec.resources[0].counts
    largest = max((n.allocatable for n in nodes if n.ready), default=0)
    if largest and max(counts) > largest:
        yield finding(
            "resources[0].counts", f"{max(counts)} GPUs are on no Ready node; the largest has {largest}", "Warning"
        )


def _lanes(spec: CapacityPolicySpec, nodes: tuple[NodeView, ...]) -> Iterator[LintFinding]:
    offered = sum(n.allocatable for n in nodes if n.ready)
    wanted = sum(lane.gpus for lane in spec.lanes)
    if spec.lanes and nodes and wanted > offered:
        yield finding("lanes", f"the lanes hand out {wanted} GPUs and the selected nodes offer {offered}")
    if spec.lanes and offered > wanted:
        yield finding("lanes", f"the lanes hand out {wanted} of the {offered} GPUs that the selected nodes offer")
    taken: dict[tuple[str, str, str], str] = {}
    for lane in spec.lanes:
        both: dict[str, int] = {}
        own = 0
        for item in lane.rules:
            for kind in _kinds(item, spec):
                other = taken.setdefault(kind, lane.name)
                if other == lane.name:
                    own += 1
                else:
                    both[other] = both.get(other, 0) + 1
        for other, count in both.items():
            reach = "so that nothing reaches it" if not own else "the first lane counts"
            yield finding(
                f"lanes[{lane.name}]",
                f"overlaps with {other}: {count} kind(s) of task fit both, {reach}",
                "Warning" if own else "Error",
            )


def _kinds(item: LaneRule, spec: CapacityPolicySpec) -> Iterator[tuple[str, str, str]]:
    """Yield the kinds of task that a rule takes: task type, size class, architecture of an image model."""
    accepted = [task.name for task in spec.task_types if task.accepted]
    for task in item.task_types or accepted:
        if task not in accepted:
            continue
        shapes = [a.value for a in item.architectures or tuple(Architecture)] if task is TaskType.IMAGE else [""]
        if task is not TaskType.IMAGE and item.architectures:
            continue
        for size in item.size_classes or tuple(size.name for size in spec.size_classes):
            for shape in shapes:
                yield task.value, size, shape


def _queue(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    queue = spec.queue
    if queue is None:
        return
    if queue.raise_after_seconds is not None and len(queue.priorities) < 2:
        yield finding("queue.raiseAfterSeconds", "raises nothing: there are no two priorities")
    if queue.reserve_from_gpus is not None and queue.reserve_from_gpus > max(spec.resources[0].counts):
        yield finding(
            "queue.reserveFromGpus",
            f"{queue.reserve_from_gpus} keeps no node: tasks get at most {max(spec.resources[0].counts)} GPUs",
        )
    if queue.reserve_from_gpus is not None and (spec.lanes or any(n.gpus is not None for n in spec.namespaces)):
        yield finding(
            "queue.reserveFromGpus",
            "keeps nodes only: in a lane or under a namespace's quota smaller offers may still take what a large one "
            "waits for",
        )
    if spec.filters.on_full is FullMode.REJECT:
        yield finding("queue", "orders nothing that waits: filters.onFull is Reject", "Info")


def _preemption(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    rules, names = spec.preemption, spec.queue.priorities if spec.queue is not None else ()
    if rules is None:
        return
    if spec.estimation is None or spec.estimation.duration is None:
        message = (
            "stops no job before its trainer reports: without estimation.duration a job counts as taking all of its "
            "time, and would be late; set it"
        )
        yield finding("preemption", message)
    if rules.gain_factor is None and Decimal(rules.gpu_hour_price) != 0:
        yield finding("preemption.gpuHourPrice", "counts with gainFactor only: set that, or remove it", "Info")
    for number, rule in enumerate(rules.rules):
        lowest, highest = min(rule.by, key=names.index), max(rule.of, key=names.index)
        if names.index(lowest) < names.index(highest):
            message = f"{lowest} stops {highest}, which comes before it in the queue and takes its GPUs back"
            yield finding(f"preemption.rules[{number}]", message)


def _memory(spec: CapacityPolicySpec) -> Iterator[LintFinding]:
    if spec.estimation is not None and Decimal(spec.estimation.memory_fraction) >= _PRESSURE:
        yield finding(
            "estimation.memoryFraction",
            f"{spec.estimation.memory_fraction} lets a job start at the mark of memory pressure, {_PRESSURE}, at which "
            "a running job has to give way: plan with less, as 0.85",
        )


def _shared(shared: Mapping[str, Sequence[str]]) -> Iterator[LintFinding]:
    for node, others in sorted(shared.items())[:4]:
        yield finding(
            "nodeSelector",
            f"node {node} is handed out by {', '.join(sorted(others))} as well: no GPU is booked twice, but limits and "
            "lanes of each count its own offers only",
            "Error",
        )


def _most_jobs(spec: CapacityPolicySpec, nodes: tuple[NodeView, ...]) -> int | None:
    """Return how many jobs fit at a time, or None where neither lanes nor nodes say so."""
    if spec.lanes:
        return sum(lane.gpus // min(r.gpus_per_task for r in lane.rules) for lane in spec.lanes)
    offered = sum(n.allocatable for n in nodes if n.ready)
    return offered // min(spec.resources[0].counts) if offered else None
