"""Whole cycles: who is admitted, who waits for what, who is refused and why."""

from datetime import timedelta
from typing import Any

import pytest

from core_builders import (
    FOUR_GPUS,
    HIGH_TAKES,
    NOW,
    TWO_GPUS,
    answers,
    at,
    claim,
    cycle,
    data_until,
    decide,
    node,
    offer,
    places,
    policy,
    running,
)
from taskoffer.api.reasons import ADMIT_REASONS, REJECT_REASONS, WAIT_REASONS, Reason
from taskoffer.api.v1alpha1.meta import PolicyRef
from taskoffer.api.v1alpha1.taskoffer import ClockMode
from taskoffer.decision.keys import OfferKey
from taskoffer.decision.ledger import Release
from taskoffer.decision.placed_jobs import MoveRequest
from taskoffer.decision.snapshot import OfferView, PolicyView
from taskoffer.decision.verdict import Verdict

LANE = [{"name": "text", "gpus": 2, "rules": [{"gpusPerTask": 1}]}]
STEPS = {"cache": {"claimName": "cache"}}
LARGE_ONLY = {"sizeClasses": ["Large"], "gpusPerTask": 2}
NOT_USABLE = PolicyView("lab", "lab-uid", 1, None, is_default=True, created=NOW, problem="filters: nonsense")

H100 = {"gpuMemory": "80G", "duration": {}}
EPOCHS = [
    {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
]
"""One size class whose tasks take all rows, and not the few steps of the lab's."""
VERDICTS: list[tuple[str, OfferView, dict[str, Any], Verdict, Reason, str]] = [
    ("it fits", offer(), {}, Verdict.ADMIT, Reason.ADMITTED, "1 x nvidia.com/gpu on node-a, where 1 of 8 are booked"),
    (
        "no node has enough free",
        offer(parameters=FOUR_GPUS),
        {"claims": [claim("x", count=6)]},
        Verdict.WAIT,
        Reason.WAITING_FOR_CAPACITY,
        "needs 4 x nvidia.com/gpu on one node; node-a has the most free, 2 of 8",
    ),
    (
        "free GPUs on two nodes do not add up",
        offer(parameters=FOUR_GPUS),
        {"nodes": [node("n1", 2), node("n2", 2)]},
        Verdict.WAIT,
        Reason.WAITING_FOR_CAPACITY,
        "the largest Ready node, n2, has 2",
    ),
    (
        "a node that offers less than is booked on it gets nothing more",
        offer(),
        {"nodes": [node("n1", 2)], "claims": [claim("x", "n1", 4)]},
        Verdict.WAIT,
        Reason.WAITING_FOR_CAPACITY,
        "n1 has the most free, 0 of 2",
    ),
    (
        "the lane is full although the node is not",
        offer(),
        {"policies": [policy(lanes=LANE)], "claims": [claim("x", count=2, lane="text")]},
        Verdict.WAIT,
        Reason.WAITING_FOR_LANE,
        "needs 1 x nvidia.com/gpu in lane text, where 2 of 2 are booked",
    ),
    (
        "all job slots are taken although the node is not full",
        offer(),
        {"policies": [policy(filters={"maxConcurrentJobs": 1})], "claims": [claim("x")]},
        Verdict.WAIT,
        Reason.WAITING_FOR_JOB_SLOT,
        "1 of 1 concurrent jobs run",
    ),
    ("there is no node", offer(), {"nodes": []}, Verdict.WAIT, Reason.INVENTORY_NOT_READY, "no Ready"),
    (
        "no node is Ready",
        offer(),
        {"nodes": [node(ready=False)]},
        Verdict.WAIT,
        Reason.INVENTORY_NOT_READY,
        "no Ready and schedulable node that the policy selects offers nvidia.com/gpu",
    ),
    (
        "no node has the labels that the policy selects",
        offer(),
        {"policies": [policy(node_selector={"matchLabels": {"gpu": "h100"}})], "nodes": [node(labels={"gpu": "a100"})]},
        Verdict.WAIT,
        Reason.INVENTORY_NOT_READY,
        "no Ready",
    ),
    (
        "the named policy does not exist",
        offer(policy="gone"),
        {},
        Verdict.WAIT,
        Reason.POLICY_NOT_FOUND,
        "CapacityPolicy gone does not exist: create it",
    ),
    (
        "there is no default policy",
        offer(),
        {"policies": [policy(default=False)]},
        Verdict.WAIT,
        Reason.POLICY_NOT_FOUND,
        "taskoffer.dev/is-default-policy=true",
    ),
    (
        "the policy has never been valid",
        offer(),
        {"policies": [NOT_USABLE]},
        Verdict.WAIT,
        Reason.POLICY_NOT_READY,
        "CapacityPolicy lab is not usable: filters: nonsense",
    ),
    ("it is paused", offer(active=False), {}, Verdict.WAIT, Reason.SUSPENDED, "spec.active is false"),
    (
        "its type is not accepted",
        offer(task_type="DPO"),
        {"policies": [policy(preset="strategy-8xh100")]},
        Verdict.REJECT,
        Reason.TASK_TYPE_NOT_ACCEPTED,
        "taskType DPO is not accepted",
    ),
    (
        "a feature is not served",
        offer(spec={"klCoefficient": "1"}),
        {},
        Verdict.REJECT,
        Reason.FEATURE_NOT_SERVED,
        "spec.klCoefficient is not served",
    ),
    (
        "it brings a trainer that is not allowed",
        offer(spec={"trainer": {"image": "mine:1"}}),
        {},
        Verdict.REJECT,
        Reason.TRAINER_NOT_ALLOWED,
        "the policy lets no offer bring its own trainer",
    ),
    (
        "its family is not accepted",
        offer(model="tiiuae/falcon-7b"),
        {},
        Verdict.REJECT,
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        "belongs to no family",
    ),
    (
        "its size is unknown",
        offer(model="x/llama", parameters=None),
        {},
        Verdict.REJECT,
        Reason.PARAMETERS_UNKNOWN,
        "set model.parameters",
    ),
    (
        "its size fits no class",
        offer(parameters=1),
        {
            "policies": [
                policy(
                    size_classes=[
                        {"name": "L", "minParameters": 9, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}
                    ]
                )
            ]
        },
        Verdict.REJECT,
        Reason.MODEL_SIZE_NOT_ACCEPTED,
        "no size class",
    ),
    ("it takes too long", offer(hours=20), {}, Verdict.REJECT, Reason.TIME_LIMIT_TOO_LONG, "not below"),
    (
        "its score is too low",
        offer(),
        {"policies": [policy(filters={"minScore": "0.99"})]},
        Verdict.REJECT,
        Reason.SCORE_TOO_LOW,
        "does not exceed",
    ),
    ("it wants too many GPUs", offer(gpus=8), {}, Verdict.REJECT, Reason.GPU_COUNT_NOT_ALLOWED, "hands out 1, 2, 4"),
    (
        "it does not fit the memory of its GPUs",
        offer(model="meta-llama/Llama-3.1-405B", parameters=405_000_000_000),
        {"policies": [policy(estimation=H100)]},
        Verdict.REJECT,
        Reason.INSUFFICIENT_MEMORY,
        "needs 499.9 of 63.3 GiB on each GPU with 1 row(s) at a time (4 GPUs, FSDP, layers estimated from the size), "
        "with LoRA rank 8",
    ),
    (
        "its checkpoints have no room",
        offer(model="meta-llama/Meta-Llama-3-8B", parameters=8_030_000_000),
        {"policies": [policy(estimation={**H100, "checkpointVolume": "600M"})]},
        Verdict.REJECT,
        Reason.INSUFFICIENT_STORAGE,
        "take 1.01 GB, with LoRA rank 8, and the policy's estimation.checkpointVolume is 600M",
    ),
    (
        "it cannot end in time",
        offer(model="meta-llama/Meta-Llama-3-8B", parameters=8_030_000_000, hours=1),
        {"policies": [policy(estimation={**H100, "duration": {"startSeconds": 4000}})]},
        Verdict.REJECT,
        Reason.CANNOT_FINISH_IN_TIME,
        "predicted to take 66.8 min of 57 min on 4 GPU(s): 40 steps of 16 rows of 256 tokens, MFU 0.35",
    ),
    (
        "it would end after its deadline if it started now",
        offer(spec={"deadline": "2026-01-31T12:10:00Z"}, rows=10),
        {"policies": [policy(estimation={**H100, "duration": {"startSeconds": 500}})]},
        Verdict.REJECT,
        Reason.CANNOT_FINISH_IN_TIME,
        "reserve included, and 10 min are left until spec.deadline 2026-01-31T12:10:00Z",
    ),
    (
        "its namespace holds all the GPUs that it may",
        offer(),
        {
            "policies": [policy(namespaces=[{"name": "default", "gpus": 2}])],
            "claims": [claim("x", count=2, namespace="default")],
        },
        Verdict.WAIT,
        Reason.WAITING_FOR_QUOTA,
        "needs 1 x nvidia.com/gpu, and namespace default holds 2 of its 2",
    ),
    (
        "it would end earlier on GPUs that come free soon",
        offer(model="meta-llama/Meta-Llama-3-8B", parameters=8_030_000_000, hours=10, rows=40_000),
        {
            "policies": [policy(estimation={**H100, "duration": {}}, gpu_choice="EarliestEnd", size_classes=EPOCHS)],
            "claims": [claim("x", count=7)],
            "releases": [Release("x", "node-a", 7, at(600), "lab")],
        },
        Verdict.WAIT,
        Reason.WAITING_FOR_EARLIER_END,
        "on 4 GPU(s), which node-a is predicted to have free at 2026-01-31T12:10:00Z; on 1 GPU(s) from now on it "
        "would be 2026-01-31T",
    ),
    (
        "a job of a lower priority is stopped for it",
        offer(gpus=2, priority_class="high"),
        {
            "policies": [policy(queue={"priorities": ["low", "high"]}, preemption=HIGH_TAKES)],
            "claims": [claim("x-uid", count=8)],
            "running": [running("x", 8, deadline=None)],
        },
        Verdict.WAIT,
        Reason.WAITING_FOR_PREEMPTION,
        "needs 2 x nvidia.com/gpu; default/x (8) on node-a save, stop and go on later",
    ),
    (
        "its priority is not one of the policy's",
        offer(priority_class="urgent"),
        {"policies": [policy(queue={"priorities": ["low", "high"]})]},
        Verdict.REJECT,
        Reason.PRIORITY_NOT_ALLOWED,
        "priorityClassName urgent is not among those that the policy lets offers ask for: low, high",
    ),
    (
        "its priority is above its namespace's",
        offer(priority_class="high"),
        {
            "policies": [
                policy(
                    queue={"priorities": ["low", "high"]}, namespaces=[{"name": "default", "highestPriority": "low"}]
                )
            ]
        },
        Verdict.REJECT,
        Reason.PRIORITY_NOT_ALLOWED,
        "not among those that the policy lets namespace default ask for: low",
    ),
    (
        "it asks for more GPUs than its namespace may hold",
        offer(gpus=4),
        {"policies": [policy(namespaces=[{"name": "default", "gpus": 2}])]},
        Verdict.REJECT,
        Reason.GPU_COUNT_NOT_ALLOWED,
        "4 x nvidia.com/gpu is more than the policy lets namespace default hold (2)",
    ),
    (
        "no lane takes it",
        offer(),
        {"policies": [policy(lanes=[{"name": "l", "gpus": 2, "rules": [LARGE_ONLY]}])]},
        Verdict.REJECT,
        Reason.NO_LANE,
        "no lane of the policy takes",
    ),
    (
        "the node is full and the policy rejects then",
        offer(),
        {"policies": [policy(filters={"onFull": "Reject"})], "claims": [claim("x", count=8)]},
        Verdict.REJECT,
        Reason.CAPACITY_FULL,
        "the policy rejects instead of queueing",
    ),
    (
        "the lane is full and the policy rejects then",
        offer(),
        {"policies": [policy(filters={"onFull": "Reject"}, lanes=LANE)], "claims": [claim("x", count=2, lane="text")]},
        Verdict.REJECT,
        Reason.CAPACITY_FULL,
        "in lane text, where 2 of 2 are booked; the policy rejects",
    ),
    (
        "an older offer has its task id",
        offer("second", task_id="t", created=at(1)),
        {"siblings": [offer("first", task_id="t", waits="Rejected")]},
        Verdict.REJECT,
        Reason.DUPLICATE_TASK,
        "TaskOffer first has the same taskID t and is older; its answer (Rejected) counts",
    ),
    (
        "it has expired",
        offer(expires_at="2026-01-31T12:00:00Z"),
        {},
        Verdict.REJECT,
        Reason.EXPIRED,
        "not admitted before spec.expiresAt 2026-01-31T12:00:00Z",
    ),
    (
        "the address of its data has stopped to work",
        offer(spec={"deadline": "2026-01-31T13:00:00Z", **data_until("2026-01-31T11:59:00Z")}),
        {},
        Verdict.REJECT,
        Reason.SOURCE_EXPIRES,
        "stops to work at 2026-01-31T11:59:00Z, as spec.dataset.source.url says by expiresAt or by its signature, "
        "and now it is 2026-01-31T12:00:00Z",
    ),
    (
        "the signature of that address has ended",
        offer(spec=data_until("2026-01-31T13:00:00Z", "X-Amz-Date=20260131T100000Z&X-Amz-Expires=3600")),
        {},
        Verdict.REJECT,
        Reason.SOURCE_EXPIRES,
        "stops to work at 2026-01-31T11:00:00Z, ",
    ),
    (
        "its deadline has passed",
        offer(expires_at="2026-01-31T13:00:00Z", spec={"deadline": "2026-01-31T11:00:00Z"}),
        {},
        Verdict.REJECT,
        Reason.EXPIRED,
        "not admitted before spec.deadline 2026-01-31T11:00:00Z",
    ),
    (
        "the time that the policy gives offers is over",
        offer(created=at(-600)),
        {"policies": [policy(filters={"offerTtlSeconds": 600})]},
        Verdict.REJECT,
        Reason.EXPIRED,
        "not admitted within the policy's offerTtlSeconds 600, until 2026-01-31T12:00:00Z",
    ),
    ("it cannot be read", offer(invalid="taskType: nonsense"), {}, Verdict.REJECT, Reason.INVALID_OFFER, "nonsense"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "world", "verdict", "reason", "text"), [c[1:] for c in VERDICTS], ids=[c[0] for c in VERDICTS]
)
def test_verdicts(view: OfferView, world: dict[str, Any], verdict: Verdict, reason: Reason, text: str) -> None:
    answer = decide(view, **world).answer
    assert (answer.verdict, answer.reason) == (verdict, reason)
    assert text in answer.message
    assert (answer.admission is not None) == (verdict is Verdict.ADMIT)


def test_every_verdict_reason_occurs_in_the_table_and_belongs_to_one_verdict() -> None:
    assert not ADMIT_REASONS & WAIT_REASONS
    assert not WAIT_REASONS & REJECT_REASONS
    assert not ADMIT_REASONS & REJECT_REASONS
    shown = {verdict: {c[4] for c in VERDICTS if c[3] is verdict} for verdict in Verdict}
    # It takes two offers to see this one: test_queue.py has it.
    shown[Verdict.WAIT].add(Reason.WAITING_BEHIND_RESERVATION)
    assert shown == {
        Verdict.ADMIT: set(ADMIT_REASONS),
        Verdict.WAIT: set(WAIT_REASONS),
        Verdict.REJECT: set(REJECT_REASONS),
    }


def test_an_empty_inventory_makes_even_a_rejecting_policy_wait() -> None:
    rejecting = [policy(filters={"onFull": "Reject"})]
    for nodes in ([], [node(ready=False)], [node(gpus=0)]):
        assert decide(offer(), policies=rejecting, nodes=nodes).answer.reason is Reason.INVENTORY_NOT_READY


# The admission


def test_an_admission_pins_policy_node_lane_time_and_name() -> None:
    lanes = [policy(generation=7, lanes=LANE)]
    made = decide(offer("a", uid="0123456789abcdef", hours=2), policies=lanes)
    assert made.policy == PolicyRef(name="lab", uid="lab-uid", generation=7)
    assert made.answer.admission is not None
    assert made.answer.admission.to_wire() == {
        "policyRef": {"name": "lab", "uid": "lab-uid", "generation": 7},
        "jobName": "a-01234567",
        "decidedAt": "2026-01-31T12:00:00Z",
        "deadline": "2026-01-31T14:00:00Z",
        "assignments": [{"nodeName": "node-a", "resourceName": "nvidia.com/gpu", "count": 1, "lane": "text"}],
    }
    assert [i.name for i in made.answer.explanation][-1] == "SizeClass"


@pytest.mark.parametrize(
    ("spec", "deadline"),
    [
        ({}, at(3600)),
        ({"clockMode": "Absolute", "deadline": "2026-01-31T12:30:00Z"}, at(1800)),
        ({"clockMode": "Absolute", "deadline": "2026-01-31T18:00:00Z"}, at(3600)),
        ({"clockMode": "Training"}, None),
        ({"clockMode": "Training", "deadline": "2026-01-31T18:00:00Z"}, at(6 * 3600)),
    ],
)
def test_the_deadline_follows_the_clock_mode(spec: dict[str, Any], deadline: object) -> None:
    admission = decide(offer(spec=spec)).answer.admission
    assert admission is not None
    assert admission.deadline == deadline
    assert ClockMode(spec.get("clockMode", "Absolute")) in ClockMode


def test_a_waiting_answer_says_what_binds_and_what_would_change_it() -> None:
    answer = decide(offer(parameters=TWO_GPUS), claims=[claim("x", count=7)]).answer
    constraint, counterfactual = answer.explanation[-2:]
    assert (constraint.type, constraint.name) == ("Constraint", "WaitingForCapacity")
    assert (counterfactual.type, counterfactual.message) == (
        "Counterfactual",
        "admitted once 1 more are free on node-a",
    )
    assert answer.score is not None


def test_a_rejection_lists_every_refusal_in_its_explanation() -> None:
    answer = decide(offer(hours=30, gpus=8, spec={"klCoefficient": "1"})).answer
    assert answer.reason is Reason.TIME_LIMIT_TOO_LONG
    assert answer.message.endswith("(and 2 more in status.explanation)")
    assert [i.name for i in answer.explanation if i.type == "Constraint"] == [
        "TimeLimitTooLong",
        "GpuCountNotAllowed",
        "FeatureNotServed",
    ]
    assert [i.name for i in answer.explanation if i.type == "Counterfactual"] == [
        "TimeLimitTooLong",
        "GpuCountNotAllowed",
        "FeatureNotServed",
    ]


def test_the_explanation_keeps_within_sixteen_items_however_much_is_wrong() -> None:
    everything = {
        "klCoefficient": "1",
        "extraDatasets": [{"name": "x/y"}],
        "tracking": {"mode": "Online"},
        "trainer": {"image": "x"},
        "model": {"yarnFactor": 2, "source": None},
        "dataset": {"source": None},
        "output": {"repository": "a/b", "persistentVolumeClaim": None},
    }
    view = offer(hours=30, gpus=8, task_type="DPO", spec=everything)
    answer = decide(view, policies=[policy(scoring={"cap": "0.1"})]).answer
    assert len(answer.explanation) <= 16
    assert sum(i.type == "Constraint" for i in answer.explanation) == 8


# Order and packing


def test_a_better_score_goes_first_then_age_then_uid() -> None:
    made = cycle(
        [
            offer("late", uid="a", created=at(1)),
            offer("old-b", uid="c"),
            offer("old-a", uid="b"),
            offer("best", uid="z", created=at(9), hours=0.5),
        ],
        nodes=[node(gpus=3)],
    )
    assert [d.offer.key.name for d in made.decisions] == ["best", "old-a", "old-b", "late"]
    assert answers(made)["late"] == ("Wait", "WaitingForCapacity")


def test_an_offer_that_does_not_fit_does_not_hold_up_a_smaller_one() -> None:
    made = cycle([offer("big", parameters=FOUR_GPUS, hours=0.01), offer("small", hours=15)], nodes=[node(gpus=2)])
    assert answers(made) == {"big": ("Wait", "WaitingForCapacity"), "small": ("Admit", "Admitted")}


def test_two_two_and_four_share_one_node_and_the_next_goes_to_another() -> None:
    sizes = {"a": 2, "b": 2, "c": 4, "d": 1}
    offers = [offer(n, gpus=count, created=at(i)) for i, (n, count) in enumerate(sizes.items())]
    assert places(cycle(offers, nodes=[node("n1"), node("n2")])) == {"a": "n1", "b": "n1", "c": "n1", "d": "n2"}


def test_a_lane_is_booked_within_the_cycle() -> None:
    made = cycle([offer(n, created=at(i)) for i, n in enumerate("abc")], policies=[policy(lanes=LANE)])
    assert answers(made) == {
        "a": ("Admit", "Admitted"),
        "b": ("Admit", "Admitted"),
        "c": ("Wait", "WaitingForLane"),
    }


def test_job_slots_are_booked_within_the_cycle() -> None:
    made = cycle(
        [offer(n, created=at(i)) for i, n in enumerate("ab")], policies=[policy(filters={"maxConcurrentJobs": 1})]
    )
    assert answers(made) == {"a": ("Admit", "Admitted"), "b": ("Wait", "WaitingForJobSlot")}


def test_policies_that_share_a_node_share_its_ledger() -> None:
    both = [policy("lab"), policy("other", default=False)]
    made = cycle([offer("a", hours=0.5), offer("b", policy="other")], policies=both, nodes=[node(gpus=1)])
    assert answers(made) == {"a": ("Admit", "Admitted"), "b": ("Wait", "WaitingForCapacity")}


# Duplicates


def test_of_two_offers_with_one_task_id_the_older_is_decided_and_the_later_refused() -> None:
    made = cycle([offer("second", task_id="t", created=at(1)), offer("first", task_id="t")])
    assert answers(made) == {"first": ("Admit", "Admitted"), "second": ("Reject", "DuplicateTask")}


def test_of_two_offers_of_one_second_the_lower_uid_is_decided() -> None:
    made = cycle([offer("x", uid="b", task_id="t"), offer("y", uid="a", task_id="t")])
    assert answers(made) == {"y": ("Admit", "Admitted"), "x": ("Reject", "DuplicateTask")}


# Policies


def test_of_several_default_policies_the_newest_decides() -> None:
    made = decide(offer(), policies=[policy("old"), policy("new", created=at(9)), policy("last", default=False)])
    assert made.policy is not None
    assert made.policy.name == "new"


def test_a_named_policy_counts_before_the_default_one() -> None:
    made = decide(offer(policy="mine"), policies=[policy("lab"), policy("mine", default=False)])
    assert made.policy is not None
    assert made.policy.name == "mine"


# Only changes are written


@pytest.mark.parametrize(
    ("view", "written"),
    [
        (offer(parameters=FOUR_GPUS, waits="WaitingForCapacity"), False),
        (offer(parameters=FOUR_GPUS), True),
        (offer(parameters=FOUR_GPUS, waits="WaitingForLane"), True),
        (offer(parameters=FOUR_GPUS, waits="WaitingForCapacity", generation=2, observed=1), True),
        (offer(active=False, waits="Suspended"), False),
        (offer(policy="gone", waits="PolicyNotFound"), False),
    ],
)
def test_an_answer_is_written_when_verdict_reason_or_generation_changed(view: OfferView, written: bool) -> None:
    made = cycle([view], nodes=[node(gpus=2)])
    assert bool(made.decisions) is written
    assert made.waiting == 1


def test_a_revoked_offer_is_decided_again() -> None:
    assert decide(offer(waits="PolicyChanged")).answer.verdict is Verdict.ADMIT


# Time


def test_the_plan_wakes_at_the_next_end_of_a_waiting_offer() -> None:
    full = [claim("x", count=8)]
    made = cycle(
        [
            offer("a", expires_at="2026-01-31T15:00:00Z"),
            offer("b", expires_at="2026-01-31T14:00:00Z", spec={"deadline": "2026-01-31T13:00:00Z"}),
            offer("c"),
        ],
        claims=full,
    )
    assert made.wake_at == NOW + timedelta(hours=1)
    address = offer(spec=data_until("2026-01-31T12:30:00Z"))
    assert cycle([address], policies=[policy(steps=STEPS)], claims=full).wake_at == NOW + timedelta(minutes=30)
    assert made.waiting == 3
    assert cycle([offer()], claims=full).wake_at is None
    assert cycle([offer(expires_at="2026-01-31T15:00:00Z")]).wake_at is None


def test_an_address_of_a_bucket_is_asked_with_credentials_and_works_for_ever() -> None:
    spec = data_until("2026-01-31T11:00:00Z")
    spec["dataset"]["source"]["url"]["url"] = "s3://bucket/rows.jsonl"
    assert decide(offer(spec=spec), policies=[policy(steps=STEPS)]).answer.verdict is Verdict.ADMIT


# Moves


def move(count: int = 2, *, avoid: tuple[str, ...] = (), holder: str = "mover", policy: str = "lab") -> MoveRequest:
    return MoveRequest(OfferKey("default", "mover-1"), holder, policy, count, None, frozenset(avoid))


MOVES: list[tuple[str, MoveRequest, dict[str, Any], str | None]] = [
    ("it goes to the fullest node that fits", move(), {"nodes": [node("n1"), node("n2", 2)]}, "n2"),
    ("it avoids the lost node", move(avoid=("n2",)), {"nodes": [node("n1"), node("n2", 2)]}, "n1"),
    ("it waits while nothing fits", move(4), {"nodes": [node("n1", 2)]}, None),
    ("it waits while its policy is gone", move(policy="gone"), {}, None),
    (
        "its place without pods is the last that it takes",
        move(),
        {"nodes": [node("n1", 2), node("n2", 8)], "claims": [claim("mover", "n1", 2)]},
        "n2",
    ),
    (
        "it starts again in its own place where no other has room",
        move(),
        {"nodes": [node("n1", 2), node("n2", 1)], "claims": [claim("mover", "n1", 2)]},
        "n1",
    ),
    (
        "it does not take its own place while pods are still there",
        move(),
        {"nodes": [node("n1", 2)], "claims": [claim("mover", "n1", 2), claim("mover", "n1", 2, "pod")]},
        None,
    ),
    (
        "it does not take its own place on a node that is not Ready",
        move(),
        {"nodes": [node("n1", 2, ready=False)], "claims": [claim("mover", "n1", 2)]},
        None,
    ),
]


@pytest.mark.parametrize(("request_", "world", "place"), [c[1:] for c in MOVES], ids=[c[0] for c in MOVES])
def test_moves(request_: MoveRequest, world: dict[str, Any], place: str | None) -> None:
    made = cycle([], moves=[request_], **world)
    assert [m.assignments[0].node_name for m in made.moves] == ([place] if place else [])
    assert all(m.assignments[0].count == request_.count and m.offer_uid == "mover" for m in made.moves)


def test_a_move_comes_before_offers_and_its_place_is_booked_within_the_cycle() -> None:
    made = cycle([offer(hours=0.1)], moves=[move(2)], nodes=[node("n1", 2)])
    assert len(made.moves) == 1
    assert answers(made) == {"offer": ("Wait", "WaitingForCapacity")}


def test_a_job_that_starts_again_in_its_own_place_frees_nothing() -> None:
    made = cycle([offer()], moves=[move(2)], nodes=[node("n1", 2)], claims=[claim("mover", "n1", 2)])
    assert [m.assignments[0].node_name for m in made.moves] == ["n1"]
    assert answers(made) == {"offer": ("Wait", "WaitingForCapacity")}
