"""A policy's status: whether it is valid, what it found in itself, and how its capacity stands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import (
    Capacity,
    CapacityPolicySpec,
    CapacityPolicyStatus,
    LintFinding,
    NodeCapacity,
    TermName,
)
from taskoffer.decision.conditions import set_condition
from taskoffer.decision.ledger import Ledger, NodeView
from taskoffer.decision.snapshot import PolicyView


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """All that a policy's status is computed from."""

    now: datetime
    policy: PolicyView
    generation: int
    valid: bool
    """Whether the stored spec itself is valid; if not, ``policy.spec`` is the last good one, or None."""
    nodes: tuple[NodeView, ...]
    ledger: Ledger
    pending: int
    before: CapacityPolicyStatus


def policy_status(facts: PolicyFacts) -> CapacityPolicyStatus:
    """Return the status that the policy should have now."""
    spec = facts.policy.spec
    findings = lint(spec, facts.nodes) if spec is not None else ()
    capacity = _capacity(facts)
    conditions = facts.before.conditions

    def put(kind: str, status: bool, reason: Reason, message: str) -> None:
        nonlocal conditions
        conditions = set_condition(
            conditions, kind, status, reason, message, now=facts.now, generation=facts.generation
        )

    if facts.valid:
        put("Ready", True, Reason.READY, f"generation {facts.generation} is in force")
    else:
        kept = (
            f"generation {facts.policy.generation} stays in force" if spec else "no valid version is known: mend spec"
        )
        put("Ready", False, Reason.INVALID_POLICY, f"{facts.policy.problem}; {kept}")
    below = [n for n in capacity.nodes if n.ready and n.booked > n.allocatable]
    if below:
        named = ", ".join(f"{n.name} offers {n.allocatable} and {n.booked} are booked" for n in below)
        message = f"{named}; nothing more is admitted there until enough has ended"
        put("CapacityConsistent", False, Reason.ALLOCATABLE_BELOW_BOOKED, message)
    else:
        put("CapacityConsistent", True, Reason.READY, "no node offers less than is booked on it")
    if findings:
        put(
            "Linted",
            False,
            Reason.LINT_FINDINGS,
            f"{len(findings)} finding(s), the first: {findings[0].message}",
        )
    else:
        put("Linted", True, Reason.NO_FINDINGS, "no findings")
    return CapacityPolicyStatus(
        observed_generation=facts.generation,
        conditions=conditions,
        active_spec=spec,
        active_generation=facts.policy.generation if spec is not None else None,
        findings=findings,
        capacity=capacity,
    )


def _capacity(facts: PolicyFacts) -> Capacity:
    nodes = tuple(
        NodeCapacity(
            name=node.name,
            allocatable=node.allocatable,
            booked=facts.ledger.booked.get(node.name, 0),
            ready=node.ready,
        )
        for node in sorted(facts.nodes, key=lambda n: n.name)
        if node.allocatable > 0 or facts.ledger.booked.get(node.name, 0) > 0
    )
    usable = [n for n in nodes if n.ready]
    return Capacity(
        total=sum(n.allocatable for n in usable),
        used=sum(n.booked for n in usable),
        pending=facts.pending,
        running=facts.ledger.running(facts.policy.name),
        nodes=nodes[:256],
    )


def lint(spec: CapacityPolicySpec, nodes: tuple[NodeView, ...] = ()) -> tuple[LintFinding, ...]:
    """Return what is odd about a policy although it is valid: rules that never bind, or ask for what is not there."""
    found: list[LintFinding] = []
    low, high = score_range(spec)
    least = spec.filters.min_score
    if least is not None and low > Decimal(least):
        found.append(_finding("filters.minScore", f"{least} rejects nothing: scores of accepted offers start at {low}"))
    if least is not None and high <= Decimal(least):
        found.append(_finding("filters.minScore", f"{least} rejects everything: scores end at {high}", "Error"))
    most, slots = _most_jobs(spec, nodes), spec.filters.max_concurrent_jobs
    if slots is not None and most is not None and slots > most:
        message = f"{slots} never binds: with whole GPUs at most {most} jobs run at a time"
        found.append(_finding("filters.maxConcurrentJobs", message))
    offered = sum(n.allocatable for n in nodes if n.ready)
    wanted = sum(lane.gpus for lane in spec.lanes)
    if spec.lanes and nodes and wanted > offered:
        found.append(_finding("lanes", f"the lanes hand out {wanted} GPUs and the selected nodes offer {offered}"))
    return tuple(found[:32])


def score_range(spec: CapacityPolicySpec) -> tuple[Decimal, Decimal]:
    """Return the lowest and the highest score that an accepted offer can get, before the time limit is known.

    Time efficiency runs from 0 (at the longest limit) to 1; the other terms take the values that the policy lists.
    """
    accepted = [t for t in spec.task_types if t.accepted]
    rates = [Decimal(f.success_rate) for f in spec.families]
    if spec.filters.unknown_family is not None:
        rates.append(Decimal(spec.filters.unknown_family))
    values = {
        TermName.TASK_WEIGHT: [Decimal(t.weight) for t in accepted],
        TermName.MODEL_PERFORMANCE: rates,
        TermName.TASK_SUCCESS_RATE: [Decimal(t.success_rate) for t in accepted],
        TermName.TIME_EFFICIENCY: [Decimal(0), Decimal(1)],
        TermName.SIZE_EFFICIENCY: [Decimal(s.size_efficiency) for s in spec.size_classes],
        TermName.BONUS: [Decimal(1)],
    }
    low = high = Decimal(0)
    for term in spec.scoring.terms:
        options = [Decimal(term.value)] if term.value is not None else values[term.name]
        low += Decimal(term.weight) * min(options, default=Decimal(0))
        high += Decimal(term.weight) * max(options, default=Decimal(0))
    cap = Decimal(spec.scoring.cap) if spec.scoring.cap is not None else high
    return min(low, cap), min(high, cap)


def _most_jobs(spec: CapacityPolicySpec, nodes: tuple[NodeView, ...]) -> int | None:
    if spec.lanes:
        return sum(lane.gpus // min(r.gpus_per_task for r in lane.rules) for lane in spec.lanes)
    offered = sum(n.allocatable for n in nodes if n.ready)
    return offered // min(spec.resources[0].counts) if offered else None


def _finding(field: str, message: str, severity: str = "Warning") -> LintFinding:
    return LintFinding.model_validate({"field": field, "severity": severity, "message": f"{field}: {message}"})
