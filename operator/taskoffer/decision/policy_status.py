"""A policy's status: whether it is valid, what it found in itself, and how its capacity stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacity import Capacity, NodeCapacity
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicyStatus
from taskoffer.decision.conditions import set_condition
from taskoffer.decision.ledger import Ledger, NodeView
from taskoffer.decision.lint import lint
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
    shared: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of other policies by the nodes of this one that they hand out too."""


def policy_status(facts: PolicyFacts) -> CapacityPolicyStatus:
    """Return the status that the policy should have now."""
    spec = facts.policy.spec
    findings = lint(spec, facts.nodes, facts.shared) if spec is not None else ()
    capacity = _capacity(facts)
    conditions = facts.before.conditions

    def put(kind: str, status: bool, reason: Reason, message: str) -> None:
        nonlocal conditions
        conditions = set_condition(
            conditions, kind, status, reason, message, now=facts.now, generation=facts.generation
        )

    if facts.valid:
        put("Ready", True, Reason.READY, f"generation {facts.generation} is in force")
    elif facts.policy.cause is Reason.DEVICES_NOT_AVAILABLE:
        # The spec is as it should be, and comes into force by itself once the cluster has what it asks for.
        put("Ready", False, Reason.DEVICES_NOT_AVAILABLE, facts.policy.problem)
    else:
        put("Ready", False, Reason.INVALID_POLICY, f"{facts.policy.problem}; {_kept(facts)}")
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
    active, generation = spec, facts.policy.generation if spec is not None else None
    if spec is None:
        # Nothing is in force now. What was so last may be again, once the spec or the cluster has been mended.
        active, generation = facts.before.active_spec, facts.before.active_generation
    return CapacityPolicyStatus(
        observed_generation=facts.generation,
        conditions=conditions,
        active_spec=active,
        active_generation=generation,
        lint=findings,
        capacity=capacity,
    )


def _kept(facts: PolicyFacts) -> str:
    """Say which version is in force where the stored spec is not."""
    if facts.policy.spec is not None:
        return f"generation {facts.policy.generation} stays in force"
    if facts.before.active_spec is not None:
        return f"generation {facts.before.active_generation}, in force last, cannot be so either: mend spec"
    return "no valid version is known: mend spec"


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
