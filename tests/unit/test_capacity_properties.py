"""What must hold in every world, tried on many random ones."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from core_builders import at, claim, condition, cycle, node, offer, policy, policy_spec, snapshot, spec_of
from taskoffer.api.base import rfc3339
from taskoffer.api.tasks import TaskType
from taskoffer.decision.cycle import Plan, plan
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.ledger import Claim, NodeView, open_ledger
from taskoffer.decision.snapshot import OfferView, PolicyView
from taskoffer.decision.verdict import Verdict

MODELS = ["x/llama", "x/mistral", "x/qwen", "x/gemma", "x/phi-4", "x/codellama", "x/deepseek", "x/falcon"]
LANES = [
    {"name": "one", "gpus": 3, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}]},
    {"name": "rest", "gpus": 8, "rules": [{"gpusPerTask": 2}]},
]
PLAIN, LANED, FEW = policy(), policy(lanes=LANES), policy(filters={"maxConcurrentJobs": 3})
BORROWING = policy(lanes=[{**LANES[0], "borrowFrom": ["rest"]}, {**LANES[1], "gpus": 4}])
QUOTA = policy(namespaces=[{"name": "default", "gpus": 3}])
TYPE = {"name": "InstructText", "accepted": True, "weight": "0.35", "successRate": "0.9"}
FLOORED = policy(filters={"minScore": "0.7", "floorMinScore": "0.5"}, task_types=[{**TYPE, "dailyFloor": 2}])
PREDICTING = {"gpuMemory": "80G", "duration": {"startSeconds": 40, "reserveSeconds": 20}}
KEEPING = policy(queue={"priorities": ["low", "high"], "reserveFromGpus": 4}, estimation=PREDICTING)
FASTEST = policy(gpu_choice="EarliestEnd", estimation=PREDICTING)
EARNING = policy(
    gpu_choice="MostValue",
    estimation=PREDICTING,
    filters={"minScore": "0", "unknownFamily": "0.5"},
    scoring={"terms": None, "expectedValue": {"urgencySeconds": 600, "spareShare": "0.75"}},
)
ALL = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
BY_VALUE = {"terms": None, "expectedValue": {"urgencySeconds": 600, "spareShare": "0.75"}}


def hurrying(choice: str, **fields: Any) -> PolicyView:
    """Return a policy under which the deadlines of its offers decide their counts."""
    shared = {"estimation": PREDICTING, "size_classes": [ALL], "filters": {"minScore": "0"}}
    return policy(gpu_choice=choice, **shared, **fields)


HURRYING = [
    hurrying("FewestGpuHours"),
    hurrying("MostValue", scoring={"terms": None, "expectedValue": {}}),
    hurrying("MostValue", scoring=BY_VALUE),
    hurrying("MostValue", scoring=BY_VALUE, namespaces=[{"name": "default", "gpus": 3}]),
]
DEADLINES = [None, *(rfc3339(at(seconds)) for seconds in (300, 1000, 3600, 6000, 20_000))]
fast = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def offers(draw: st.DrawFn, most: int = 12) -> list[OfferView]:
    return [
        offer(
            f"o{i}",
            created=at(draw(st.integers(0, 3))),
            hours=draw(st.sampled_from([0.5, 3.0, 19.0, 21.0])),
            parameters=draw(st.sampled_from([500_000, 2_000_000, 5_000_000])),
            priority_class=draw(st.sampled_from([None, "low", "high"])),
            model=draw(st.sampled_from(MODELS)),
            task_id=f"t{draw(st.integers(0, 9))}",
            active=draw(st.sampled_from([None, None, None, False])),
            expires_at=draw(st.sampled_from([None, None, "2026-01-31T11:00:00Z", "2026-01-31T13:00:00Z"])),
        )
        for i in range(draw(st.integers(0, most)))
    ]


@st.composite
def hurries(draw: st.DrawFn, most: int = 12) -> list[OfferView]:
    """Draw offers that take 30 minutes or 2.75 hours on one GPU, and a good quarter of that on four."""
    return [
        offer(
            f"o{i}",
            created=at(draw(st.integers(0, 3))),
            hours=draw(st.sampled_from([1.0, 19.0])),
            parameters=8_030_000_000,
            rows=draw(st.sampled_from([30_000, 170_000])),
            model=draw(st.sampled_from(MODELS)),
            gpus=draw(st.sampled_from([None, None, None, 1])),
            spec={"deadline": due} if (due := draw(st.sampled_from(DEADLINES))) else {},
        )
        for i in range(draw(st.integers(0, most)))
    ]


nodes = st.lists(
    st.builds(
        lambda i, gpus, ready: node(f"n{i}", gpus, ready=ready),
        st.integers(0, 4),
        st.sampled_from([0, 1, 2, 4, 8]),
        st.booleans(),
    ),
    max_size=4,
    unique_by=lambda n: n.name,
)
claims = st.lists(
    st.builds(
        lambda holder, at_node, count, source: claim(f"h{holder}", f"n{at_node}", count, source, lane="one"),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(["assumed", "admission", "job", "pod"]),
    ),
    max_size=6,
)
policies = st.sampled_from([PLAIN, LANED, FEW, BORROWING, QUOTA, FLOORED, KEEPING, FASTEST, EARNING])


def worlds(most: int = 12) -> st.SearchStrategy[tuple[list[OfferView], PolicyView]]:
    return st.one_of(st.tuples(offers(most), policies), st.tuples(hurries(most), st.sampled_from(HURRYING)))


def admissions(made: Plan) -> list[tuple[str, str, int, str | None]]:
    return [
        (d.offer.uid, a.node_name, a.count, a.lane)
        for d in made.decisions
        if d.answer.admission is not None
        for a in d.answer.admission.assignments
    ]


@fast
@given(worlds(), nodes, claims)
def test_a_cycle_never_books_more_than_a_node_a_lane_or_the_job_slots_have(
    world: tuple[list[OfferView], PolicyView], inventory: list[NodeView], booked: list[Claim]
) -> None:
    pending, chosen = world
    made = cycle(pending, nodes=inventory, claims=booked, policies=[chosen])
    assert chosen.spec is not None
    before = open_ledger(booked)
    added: Counter[str] = Counter()
    lanes: Counter[str] = Counter()
    for _, at_node, count, lane in admissions(made):
        added[at_node] += count
        lanes[lane or ""] += count
    for found in inventory:
        if added[found.name]:
            assert found.ready
            assert before.booked.get(found.name, 0) + added[found.name] <= found.allocatable
    assert not set(added) - {n.name for n in inventory}
    for lane in chosen.spec.lanes:
        assert not lanes[lane.name] or before.lane_used("lab", lane.name) + lanes[lane.name] <= lane.gpus
    if chosen.spec.filters.max_concurrent_jobs is not None:
        assert not added or before.running("lab") + len(admissions(made)) <= chosen.spec.filters.max_concurrent_jobs
    if chosen.spec.namespaces:
        assert added.total() <= 3
    if chosen is FLOORED:
        low = [d for d in made.decisions if d.answer.admission and d.answer.score and d.answer.score <= Decimal("0.7")]
        assert len(low) <= 2


@fast
@given(st.sampled_from(MODELS), st.sampled_from(["InstructText", "GRPO", "Image", "DPO", "Chat"]),
       st.floats(0.01, 40), st.integers(1, 10**12), st.sampled_from([None, "0.1", "0.6", "2"]))  # fmt: skip
def test_a_score_is_the_sum_of_its_terms_and_never_above_its_cap(
    model: str, task: str, hours: float, parameters: int, cap: str | None
) -> None:
    chosen = policy_spec(preset="strategy-8xh100", scoring={"cap": cap} if cap else {})
    score = evaluate(spec_of(model=model, task_type=task, hours=hours, parameters=parameters), chosen).score
    if score is None:
        return
    assert sum(Decimal(t.value) for t in score.terms) == score.total
    assert 0 <= score.total <= Decimal(cap or "1")


@fast
@given(worlds(most=1), nodes, claims, st.integers(1, 8))
def test_more_free_capacity_never_turns_an_admission_into_a_wait(
    world: tuple[list[OfferView], PolicyView], inventory: list[NodeView], booked: list[Claim], more: int
) -> None:
    pending, chosen = world

    def admitted(inventory: list[NodeView]) -> bool:
        return bool(admissions(cycle(pending, nodes=inventory, claims=booked, policies=[chosen])))

    if admitted(inventory):
        assert admitted([*inventory, node("extra", more)])
        assert admitted([replace(n, allocatable=n.allocatable + more) for n in inventory])


@fast
@given(worlds(), nodes, claims, st.randoms(use_true_random=False))
def test_the_order_of_what_is_known_does_not_matter(
    world: tuple[list[OfferView], PolicyView], inventory: list[NodeView], booked: list[Claim], shuffle: random.Random
) -> None:
    pending, chosen = world

    def decided(pending: list[OfferView], inventory: list[NodeView], booked: list[Claim]) -> object:
        made = cycle(pending, nodes=inventory, claims=booked, policies=[chosen])
        return {d.offer.uid: d.answer for d in made.decisions}, made.wake_at, made.waiting

    mixed = [shuffle.sample(part, len(part)) for part in (pending, inventory, booked)]
    assert decided(pending, inventory, booked) == decided(*mixed)  # type: ignore[arg-type]


@fast
@given(worlds(), nodes, claims)
def test_a_plan_that_is_applied_leaves_nothing_to_decide(
    world: tuple[list[OfferView], PolicyView], inventory: list[NodeView], booked: list[Claim]
) -> None:
    pending, chosen = world
    made = cycle(pending, nodes=inventory, claims=booked, policies=[chosen])
    answered = {d.offer.uid: d.answer for d in made.decisions}
    assert set(answered) == {o.uid for o in pending}
    left = [
        replace(o, conditions=(condition("Admitted", False, answered[o.uid].reason.value),), observed_generation=1)
        for o in pending
        if answered[o.uid].verdict is Verdict.WAIT
    ]
    now_booked = [
        *booked,
        *(claim(uid, n, count, lane=lane, namespace="default") for uid, n, count, lane in admissions(made)),
    ]
    gone = [o for o in pending if o not in left and answered[o.uid].verdict is not Verdict.WAIT]
    again = plan(
        snapshot(
            left,
            nodes=inventory,
            claims=now_booked,
            policies=[chosen],
            admitted_today=Counter(("lab", TaskType.INSTRUCT_TEXT) for _ in admissions(made)),
            siblings=[o for o in gone if o.uid not in {x.uid for x in left}],
        )
    )
    assert again.decisions == ()
    assert again.waiting == len(left)


class Cluster(RuleBasedStateMachine):
    """Offers come and go, pods outlive them, nodes change: what is booked must fit whenever something is admitted."""

    running: Bundle[str] = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.nodes = {"n0": node("n0", 8), "n1": node("n1", 4)}
        self.booked: dict[str, Claim] = {}
        self.pods: dict[str, Claim] = {}
        self.waiting: list[OfferView] = []
        self.number = 0

    @property
    def claims(self) -> list[Claim]:
        return [*self.booked.values(), *self.pods.values()]

    @rule(target=running, parameters=st.lists(st.sampled_from([500_000, 2_000_000, 5_000_000]), max_size=6))
    def offers_come(self, parameters: list[int]) -> object:
        for size in parameters:
            self.number += 1
            self.waiting.append(offer(f"o{self.number}", parameters=size, created=at(self.number)))
        before = {name: open_ledger(self.claims).free(n) for name, n in self.nodes.items()}
        made = cycle(self.waiting, nodes=list(self.nodes.values()), claims=self.claims)
        started = []
        for uid, at_node, count, lane in admissions(made):
            before[at_node] -= count
            assert before[at_node] >= 0, f"{at_node} is overbooked by {uid}"
            self.booked[uid] = claim(uid, at_node, count, lane=lane)
            self.pods[uid] = claim(uid, at_node, count, "pod")
            self.waiting = [o for o in self.waiting if o.uid != uid]
            started.append(uid)
        return multiple(*started)

    @rule(uid=running)
    def an_offer_is_deleted_while_its_pod_runs_on(self, uid: str) -> None:
        self.booked.pop(uid, None)

    @rule(uid=running)
    def a_pod_ends(self, uid: str) -> None:
        self.pods.pop(uid, None)
        self.booked.pop(uid, None)

    @rule(name=st.sampled_from(["n0", "n1"]), gpus=st.sampled_from([0, 2, 4, 8]), ready=st.booleans())
    def a_node_changes(self, name: str, gpus: int, ready: bool) -> None:
        self.nodes[name] = node(name, gpus, ready=ready)

    @invariant()
    def everything_that_runs_is_charged(self) -> None:
        charged = sum(open_ledger(self.claims).booked.values())
        assert charged == sum({**self.booked, **self.pods}[uid].count for uid in self.booked.keys() | self.pods.keys())


Cluster.TestCase.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)
TestCluster = Cluster.TestCase
