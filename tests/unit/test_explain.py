"""Explanations: all causes, terms that sum, and changes of which each one turns out as it is told."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import merged
from core_builders import HIGH_TAKES, NOW, at, claim, data_until, node, offer, policy, running, snapshot
from taskoffer.api.base import rfc3339
from taskoffer.api.inquiry import Counterfactual, Explained
from taskoffer.api.reasons import REJECT_REASONS, WAIT_REASONS, Reason
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.changes import MUTABLE
from taskoffer.decision.cycle import plan
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.explain import explain
from taskoffer.decision.ledger import Claim, Release
from taskoffer.decision.rerun import Rerun
from taskoffer.decision.snapshot import OfferView, PolicyView, Snapshot

ALL = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
HOURLY = {"gpuMemory": "80G", "duration": {"startSeconds": 60, "reserveSeconds": 0}}
PREDICTING = policy(estimation=HOURLY, size_classes=[ALL], resources=[{"name": "nvidia.com/gpu", "counts": [1, 2, 4]}])
LANES = [{"name": "small", "gpus": 2, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}]}]
ONLY_INSTRUCTIONS = [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1"}]
TASK: dict[str, Any] = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "rows": 300_000}
"""Nearly five hours on one GPU."""
LARGE: dict[str, Any] = {**TASK, "gpus": 4}
PRIORITIES = {"priorities": ["low", "mid", "high"]}


def release(holder: str, count: int, seconds: float, at_node: str = "node-a") -> Release:
    return Release(holder, at_node, count, at(seconds), "lab", None, "default", f"default/{holder}")


def explained(view: OfferView, *others: OfferView, **world: Any) -> Explained:
    return explain(snapshot([view, *others], **world), view)


def rerun(shown: Snapshot, view: OfferView, told: Counterfactual) -> tuple[str, str]:
    """Make the change that a counterfactual tells, by its wire form alone, and return what a cycle answers."""
    assert isinstance(view.spec, TaskOfferSpec)
    spec = TaskOfferSpec.model_validate(merged(view.spec.to_wire(), told.spec))
    created = shown.now if told.replaces else view.created
    changed = replace(view, spec=spec, created=created, conditions=(), observed_generation=None)
    holders = {r.holder for r in shown.releases if r.name in told.after}
    others = [other for other in shown.offers if other.uid != view.uid]
    evaluations = dict(shown.evaluations)
    chosen = shown.policy_for(spec)[0]
    if chosen is not None and chosen.spec is not None:
        evaluations[view.uid, chosen.name] = evaluate(spec, chosen.spec, view.key.namespace)
    made = plan(
        replace(
            shown,
            offers=[*others, changed],
            evaluations=evaluations,
            claims=[c for c in shown.claims if c.holder not in holders],
            releases=[r for r in shown.releases if r.holder not in holders],
        )
    )
    answer = next(d.answer for d in made.decisions if d.offer.uid == view.uid)
    return answer.verdict.value, answer.reason.value


ONE_FULL: dict[str, Any] = {"claims": [claim("x", count=7)], "releases": [release("x", 7, 1800)]}
FULL: dict[str, Any] = {"claims": [claim("x", count=8)], "releases": [release("x", 8, 1800)]}

CASES: dict[str, tuple[Reason, OfferView, dict[str, Any], str]] = {
    "another task type": (
        Reason.TASK_TYPE_NOT_ACCEPTED,
        offer(task_type="DPO"),
        {
            "policies": [
                policy(task_types=[{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1"}])
            ]
        },
        "with taskType InstructText and data of dataset.type Instruct",
    ),
    "features": (
        Reason.FEATURE_NOT_SERVED,
        offer(spec={"klCoefficient": "0.1", "model": {"source": None}}),
        {},
        "with the model on a claim, no klCoefficient",
    ),
    "a trainer of its own": (
        Reason.TRAINER_NOT_ALLOWED,
        offer(spec={"trainer": {"image": "x"}}),
        {},
        "with no trainer",
    ),
    "a trainer of its own, and more": (
        Reason.TRAINER_NOT_ALLOWED,
        offer(spec={"trainer": {"image": "x"}, "klCoefficient": "0.1"}),
        {},
        "with no trainer and no klCoefficient",
    ),
    "a chat template": (
        Reason.FEATURE_NOT_SERVED,
        offer(task_type="Chat", spec={"dataset": {"chat": {"chatTemplate": "klingon"}}}),
        {},
        "with dataset.chat.chatTemplate chatml",
    ),
    "a format": (
        Reason.FEATURE_NOT_SERVED,
        offer(spec={"dataset": {"fileFormat": "zip"}}),
        {},
        "with no dataset.fileFormat",
    ),
    "a stretched model of pictures": (
        Reason.FEATURE_NOT_SERVED,
        offer(task_type="Image", spec={"model": {"yarnFactor": 2}}),
        {},
        "with no model.yarnFactor",
    ),
    "the rest of the features": (
        Reason.FEATURE_NOT_SERVED,
        offer(
            output={"repository": "me/x"},
            spec={
                "dataset": {"source": {"persistentVolumeClaim": None, "url": {"url": "https://x.test/"}}},
                "extraDatasets": [{"name": "x"}],
                "tracking": {"mode": "Online"},
            },
        ),
        {},
        "with the data on a claim, an output claim, no output.repository, no extraDatasets, tracking.mode Disabled",
    ),
    "family": (
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        offer(model="x/bloom"),
        {},
        "with a model of the family Llama and the same size",
    ),
    "unknown size": (
        Reason.PARAMETERS_UNKNOWN,
        offer(model="x/llama", parameters=None),
        {},
        "with model.parameters 1 (size class Small)",
    ),
    "size": (
        Reason.MODEL_SIZE_NOT_ACCEPTED,
        offer(parameters=5_000),
        {"policies": [policy(size_classes=[{**ALL, "minParameters": 10_000}])]},
        "with model.parameters 10000 (size class All)",
    ),
    "time limit": (Reason.TIME_LIMIT_TOO_LONG, offer(hours=40), {}, "with timeLimitSeconds at most 71999"),
    "score, time limit": (
        Reason.SCORE_TOO_LOW,
        offer(hours=19),
        {"policies": [policy(filters={"minScore": "0.7"})]},
        "with timeLimitSeconds at most 28767 (7.99 h)",
    ),
    "score, value": (
        Reason.SCORE_TOO_LOW,
        offer(**{**TASK, "spec": {"value": "1"}}),
        {
            "policies": [
                policy(
                    filters={"minScore": "0.5"},
                    scoring={"terms": None, "expectedValue": {"penalty": "1"}},
                    estimation=HOURLY,
                    size_classes=[ALL],
                )
            ]
        },
        "with a value of at least 3",
    ),
    "GPU count": (Reason.GPU_COUNT_NOT_ALLOWED, offer(gpus=8), {}, "with gpuCount 4"),
    "memory": (
        Reason.INSUFFICIENT_MEMORY,
        offer(**{**TASK, "parameters": 70_000_000_000}),
        {"policies": [PREDICTING]},
        "with a model of at most 28B parameters",
    ),
    "room for checkpoints": (
        Reason.INSUFFICIENT_STORAGE,
        offer(**TASK),
        {"policies": [policy(estimation={**HOURLY, "checkpointVolume": "840M"}, size_classes=[ALL])]},
        "with a model of at most 4.72B parameters",
    ),
    "time": (
        Reason.CANNOT_FINISH_IN_TIME,
        offer(**{**TASK, "hours": 3, "gpus": 1}),
        {"policies": [PREDICTING]},
        "with gpuCount 2",
    ),
    "time, by the limit": (
        Reason.CANNOT_FINISH_IN_TIME,
        offer(**{**TASK, "hours": 1, "gpus": 4}),
        {"policies": [PREDICTING]},
        "with timeLimitSeconds of at least",
    ),
    "time, by the rows": (
        Reason.CANNOT_FINISH_IN_TIME,
        offer(**{**TASK, "hours": 1, "gpus": 4}),
        {"policies": [PREDICTING]},
        "with at most",
    ),
    "time, by the rows and their tokens": (
        Reason.CANNOT_FINISH_IN_TIME,
        offer(**{**TASK, "hours": 1, "gpus": 4, "tokens": 300_000_000}),
        {"policies": [PREDICTING]},
        "with at most 96283 rows (dataset.rows) and 96283000 tokens (dataset.tokens)",
    ),
    "a deadline that is too near": (
        Reason.CANNOT_FINISH_IN_TIME,
        offer(**TASK, spec={"deadline": rfc3339(at(600))}),
        {"policies": [PREDICTING]},
        "with a deadline of 2026-01-31T",
    ),
    "another task type, without tokens": (
        Reason.TASK_TYPE_NOT_ACCEPTED,
        offer(rows=1000, tokens=400_000),
        {"policies": [policy(task_types=[{"name": "Image", "accepted": True, "weight": "1", "successRate": "1"}])]},
        "with taskType Image and data of dataset.type Image",
    ),
    "priority": (
        Reason.PRIORITY_NOT_ALLOWED,
        offer(priority_class="high"),
        {"policies": [policy(queue=PRIORITIES, namespaces=[{"name": "default", "highestPriority": "mid"}])]},
        "with priorityClassName mid",
    ),
    "lane": (
        Reason.NO_LANE,
        offer(parameters=2_000_000),
        {"policies": [policy(lanes=LANES)]},
        "with model.parameters 999999 (size class Small)",
    ),
    "a policy that rejects": (
        Reason.CAPACITY_FULL,
        offer(gpus=2),
        {"policies": [policy(filters={"onFull": "Reject"})], **ONE_FULL},
        "with gpuCount 1",
    ),
    "a duplicate": (
        Reason.DUPLICATE_TASK,
        offer("b", task_id="t", created=at(5)),
        {"siblings": [offer("a", task_id="t", created=NOW)]},
        "with a taskID of its own",
    ),
    "expired": (
        Reason.EXPIRED,
        offer(expires_at=rfc3339(at(-60))),
        {},
        "with no expiresAt, or a later one",
    ),
    "an address that has stopped to work": (
        Reason.SOURCE_EXPIRES,
        offer(spec=data_until(rfc3339(at(-60)))),
        {"policies": [policy(steps={"cache": {"claimName": "cache"}})]},
        "with a new address of the data that works until 2026-01-31T",
    ),
    "past its deadline": (
        Reason.EXPIRED,
        offer(spec={"deadline": rfc3339(at(-60))}),
        {},
        "with a deadline of 2026-01-31T12:01:00Z or later",
    ),
    "too old for the policy": (
        Reason.EXPIRED,
        offer(created=at(-600)),
        {"policies": [policy(filters={"offerTtlSeconds": 60})]},
        "with the offer created anew",
    ),
    "capacity": (
        Reason.WAITING_FOR_CAPACITY,
        offer(gpus=4),
        ONE_FULL,
        "after default/x ends, predicted for 2026-01-31T12:30:00Z",
    ),
    "capacity, GPU count": (Reason.WAITING_FOR_CAPACITY, offer(gpus=4), ONE_FULL, "with gpuCount 1"),
    "booked lane": (
        Reason.WAITING_FOR_LANE,
        offer(),
        {
            "policies": [policy(lanes=LANES)],
            "claims": [claim("x", count=2, lane="small")],
            "releases": [replace(release("x", 2, 60), lane="small")],
        },
        "after default/x ends, predicted for 2026-01-31T12:01:00Z",
    ),
    "job slots": (
        Reason.WAITING_FOR_JOB_SLOT,
        offer(),
        {
            "policies": [policy(filters={"maxConcurrentJobs": 1})],
            "claims": [claim("x")],
            "releases": [release("x", 1, 60)],
        },
        "after default/x ends, predicted for 2026-01-31T12:01:00Z",
    ),
    "quota": (
        Reason.WAITING_FOR_QUOTA,
        offer(gpus=2),
        {
            "policies": [policy(namespaces=[{"name": "default", "gpus": 2}])],
            "claims": [claim("x", namespace="default")],
            "releases": [release("x", 1, 60)],
        },
        "with gpuCount 1",
    ),
    "an earlier end on more GPUs": (
        Reason.WAITING_FOR_EARLIER_END,
        offer(**TASK),
        {"policies": [policy(estimation=HOURLY, size_classes=[ALL], gpu_choice="EarliestEnd")], **ONE_FULL},
        "with gpuCount 1",
    ),
    "a job that stops for it": (
        Reason.WAITING_FOR_PREEMPTION,
        offer(gpus=2, priority_class="high"),
        {
            "policies": [policy(queue={"priorities": ["low", "high"]}, preemption=HIGH_TAKES)],
            "claims": [claim("x-uid", count=7)],
            "running": [running("x", 7, deadline=None)],
        },
        "with gpuCount 1",
    ),
    "suspended": (Reason.SUSPENDED, offer(active=False), {}, "with active true"),
    "no such policy": (Reason.POLICY_NOT_FOUND, offer(policy="nope"), {}, "with policyName lab"),
    "a policy that is not usable": (
        Reason.POLICY_NOT_READY,
        offer(policy="broken"),
        {"policies": [policy(), replace(policy("broken", default=False), spec=None, problem="odd")]},
        "with policyName lab",
    ),
    "no node": (
        Reason.INVENTORY_NOT_READY,
        offer(),
        {
            "policies": [
                policy(node_selector={"matchLabels": {"gpu": "none"}}),
                policy("other", default=False),
            ]
        },
        "with policyName other",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_answer_has_a_change_that_turns_it_around(case: str) -> None:
    reason, view, world, change = CASES[case]
    shown = snapshot([view], **world)
    made = explain(shown, view)
    assert made.reason == reason.value
    told = next((c for c in made.counterfactuals if c.change.startswith(change)), None)
    assert told is not None, [c.change for c in made.counterfactuals]
    for found in made.counterfactuals:
        assert rerun(shown, view, found) == (found.verdict, found.reason)


def test_the_table_has_every_reason_that_a_change_can_help() -> None:
    # The large offer of a reservation needs a world with two offers; a spec that cannot be read has no changes.
    elsewhere = {Reason.WAITING_BEHIND_RESERVATION, Reason.INVALID_OFFER}
    assert {case[0] for case in CASES.values()} | elsewhere == WAIT_REASONS | REJECT_REASONS


def test_behind_a_reservation_fewer_gpus_or_the_reserving_offers_turn_help() -> None:
    rules = policy(queue={"reserveFromGpus": 4, **PRIORITIES})
    large, long = offer("large", gpus=4, hours=19), offer("long", gpus=1, model="x/phi-4", hours=19)
    world: dict[str, Any] = {"policies": [rules], "nodes": [node(gpus=4)], "claims": [claim("x", count=2)]}
    world["releases"] = [release("x", 2, 11 * 3600)]
    shown = snapshot([large, long], **world)
    made = explain(shown, long)
    assert made.reason == "WaitingBehindReservation"
    assert [c.change for c in made.counterfactuals] == [
        "with priorityClassName mid",
        "with priorityClassName high",
        "with timeLimitSeconds 34200",
    ]
    for found in made.counterfactuals:
        assert rerun(shown, long, found) == (found.verdict, found.reason)


@pytest.mark.parametrize("seconds", [3600, 7200, 10_000])
def test_the_least_time_limit_that_is_told_is_the_least_one_that_passes(seconds: int) -> None:
    view = offer(**{**TASK, "gpus": 1, "hours": seconds / 3600})
    made = explained(view, policies=[PREDICTING])
    told = next(c for c in made.counterfactuals if c.change.startswith("with timeLimitSeconds of at least"))
    least = told.spec["timeLimitSeconds"]
    assert PREDICTING.spec is not None
    assert isinstance(view.spec, TaskOfferSpec)
    refused = [
        bool(evaluate(view.spec.model_copy(update={"time_limit_seconds": limit}), PREDICTING.spec).refusals)
        for limit in (least - 1, least)
    ]
    assert refused == [True, False]


def test_whatever_helps_a_refused_offer_takes_a_new_one() -> None:
    full = explained(offer(gpus=2), policies=[policy(filters={"onFull": "Reject"})], **ONE_FULL)
    assert {c.change.split(",")[0] for c in full.counterfactuals} == {"after default/x ends", "with gpuCount 1"}
    expired = explained(offer(expires_at=rfc3339(at(-60))))
    assert all(c.replaces for c in (*full.counterfactuals, *expired.counterfactuals))
    paused = explained(offer(active=False))
    assert [(c.change, c.replaces) for c in paused.counterfactuals] == [("with active true", False)]


def test_several_refusals_are_all_told_and_removed_together() -> None:
    view = offer(gpus=8, hours=40, model="x/bloom")
    made = explained(view)
    assert {c.reason for c in made.refusals} == {
        "GpuCountNotAllowed",
        "TimeLimitTooLong",
        "ModelFamilyNotAccepted",
    }
    assert all(cause.remedy for cause in made.refusals)
    (told,) = made.counterfactuals
    assert told.change == (
        "with a model of the family Llama and the same size and timeLimitSeconds at most 71999 and gpuCount 4"
    )
    assert rerun(snapshot([view]), view, told) == ("Admit", "Admitted")


def test_accepted_and_admitted_are_different_answers() -> None:
    made = explained(offer(hours=40), **FULL)
    (told,) = made.counterfactuals
    assert (made.accepted, told.verdict, told.reason) == (False, "Wait", "WaitingForCapacity")
    waits = explained(offer(), **FULL)
    assert (waits.accepted, waits.verdict) == (True, "Wait")


@pytest.mark.parametrize(
    ("view", "change"),
    [(offer(active=False), "with active true"), (offer(policy="nope"), "with policyName lab")],
)
def test_what_only_gets_an_offer_into_the_queue_is_told_as_that(view: OfferView, change: str) -> None:
    made = explained(view, **FULL)
    assert [(c.change, c.verdict, c.reason) for c in made.counterfactuals] == [(change, "Wait", "WaitingForCapacity")]


def test_a_change_that_the_next_decision_does_not_confirm_is_not_told() -> None:
    # One GPU is free, but an older offer gets it whatever this one asks for.
    older = offer("older", created=at(-60), gpus=1)
    made = explained(offer("o", gpus=4), older, **ONE_FULL)
    assert [c.change for c in made.counterfactuals if c.spec] == []
    alone = explained(offer("o", gpus=4), **ONE_FULL)
    assert "with gpuCount 1" in [c.change for c in alone.counterfactuals]


def test_a_change_of_what_never_changes_is_decided_as_a_new_offer() -> None:
    # The new offer is younger than the one beside it, so it goes last.
    beside = offer("beside", created=at(-5), gpus=1)
    made = explained(offer("o", created=at(-60), gpus=4), beside, **ONE_FULL)
    assert [c.change for c in made.counterfactuals if c.spec] == []


def test_only_the_ends_that_are_needed_are_told() -> None:
    booked = [claim("a", "n1", 8), claim("b", "n2", 8), claim("c", "n2", 0)]
    ends = [release("a", 8, 600, "n1"), release("b", 8, 1200, "n2")]
    world: dict[str, Any] = {"nodes": [node("n1"), node("n2")], "claims": booked, "releases": ends}
    first, second = offer("first", gpus=4, created=at(-1)), offer("second", gpus=4)
    made = explain(snapshot([first, second], **world), second)
    assert [c.after for c in made.counterfactuals] == [("default/a",)]
    three = [offer(f"o{i}", gpus=4, created=at(i)) for i in range(3)]
    last = explain(snapshot(three, **world), three[-1])
    assert [c.after for c in last.counterfactuals] == [("default/a", "default/b")]
    assert last.counterfactuals[0].at == at(1200)


def test_an_end_that_comes_after_the_offers_own_is_no_help() -> None:
    made = explained(offer(gpus=4, expires_at=rfc3339(at(900))), **ONE_FULL)
    assert all(not c.after for c in made.counterfactuals)


def test_an_offer_that_waits_is_told_its_place_and_its_predicted_start() -> None:
    made = explained(offer("o", gpus=4), offer("better", gpus=4, created=at(-9)), **FULL)
    assert made.queued is not None
    assert made.queued.position == 2
    assert made.queued.start is not None
    assert made.queued.start.expected == at(1800)
    assert made.queued.start.earliest < at(1800) < (made.queued.start.latest or NOW)


def test_what_the_status_says_is_told_where_it_is_another_answer() -> None:
    assert explained(offer(waits="WaitingForCapacity")).stored_reason == "WaitingForCapacity"
    assert explained(offer(waits="WaitingForCapacity"), **FULL).stored_reason is None


def test_an_offer_that_cannot_be_read_is_told_what_is_wrong_with_it() -> None:
    made = explained(offer(invalid="taskID: missing"))
    assert (made.verdict, made.reason, made.accepted) == ("Reject", "InvalidOffer", None)
    assert "taskID: missing" in made.message
    assert made.counterfactuals == ()


def test_a_long_queue_is_decided_again_less_often_and_without_a_run_nothing_is_told() -> None:
    view = offer(gpus=4)
    shown = snapshot([view], **ONE_FULL)
    assert Rerun.of(shown, view).left == 64
    many = replace(shown, offers=[offer(f"o{i}") for i in range(6000)])
    assert Rerun.of(many, view).left == 16
    spent = Rerun(shown, view, left=1)
    assert spent.decide(view.full_spec) is not None
    assert spent.decide(view.full_spec) is None


def test_an_explained_offer_that_the_snapshot_lacks_is_decided_with_the_others() -> None:
    view = offer("o", gpus=4)
    with_it = explain(snapshot([view, offer("p")], **ONE_FULL), view)
    assert explain(snapshot([offer("p")], **ONE_FULL), view) == with_it


POLICIES: list[PolicyView] = [
    policy(),
    PREDICTING,
    policy(lanes=LANES),
    policy(filters={"maxConcurrentJobs": 2}, queue=PRIORITIES),
    policy(filters={"onFull": "Reject", "minScore": "0.7"}),
    policy(queue={"reserveFromGpus": 2, **PRIORITIES}, estimation=HOURLY),
    policy(estimation=HOURLY, size_classes=[ALL], gpu_choice="EarliestEnd"),
    policy(namespaces=[{"name": "default", "gpus": 3}]),
    policy(filters={"offerTtlSeconds": 60, "minScore": "0.8", "floorMinScore": "0.5"}),
    policy(
        filters={"minScore": "0.3"},
        scoring={"terms": None, "expectedValue": {"penalty": "1"}},
        gpu_choice="MostValue",
        estimation=HOURLY,
        size_classes=[ALL],
    ),
]
FIELDS = st.fixed_dictionaries(
    {
        "parameters": st.sampled_from([None, 500_000, 2_000_000, 5_000_000, 8_030_000_000, 70_000_000_000]),
        "model": st.sampled_from(["x/llama", "x/qwen", "x/phi-4", "x/bloom"]),
        "task_type": st.sampled_from(["InstructText", "InstructText", "InstructText", "DPO"]),
        "hours": st.sampled_from([0.5, 3, 19, 30]),
        "gpus": st.sampled_from([None, None, 1, 2, 4, 8]),
        "rows": st.sampled_from([None, 1000, 300_000]),
        "tokens": st.sampled_from([None, None, 90_000_001]),
        "priority_class": st.sampled_from([None, "low", "high"]),
        "active": st.sampled_from([None, None, None, False]),
        "expires_at": st.sampled_from([None, None, rfc3339(at(-10)), rfc3339(at(900))]),
        "task_id": st.sampled_from([None, None, None, "same"]),
        "policy": st.sampled_from([None, None, None, "other", "nope"]),
        "created": st.sampled_from([at(-1), at(-100), at(-7200)]),
    }
)


def views(fields: list[dict[str, Any]]) -> list[OfferView]:
    return [offer(f"o{i}", **{k: v for k, v in f.items() if v is not None}) for i, f in enumerate(fields)]


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(FIELDS, min_size=1, max_size=5),
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(-600, 9000)), max_size=3),
)
def test_every_change_that_is_told_turns_out_as_it_is_told(
    fields: list[dict[str, Any]], rules: PolicyView, jobs: list[tuple[int, int]]
) -> None:
    booked: list[Claim] = [claim(f"j{i}", count=count) for i, (count, _) in enumerate(jobs)]
    ends = [release(f"j{i}", count, seconds) for i, (count, seconds) in enumerate(jobs)]
    pending = views(fields)
    other = policy("other", default=False, filters={"maxConcurrentJobs": 1})
    shown = snapshot(pending, policies=[rules, other], claims=booked, releases=ends)
    for view in pending[:2]:
        made = explain(shown, view)
        if made.score is not None:
            assert sum(Decimal(term.points) for term in made.terms) == Decimal(made.score)
        answers = {d.offer.uid: (d.answer.verdict.value, d.answer.reason.value) for d in plan(shown).decisions}
        assert (made.verdict, made.reason) == answers[view.uid]
        for told in made.counterfactuals:
            assert rerun(shown, view, told) == (told.verdict, told.reason), told.change
            assert told.replaces or MUTABLE.issuperset(told.spec)
