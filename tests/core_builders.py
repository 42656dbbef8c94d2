"""Builders of the values that the pure core works on, on top of the wire objects of ``builders``.

    cycle([offer("a", gpus=2), offer("b")], nodes=[node("n1", 8)], claims=[claim("x", "n1", 7)])

Every default is a world in which an offer is admitted, so that a test names only what it is about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from builders import DATASETS, make_offer, make_policy
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.meta import Condition, ConditionStatus
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.cycle import Decision, Plan, plan
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Claim, NodeView, Release, Source
from taskoffer.decision.placed_jobs import MoveRequest, Resumption, Running
from taskoffer.decision.snapshot import OfferView, PolicyView, Sibling, Snapshot

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)

ONE_GPU, TWO_GPUS, FOUR_GPUS = 500_000, 2_000_000, 5_000_000
"""Model sizes to which the lab preset gives 1, 2 and 4 GPUs."""


HIGH_TAKES: dict[str, Any] = {"rules": [{"by": ["high"], "of": ["low"]}]}
"""Preemption of the priority low by the priority high."""


def at(seconds: float) -> datetime:
    """Return the moment this many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def spec_of(**fields: Any) -> TaskOfferSpec:
    """Return an offer's spec, with the keywords of ``make_offer``."""
    return TaskOfferSpec.model_validate(make_offer(**fields)["spec"])


def data_until(moment: str, query: str = "signature=x") -> dict[str, Any]:
    """Return what of an offer's spec says that its data is behind an address which works until a moment."""
    address = {"url": f"https://data.example/rows.jsonl?{query}", "expiresAt": moment}
    return {"dataset": {**DATASETS["InstructText"], "source": {"url": address}}}


def policy_spec(**fields: Any) -> CapacityPolicySpec:
    """Return a policy's spec, with the keywords of ``make_policy``."""
    return CapacityPolicySpec.model_validate(make_policy(**fields)["spec"])


def policy(
    name: str = "lab", *, default: bool = True, generation: int = 1, created: datetime = NOW, **fields: Any
) -> PolicyView:
    """Return a policy in force."""
    return PolicyView(
        name=name,
        uid=f"{name}-uid",
        generation=generation,
        spec=policy_spec(name=name, **fields),
        is_default=default,
        created=created,
    )


def condition(kind: str, status: bool | None, reason: str, message: str = "", moment: datetime = NOW) -> Condition:
    """Return a condition."""
    value = {True: ConditionStatus.TRUE, False: ConditionStatus.FALSE, None: ConditionStatus.UNKNOWN}[status]
    return Condition(type=kind, status=value, reason=reason, message=message, last_transition_time=moment)


def offer(
    name: str = "offer",
    *,
    uid: str | None = None,
    created: datetime = NOW,
    generation: int = 1,
    observed: int | None = None,
    version: str = "1",
    waits: str | None = None,
    invalid: str | None = None,
    namespace: str = "default",
    **fields: Any,
) -> OfferView:
    """Return a pending offer. ``waits`` gives it an earlier answer with this reason."""
    return OfferView(
        key=OfferKey(namespace, name),
        uid=uid or f"{name}-uid",
        resource_version=version,
        generation=generation,
        created=created,
        spec=None if invalid else spec_of(**{"name": name, "parameters": ONE_GPU, **fields}),
        invalid=invalid,
        conditions=(condition("Admitted", False, waits),) if waits else (),
        observed_generation=observed if observed is not None or waits is None else generation,
    )


def node(name: str = "node-a", gpus: int = 8, *, ready: bool = True, labels: dict[str, str] | None = None) -> NodeView:
    """Return a node."""
    return NodeView(name, gpus, ready, labels or {})


def claim(
    holder: str,
    at_node: str = "node-a",
    count: int = 1,
    source: Source = "admission",
    *,
    policy: str | None = "lab",
    lane: str | None = None,
    namespace: str | None = None,
) -> Claim:
    """Return a claim."""
    return Claim(holder, at_node, count, source, policy, lane, namespace)


def running(
    name: str, gpus: int = 1, *, on: str = "node-a", started: float = -3600, ends: float = 3600, **fields: Any
) -> Running:
    """Return a running job of the lowest priority that has two hours until its deadline."""
    settled: dict[str, Any] = {"lane": None, "quota": None, "level": 0, "deadline": at(7200), **fields}
    return Running(
        OfferKey("default", f"{name}-job"),
        f"{name}-uid",
        f"default/{name}",
        "lab",
        on,
        gpus,
        started=at(started),
        ends=at(ends),
        **settled,
    )


def claims_of(jobs: Iterable[Running]) -> list[Claim]:
    """Return what running jobs hold."""
    return [Claim(j.holder, j.node, j.gpus, "job", j.policy, j.lane, j.quota) for j in jobs]


def releases_of(jobs: Iterable[Running]) -> list[Release]:
    """Return when running jobs are predicted to end."""
    return [Release(j.holder, j.node, j.gpus, j.ends, j.policy, j.lane, j.quota, j.name) for j in jobs]


def evaluations_of(
    offers: Iterable[OfferView], policies: dict[str, PolicyView], base: Snapshot
) -> dict[tuple[str, str], Evaluation]:
    """Evaluate every offer that has a policy."""
    found = {}
    for view in offers:
        if view.spec is None:
            continue
        chosen = base.policy_for(view.spec)[0]
        if chosen is not None and chosen.spec is not None:
            found[view.uid, chosen.name] = evaluate(view.spec, chosen.spec, view.key.namespace)
    return found


def snapshot(
    offers: Sequence[OfferView],
    *,
    policies: Sequence[PolicyView] | None = None,
    nodes: Sequence[NodeView] | None = None,
    claims: Sequence[Claim] = (),
    moves: Sequence[MoveRequest] = (),
    siblings: Sequence[OfferView] = (),
    releases: Sequence[Release] = (),
    admitted_today: dict[tuple[str, TaskType], int] | None = None,
    running: Sequence[Running] = (),
    resumptions: Sequence[Resumption] = (),
    now: datetime = NOW,
) -> Snapshot:
    """Return what a cycle decides on; ``siblings`` are decided offers that share task ids with the pending ones."""
    by_name = {p.name: p for p in ([policy()] if policies is None else policies)}
    same: dict[tuple[str, str], list[Sibling]] = defaultdict(list)
    for view in (*offers, *siblings):
        if view.spec is not None:
            reason = view.conditions[0].reason if view.conditions else "undecided"
            same[view.key.namespace, view.spec.task_id].append(Sibling(view.created, view.uid, view.key.name, reason))
    base = Snapshot(
        now=now,
        offers=tuple(offers),
        policies=by_name,
        nodes=[node()] if nodes is None else nodes,
        claims=claims,
        siblings=same,
        moves=moves,
        releases=releases,
        admitted_today=admitted_today or {},
        running=running,
        resumptions=resumptions,
    )
    return replace(base, evaluations=evaluations_of(offers, by_name, base))


def cycle(offers: Sequence[OfferView], **world: Any) -> Plan:
    """Run one cycle over a snapshot made from the keywords."""
    return plan(snapshot(offers, **world))


def decide(view: OfferView, **world: Any) -> Decision:
    """Run one cycle over one offer and return its decision."""
    decisions = cycle([view], **world).decisions
    assert len(decisions) == 1, decisions
    return decisions[0]


def answers(made: Plan) -> dict[str, tuple[str, str]]:
    """Return verdict and reason by offer name."""
    return {d.offer.key.name: (d.answer.verdict.value, d.answer.reason.value) for d in made.decisions}


def places(made: Plan) -> dict[str, str]:
    """Return the node of each admitted offer by its name."""
    return {
        d.offer.key.name: d.answer.admission.assignments[0].node_name
        for d in made.decisions
        if d.answer.admission is not None
    }
