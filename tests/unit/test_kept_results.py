"""What is computed once and kept: the same answers as from scratch, whatever was asked before."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskoffer.decision
from builders import make_node, make_offer, make_policy, merged, stored
from core_builders import NOW, at, node, offer, policy_spec, spec_of
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.decision.cycle import plan
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.identity import Itself
from taskoffer.decision.ledger import Ledger, Release
from taskoffer.decision.outcomes import NOTHING, Estimate, Kind, Learned
from taskoffer.decision.snapshot import Shape
from taskoffer.decision.timeline import Demand, Opening, Timeline
from taskoffer.reconcile import standing
from taskoffer.reconcile.world import World

ESTIMATION = {"gpuMemory": "80G", "duration": {"startSeconds": 40}}
WHOLE = {"preset": "strategy-8xh100", "lanes": []}
POLICIES: list[dict[str, Any]] = [
    {"preset": "lab"},
    {"preset": "strategy-8xh100"},
    {"preset": "expected-value"},
    {"preset": "market-table"},
    {**WHOLE, "gpu_choice": "FewestGpuHours"},
    {**WHOLE, "gpu_choice": "EarliestEnd"},
    {**WHOLE, "estimation": ESTIMATION},
    {**WHOLE, "estimation": {**ESTIMATION, "gpuMemory": "40G"}},
    {**WHOLE, "estimation": {**ESTIMATION, "unknownShapeMargin": "0.5"}},
    {**WHOLE, "estimation": {**ESTIMATION, "duration": {"tokensPerRow": 900, "mfu": [{"mfu": "0.5"}]}}},
    {**WHOLE, "estimation": {**ESTIMATION, "duration": {"evaluationShare": "0.5", "generatedTokensPerRow": 99}}},
    {"preset": "lab", "estimation": ESTIMATION, "filters": {"maxTimeLimitSeconds": 7200, "unknownFamily": "0.5"}},
    {"preset": "lab", "resources": [{"name": "nvidia.com/gpu", "counts": [1], "unitsPerGpu": 4}]},
    {"preset": "lab", "queue": {"priorities": ["low", "high"], "reserveFromGpus": 2}},
]
POLICIES[-2] |= {"size_classes": [{**size, "gpus": 1} for size in make_policy(preset="lab")["spec"]["sizeClasses"]]}
POLICIES[-2] |= {"estimation": ESTIMATION}
OFFERS = st.fixed_dictionaries(
    {
        "task_type": st.sampled_from(["InstructText", "InstructText", "Chat", "DPO", "GRPO", "Image"]),
        "model": st.sampled_from(
            ["x/Llama-3.1-8B", "y/Llama-3.1-8B-ft", "x/Qwen2.5-7B", "x/phi-4", "x/Llama-3-70B", "x/llama", "x/bloom-7b"]
        ),
        "parameters": st.sampled_from([None, 500_000, 2_000_000, 7_000_000_000, 8_030_000_000, 70_000_000_000]),
        "rows": st.sampled_from([None, 100, 20_000, 900_000]),
        "tokens": st.sampled_from([None, 30_000_000, 90_000_000]),
        "seconds": st.sampled_from([600, 7200, 60_000, 90_000]),
        "gpus": st.sampled_from([None, None, 1, 2, 8]),
        "priority_class": st.sampled_from([None, "low", "high", "other"]),
        "spec": st.sampled_from([{}, {"clockMode": "Training"}, {"value": "3.5"}]),
    }
).map(lambda fields: {**fields, "tokens": None} if fields["task_type"] == "Image" else fields)
LEARNED = [
    NOTHING,
    *(
        Learned(
            Decimal(10),
            {
                Kind(TaskType.INSTRUCT_TEXT, family, size, gpus): Estimate(
                    judged, 2, 3, Decimal(factor), 4, Decimal("1.2")
                )
                for family in ("Llama", "Qwen")
                for size in ("Small", "Medium", "XLarge")
                for gpus in (1, 2)
            },
        )
        for judged, factor in ((3, "1.5"), (9, "0.8"))
    ),
]
CACHES = [
    found
    for module in pkgutil.iter_modules(taskoffer.decision.__path__)
    for found in vars(importlib.import_module(f"taskoffer.decision.{module.name}")).values()
    if hasattr(found, "cache_clear")
]


def from_scratch(spec: Any, policy: CapacityPolicySpec, learned: Learned) -> Evaluation:
    for cache in CACHES:
        cache.cache_clear()
    return evaluate(spec, policy, "default", learned)


CASES = st.tuples(st.sampled_from(POLICIES), OFFERS, st.sampled_from(LEARNED), st.booleans())


@given(st.lists(CASES, min_size=2, max_size=8))
@settings(max_examples=120, deadline=None)
def test_an_evaluation_is_the_same_whatever_was_evaluated_before(asked: list[tuple[Any, Any, Learned, bool]]) -> None:
    made: dict[int, CapacityPolicySpec] = {}
    cases = []
    for number, fields, learned, anew in asked:
        # Now a policy that was asked before, now one that has just been read and says the same.
        known = made.get(id(number))
        policy = policy_spec(**number) if anew or known is None else known
        made[id(number)] = policy
        cases.append((spec_of(**fields), policy, learned))
    warm = [evaluate(spec, policy, "default", learned) for spec, policy, learned in cases]
    assert warm == [from_scratch(*case) for case in cases]


def test_a_value_as_a_key_equals_itself_only() -> None:
    one, same = policy_spec(), policy_spec()
    assert one == same
    assert Itself(one) == Itself(one)
    assert hash(Itself(one)) == hash(Itself(one))
    assert Itself(one) != Itself(same)


# The predicted timeline

NODES = [node("a", 8), node("b", 4), node("c", 8, ready=False), node("d", 2)]
RELEASES = st.builds(
    Release,
    holder=st.sampled_from(["x", "y", "z"]),
    node=st.sampled_from(["a", "b", "c", "d", "elsewhere"]),
    count=st.integers(1, 4),
    ends=st.integers(-100, 100).map(at),
    policy=st.sampled_from(["lab", "other", None]),
    lane=st.sampled_from([None, "lane"]),
    namespace=st.sampled_from([None, "default"]),
    name=st.sampled_from(["one", "two"]),
)
DEMANDS = st.builds(
    Demand,
    gpus=st.sampled_from([1, 2, 4, 8]),
    policy=st.just("lab"),
    lane=st.sampled_from([None, "lane"]),
    lane_gpus=st.integers(0, 8),
    namespace=st.sampled_from([None, "default"]),
    namespace_gpus=st.integers(0, 8),
    slots=st.sampled_from([None, 1, 3]),
)


def first_opening(ledger: Ledger, releases: list[Release], demand: Demand) -> Opening | None:
    """Look at every node after every release."""

    def end_of(release: Release) -> datetime:
        return release.ends if release.ends > NOW else NOW + max(timedelta(minutes=1), NOW - release.ends)

    in_order = sorted(releases, key=lambda r: (end_of(r), r.holder, r.node))
    for ended in range(len(in_order) + 1):
        over = in_order[:ended]
        own = [r for r in over if r.policy == demand.policy]
        in_lane = sum(r.count for r in own if r.lane == demand.lane) - ledger.lane_used("lab", "lane")
        in_namespace = sum(r.count for r in own if r.namespace == demand.namespace) - ledger.held_by("lab", "default")
        if demand.lane is not None and demand.lane_gpus + in_lane < demand.gpus:
            continue
        if demand.namespace is not None and demand.namespace_gpus + in_namespace < demand.gpus:
            continue
        if demand.slots is not None and demand.slots - ledger.running("lab") + len(own) <= 0:
            continue
        free = {n.name: ledger.free(n) + sum(r.count for r in over if r.node == n.name) for n in NODES if n.ready}
        large = [n.name for n in NODES if n.ready and n.allocatable >= demand.gpus and free[n.name] >= demand.gpus]
        if large:
            best = min(large, key=lambda name: (free[name], name))
            last = over[-1] if over else None
            left = free[best] - demand.gpus
            return Opening(end_of(last) if last else NOW, best, left, last.name if last else "")
    return None


@given(st.lists(RELEASES, max_size=6), st.lists(st.one_of(RELEASES, DEMANDS), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_an_opening_is_the_first_moment_at_which_enough_is_free_together(
    known: list[Release], steps: list[Release | Demand]
) -> None:
    booked = {"a": 8, "b": 3, "d": 2}
    ledger = Ledger(booked, {("lab", "lane"): 4}, {"lab": {"x", "y"}}, {("lab", "default"): 3})
    timeline, releases = Timeline(NOW, ledger, known), list(known)
    for step in steps:
        if isinstance(step, Release):
            timeline.start(step)
            releases.append(step)
        else:
            assert timeline.opening(step, NODES) == first_opening(ledger, releases, step)


# The offers that wait

SHAPE = Shape("lab", 1, None, "WaitingForCapacity")
MOVES = st.lists(st.tuples(st.sampled_from(["add", "add", "drop", "look"]), st.integers(0, 15)), max_size=60)


@pytest.mark.parametrize("few", [0, 1, 4, 1_000_000], ids=["one by one", "few", "some", "together"])
def test_a_group_is_in_order_whatever_came_and_went(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(standing, "_FEW", few)
    evaluation = evaluate(spec_of(), policy_spec(), "default")

    @given(MOVES)
    @settings(max_examples=100, deadline=None)
    def run(moves: list[tuple[str, int]]) -> None:
        group, there = standing.Standing(), dict[str, tuple[datetime, str]]()
        for turn, (what, number) in enumerate(moves):
            uid = f"uid-{number:02}"
            if what == "add" and uid not in there:
                created = at(-(number * 7 + turn) % 5)
                group.add(SHAPE, offer(f"o-{number}", uid=uid, created=created), evaluation, NOW)
                there[uid] = created, uid
            elif what == "drop":
                assert group.drop(uid) == (uid in there)
                there.pop(uid, None)
            elif what == "look":
                check(group, there)
        check(group, there)

    def check(group: standing.Standing, there: dict[str, tuple[datetime, str]]) -> None:
        found = [(place.offer.created, place.offer.uid) for place in group.groups.get(SHAPE, ())]
        assert found == sorted(there.values())
        assert list(group.groups) == ([SHAPE] if there else [])
        assert len(group) == len(there)

    run()


# A long queue

HOPELESS: dict[str, tuple[dict[str, Any], str]] = {
    "count": ({"gpus": 8}, "GpuCountNotAllowed"),
    "memory": ({"model": "meta-llama/Llama-3.1-70B", "rows": 100}, "InsufficientMemory"),
    "time": ({"seconds": 30}, "CannotFinishInTime"),
    "family": ({"model": "bigscience/bloom-7b"}, "ModelFamilyNotAccepted"),
}


def queue_of(count: int, *, answered: bool) -> Iterator[dict[str, Any]]:
    """Yield offers that wait for the one node there is, all of a higher priority than others."""
    wait = {"type": "Admitted", "status": "False", "reason": "WaitingForCapacity", "message": "full"}
    status = {"observedGeneration": 1, "conditions": [{**wait, "lastTransitionTime": "2026-01-31T12:00:00Z"}]}
    made = stored(make_offer(gpus=2, priority_class="high", model="meta-llama/Llama-3.1-8B"))
    for number in range(count):
        named = {**made["metadata"], "name": f"o-{number}", "uid": f"uid-{number}"}
        spec = {**made["spec"], "taskID": f"o-{number}"}
        yield {**made, "metadata": named, "spec": spec, **({"status": status} if answered else {})}


@pytest.mark.parametrize("answered", [False, True], ids=["all are new", "the others wait already"])
def test_behind_ten_thousand_others_an_offer_that_can_never_fit_is_told_so_in_the_first_cycle(answered: bool) -> None:
    world = World()
    lab = make_policy(
        filters={"maxConcurrentJobs": None},
        size_classes=[merged(make_policy()["spec"]["sizeClasses"][0], {"maxParameters": None})],
        queue={"priorities": ["low", "high"]},
        estimation=ESTIMATION,
    )
    world.nodes.replace([stored(make_node(gpus=1), uid="node")], "1")
    world.policies.replace([stored(lab, uid="policy")], "1")
    world.offers.replace(queue_of(10_000, answered=answered), "1")
    if answered:
        assert plan(world.snapshot(NOW)).waiting == 10_000
    for name, (fields, _) in HOPELESS.items():
        made = make_offer(**{"name": name, "priority_class": "low", "model": "meta-llama/Llama-3.1-8B", **fields})
        world.offers.observe("ADDED", stored(made, uid=name, resource_version="2"))
    told = {d.offer.key.name: d.answer for d in plan(world.snapshot(NOW)).decisions}
    found = {name: (told[name].verdict.value, told[name].reason.value) for name in HOPELESS}
    assert found == {name: ("Reject", reason) for name, (_, reason) in HOPELESS.items()}
    assert len(told) == len(HOPELESS) + (0 if answered else 10_000)
