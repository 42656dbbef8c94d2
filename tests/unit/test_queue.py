"""Who comes first, who may borrow, and for whom GPUs are kept: offers that compete for the same room."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from core_builders import NOW, TWO_GPUS, answers, at, claim, cycle, decide, node, offer, places, policy
from taskoffer.api.base import rfc3339
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.decision.ledger import Ledger, NodeView, Release, best_fit
from taskoffer.decision.snapshot import OfferView
from taskoffer.decision.timeline import Demand, Timeline
from taskoffer.decision.verdict import Verdict

PRIORITIES = {"priorities": ["benchmark", "tournament", "organic"], "defaultPriority": "tournament"}
ALL = {"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
HOURLY = {"gpuMemory": "80G", "duration": {"startSeconds": 60, "reserveSeconds": 0}}


def deadline(hours: float) -> dict[str, str]:
    return {"deadline": rfc3339(at(hours * 3600))}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"priority_class": "organic", "model": "x/phi-4"}, {"model": "x/llama"}),
        ({"model": "x/phi-4"}, {"priority_class": "benchmark", "model": "x/llama"}),
        ({"model": "x/phi-4", "spec": deadline(5)}, {"model": "x/llama", "spec": deadline(6)}),
        ({"model": "x/phi-4", "spec": deadline(5)}, {"model": "x/llama"}),
        ({"model": "x/llama"}, {"model": "x/phi-4", "created": at(-60)}),
        ({"created": at(-60)}, {"created": at(-30)}),
        ({"uid": "a"}, {"uid": "b"}),
    ],
    ids=["priority", "default priority", "deadline", "a deadline before none", "score", "age", "uid"],
)
def test_of_two_offers_for_one_gpu_the_first_is_decided_by(first: dict[str, Any], second: dict[str, Any]) -> None:
    for names in (("one", "two"), ("two", "one")):
        queue = [offer(names[0], **first), offer(names[1], **second)]
        made = cycle(queue, policies=[policy(queue=PRIORITIES)], claims=[claim("x", count=7)])
        assert set(places(made)) == {names[0]}


def test_without_a_queue_in_the_policy_neither_deadlines_nor_priorities_count() -> None:
    pending = [offer("late", model="x/llama"), offer("early", model="x/phi-4", spec=deadline(2))]
    assert set(places(cycle(pending, claims=[claim("x", count=7)]))) == {"late"}


@pytest.mark.parametrize(("waited", "goes"), [(0, "new"), (3599, "new"), (3600, "old"), (7200, "old")])
def test_waiting_raises_an_offer_by_one_priority_per_interval(waited: int, goes: str) -> None:
    rules = policy(queue={**PRIORITIES, "raiseAfterSeconds": 3600})
    old = offer("old", model="x/phi-4", priority_class="benchmark", created=at(-waited))
    new = offer("new", model="x/phi-4", priority_class="tournament", created=at(0))
    assert set(places(cycle([new, old], policies=[rules], claims=[claim("x", count=7)]))) == {goes}


def test_waiting_raises_nobody_above_the_highest_priority() -> None:
    rules = policy(queue={**PRIORITIES, "raiseAfterSeconds": 1})
    old = offer("old", model="x/phi-4", priority_class="benchmark", created=at(-9999))
    good = offer("good", model="x/llama", priority_class="organic", created=at(-1))
    assert set(places(cycle([old, good], policies=[rules], claims=[claim("x", count=7)]))) == {"good"}


def test_the_default_priority_gives_way_to_what_a_namespace_may_ask_for() -> None:
    rules = policy(queue=PRIORITIES, namespaces=[{"name": "guests", "highestPriority": "benchmark"}])
    pending = [
        offer("gues", model="x/llama", namespace="guests", created=at(-60)),
        offer("host", model="x/phi-4"),
    ]
    assert set(places(cycle(pending, policies=[rules], claims=[claim("x", count=7)]))) == {"host"}


def test_a_namespace_gets_no_more_gpus_than_its_quota_and_others_are_not_held_up() -> None:
    rules = policy(namespaces=[{"name": "team-a", "gpus": 3}])
    pending = [offer(f"a{i}", namespace="team-a", parameters=TWO_GPUS, created=at(i)) for i in range(3)]
    pending += [offer("b", namespace="team-b", parameters=TWO_GPUS, created=at(9))]
    made = answers(cycle(pending, policies=[rules]))
    assert made["a0"] == ("Admit", "Admitted")
    assert made["a1"] == made["a2"] == ("Wait", "WaitingForQuota")
    assert made["b"] == ("Admit", "Admitted")


LANES = [
    {"name": "small", "gpus": 1, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}], "borrowFrom": ["medium"]},
    {"name": "medium", "gpus": 2, "rules": [{"sizeClasses": ["Medium"], "gpusPerTask": 2}]},
]


def lanes_of(pending: list[OfferView], **world: Any) -> dict[str, str | None]:
    made = cycle(pending, policies=[policy(lanes=LANES)], **world)
    return {
        d.offer.key.name: d.answer.admission.assignments[0].lane if d.answer.admission else d.answer.reason.value
        for d in made.decisions
    }


def test_a_lane_borrows_what_another_does_not_need() -> None:
    pending = [offer(f"s{i}", created=at(i)) for i in range(4)]
    assert lanes_of(pending) == {"s0": "small", "s1": "medium", "s2": "medium", "s3": "WaitingForLane"}


def test_a_lanes_own_offers_come_before_borrowers_whatever_their_score() -> None:
    pending = [offer(f"s{i}", model="x/llama", created=at(i)) for i in range(3)]
    pending += [offer("m", model="x/phi-4", parameters=TWO_GPUS, created=at(9))]
    assert lanes_of(pending) == {"s0": "small", "m": "medium", "s1": "WaitingForLane", "s2": "WaitingForLane"}


def test_nobody_borrows_from_a_lane_whose_own_offers_wait() -> None:
    pending = [offer("s0"), offer("s1", created=at(1)), offer("m", parameters=TWO_GPUS, created=at(2))]
    booked = [claim("x", count=1, lane="medium")]
    assert lanes_of(pending, claims=booked) == {"s0": "small", "m": "WaitingForLane", "s1": "WaitingForLane"}


KEEPING = policy(
    queue={"reserveFromGpus": 4},
    estimation=HOURLY,
    size_classes=[ALL],
    resources=[{"name": "nvidia.com/gpu", "counts": [1, 4]}],
)
LARGE = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "gpus": 4, "rows": 300_000}
"""Nearly five hours on one GPU."""


def small(name: str, rows: int, **fields: Any) -> OfferView:
    given = {"parameters": 8_030_000_000, "model": "x/phi-4", "hours": 19, "gpus": 1, "created": at(5), **fields}
    return offer(name, rows=rows, **given)


def test_a_node_is_kept_for_a_large_offer_and_lent_to_what_ends_before() -> None:
    pending = [offer("large", **LARGE), small("long", rows=300_000), small("short", rows=1000)]
    releases = [Release("x", "node-a", 2, at(3600))]
    made = cycle(pending, policies=[KEEPING], nodes=[node(gpus=4)], claims=[claim("x", count=2)], releases=releases)
    assert answers(made)["large"] == ("Wait", "WaitingForCapacity")
    assert answers(made)["long"] == ("Wait", "WaitingBehindReservation")
    assert answers(made)["short"] == ("Admit", "Admitted")
    message = next(d.answer.message for d in made.decisions if d.offer.key.name == "long")
    assert message == (
        "needs 1 x nvidia.com/gpu; node-a has them free and is kept for default/large, which needs 4 from about "
        "2026-01-31T13:00:00Z on"
    )


def test_what_a_large_offer_leaves_free_at_its_start_is_lent_to_anybody_once() -> None:
    pending = [offer("large", **LARGE), *(small(f"s{i}", rows=300_000, created=at(5 + i)) for i in range(2))]
    releases = [Release("x", "node-a", 3, at(3600))]
    made = cycle(pending, policies=[KEEPING], nodes=[node(gpus=5)], claims=[claim("x", count=3)], releases=releases)
    assert answers(made)["s0"] == ("Admit", "Admitted")
    assert answers(made)["s1"] == ("Wait", "WaitingBehindReservation")


def test_where_nothing_says_when_a_job_ends_no_node_is_kept_for_it_would_help_nobody() -> None:
    pending = [offer("large", **LARGE), small("short", rows=1000)]
    made = answers(cycle(pending, policies=[KEEPING], nodes=[node(gpus=4)], claims=[claim("x", count=2)]))
    assert made == {"large": ("Wait", "WaitingForCapacity"), "short": ("Admit", "Admitted")}


def test_no_node_is_kept_for_an_offer_that_is_gone_before_it_could_start() -> None:
    pending = [offer("large", **LARGE, expires_at=rfc3339(at(3000))), small("long", rows=300_000)]
    releases = [Release("x", "node-a", 2, at(3600))]
    made = cycle(pending, policies=[KEEPING], nodes=[node(gpus=4)], claims=[claim("x", count=2)], releases=releases)
    assert answers(made)["long"] == ("Admit", "Admitted")


def test_an_offer_that_is_refused_for_lack_of_room_keeps_nothing_from_others() -> None:
    assert KEEPING.spec is not None
    rules = policy(
        queue={"reserveFromGpus": 4},
        estimation=HOURLY,
        size_classes=[ALL],
        resources=[{"name": "nvidia.com/gpu", "counts": [1, 4]}],
        filters={"onFull": "Reject"},
    )
    pending = [offer("large", **LARGE), small("long", rows=300_000)]
    releases = [Release("x", "node-a", 2, at(3600))]
    made = answers(
        cycle(pending, policies=[rules], nodes=[node(gpus=4)], claims=[claim("x", count=2)], releases=releases)
    )
    assert made == {"large": ("Reject", "CapacityFull"), "long": ("Admit", "Admitted")}


def test_without_a_reservation_small_offers_keep_a_large_one_off() -> None:
    rules = policy(estimation=HOURLY, size_classes=[ALL])
    pending = [offer("large", **LARGE), small("long", rows=300_000)]
    made = answers(cycle(pending, policies=[rules], nodes=[node(gpus=4)], claims=[claim("x", count=2)]))
    assert made["long"] == ("Admit", "Admitted")


def test_each_large_offer_keeps_a_node_of_its_own_and_the_other_nodes_are_free() -> None:
    nodes = [node(f"n{i}", 4) for i in range(3)]
    booked = [claim(f"x{i}", f"n{i}", 1) for i in range(3)]
    pending = [offer(f"large{i}", **LARGE, created=at(i)) for i in range(2)]
    pending += [small(f"s{i}", rows=300_000, created=at(10 + i)) for i in range(4)]
    releases = [Release(f"x{i}", f"n{i}", 1, at(3600 + i)) for i in range(3)]
    made = cycle(pending, policies=[KEEPING], nodes=nodes, claims=booked, releases=releases)
    assert answers(made)["s3"] == ("Wait", "WaitingBehindReservation")
    assert len({*places(made).values()}) == 1
    assert len(places(made)) == 3


@pytest.mark.parametrize(
    ("free", "count", "wanted"),
    [
        ({"a": 4, "b": 5}, 1, "b"),
        ({"a": 4, "b": 6}, 2, "b"),
        ({"a": 8, "b": 6}, 2, "b"),
        ({"a": 3, "b": 5}, 1, "a"),
        ({"a": 4, "b": 7}, 4, "a"),
        ({"a": 4, "b": 4}, 1, "a"),
        ({"a": 8, "b": 3}, 4, "a"),
        ({"a": 8, "b": 3}, 8, "a"),
    ],
)
def test_blocks_of_four_are_kept_free(free: dict[str, int], count: int, wanted: str) -> None:
    found = best_fit([NodeView(name, gpus, True) for name, gpus in free.items()], Ledger({}, {}, {}), count)
    assert found is not None
    assert found.name == wanted


def test_free_pairs_are_kept_whole_on_nodes_whose_labels_say_that_gpus_are_paired() -> None:
    labels = {"nvlink": "pairs"}
    nodes = [node("a", 2, labels=labels), node("b", 3, labels=labels)]
    paired = policy(placement={"nvlinkPairs": {"matchLabels": labels}})
    assert places(cycle([offer("o")], nodes=nodes)) == {"o": "a"}
    assert places(cycle([offer("o")], nodes=nodes, policies=[paired])) == {"o": "b"}


FLOOR = policy(
    filters={"minScore": "0.99", "floorMinScore": "0.5"},
    task_types=[{"name": "InstructText", "accepted": True, "weight": "0.35", "successRate": "0.9", "dailyFloor": 2}],
)


def test_a_task_type_below_its_daily_floor_is_admitted_with_a_lower_score_and_says_so() -> None:
    made = decide(offer(), policies=[FLOOR], admitted_today={("lab", TaskType.INSTRUCT_TEXT): 1}).answer
    assert made.verdict is Verdict.ADMIT
    told = next(item for item in made.explanation if item.name == "ParticipationFloor")
    assert "does not exceed the policy's 0.99; admitted all the same, for fewer than 2 InstructText" in told.message


def test_a_task_type_at_its_daily_floor_needs_the_usual_score() -> None:
    made = decide(offer(), policies=[FLOOR], admitted_today={("lab", TaskType.INSTRUCT_TEXT): 2}).answer
    assert made.reason is Reason.SCORE_TOO_LOW


def test_no_more_offers_than_the_floor_wants_get_in_with_a_low_score_in_one_cycle() -> None:
    made = answers(cycle([offer(f"o{i}", created=at(i)) for i in range(4)], policies=[FLOOR]))
    assert [made[f"o{i}"][1] for i in range(4)] == ["Admitted", "Admitted", "ScoreTooLow", "ScoreTooLow"]


def test_a_floor_does_not_help_an_offer_that_is_below_its_own_score_or_refused_for_more() -> None:
    assert FLOOR.spec is not None
    types = FLOOR.spec.to_wire()["taskTypes"]
    lower = policy(filters={"minScore": "0.99", "floorMinScore": "0.98"}, task_types=types)
    assert decide(offer(), policies=[lower]).answer.reason is Reason.SCORE_TOO_LOW
    assert decide(offer(gpus=8), policies=[FLOOR]).answer.reason is Reason.GPU_COUNT_NOT_ALLOWED


FASTEST = policy(estimation=HOURLY, size_classes=[ALL], gpu_choice="EarliestEnd")
TASK = {"parameters": 8_030_000_000, "model": "x/llama", "hours": 19, "rows": 300_000}


def chosen(**world: Any) -> int | str:
    answer = decide(offer(**TASK), policies=[FASTEST], **world).answer
    return answer.admission.assignments[0].count if answer.admission else answer.reason.value


def test_the_count_that_ends_first_is_taken() -> None:
    assert chosen() == 4
    assert chosen(claims=[claim("x", count=5)]) == 2
    assert chosen(claims=[claim("x", count=8)]) == "WaitingForCapacity"


@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        (60, "WaitingForEarlierEnd"),
        (3000, "WaitingForEarlierEnd"),
        (20_000, 1),
        (-30, "WaitingForEarlierEnd"),
        (-20_000, 1),
    ],
    ids=["in a minute", "in 50 minutes", "too late to help", "overdue by a little", "overdue by hours"],
)
def test_starting_now_on_one_gpu_is_compared_with_starting_later_on_four(release: int, wanted: int | str) -> None:
    booked = {"claims": [claim("x", count=7)], "releases": [Release("x", "node-a", 7, at(release), "lab")]}
    assert chosen(**booked) == wanted


def test_an_offer_that_waits_for_an_earlier_end_is_looked_at_again_when_the_gpus_are_due() -> None:
    booked = {"claims": [claim("x", count=7)], "releases": [Release("x", "node-a", 7, at(60), "lab")]}
    assert cycle([offer(**TASK)], policies=[FASTEST], **booked).wake_at == at(60)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"expires_at": rfc3339(at(300))}, 1),
        ({"spec": {"deadline": rfc3339(at(600 + 4000))}}, "WaitingForCapacity"),
        ({"spec": {"deadline": rfc3339(at(600 + 4600))}}, "WaitingForEarlierEnd"),
        ({"spec": {"deadline": rfc3339(at(40_000))}}, "WaitingForEarlierEnd"),
    ],
    ids=["gone before the opening", "too late even then", "only in time on four", "in time anyhow"],
)
def test_nobody_waits_for_an_earlier_end_past_the_moment_in_which_it_can_start(
    fields: dict[str, Any], wanted: int | str
) -> None:
    view = offer(**TASK, **fields)
    booked = {"claims": [claim("x", count=7)], "releases": [Release("x", "node-a", 7, at(600), "lab")]}
    answer = decide(view, policies=[FASTEST], **booked).answer
    found = answer.admission.assignments[0].count if answer.admission else answer.reason.value
    assert found == wanted


def test_a_count_that_misses_the_deadline_by_now_is_left_out_while_a_larger_one_is_free() -> None:
    view = offer(**TASK, spec={"deadline": rfc3339(at(5000))})
    made = decide(view, policies=[FASTEST]).answer
    assert made.admission is not None
    assert made.admission.assignments[0].count == 4
    spare = earning(gpu_choice="MostValue", scoring={"terms": None, "expectedValue": {"spareShare": "0.75"}})
    made = decide(view, policies=[spare]).answer
    assert made.admission is not None
    assert made.admission.assignments[0].count == 4


def test_what_an_offer_waits_for_to_end_earlier_is_kept_for_it() -> None:
    rest = {"parameters": 8_030_000_000, "model": "x/phi-4", "hours": 19, "gpus": 1}
    pending = [offer("first", **TASK), offer("next", **TASK, created=at(1))]
    pending += [offer(f"s{i}", rows=300_000, created=at(5 + i), **rest) for i in range(3)]
    booked = {"claims": [claim("x", count=2)], "releases": [Release("x", "node-a", 2, at(600), "lab")]}
    made = answers(cycle(pending, policies=[FASTEST], nodes=[node(gpus=4)], **booked))
    assert made["first"] == ("Wait", "WaitingForEarlierEnd")
    assert {made[name] for name in ("next", "s0", "s1", "s2")} == {("Wait", "WaitingBehindReservation")}


@pytest.mark.parametrize("waits", [None, "WaitingBehindReservation"], ids=["it is new", "it says so already"])
def test_a_cycle_comes_when_waiting_raises_an_offer_behind_a_reservation(waits: str | None) -> None:
    rules = policy(queue={"priorities": ["low", "high"], "reserveFromGpus": 4, "raiseAfterSeconds": 500})
    large = offer("large", gpus=4, hours=19, priority_class="high", created=at(-10))
    small = offer("small", gpus=1, hours=19, priority_class="low", created=at(-100), waits=waits)
    booked = {"claims": [claim("x", count=2)], "releases": [Release("x", "node-a", 2, at(7200), "lab")]}
    made = cycle([large, small], policies=[rules], nodes=[node(gpus=4)], **booked)  # type: ignore[arg-type]
    assert answers(made).get("small", ("Wait", "WaitingBehindReservation")) == ("Wait", "WaitingBehindReservation")
    assert made.wake_at == at(400)


def test_under_a_policy_that_does_not_queue_nobody_waits_for_an_earlier_end() -> None:
    rules = policy(estimation=HOURLY, size_classes=[ALL], gpu_choice="EarliestEnd", filters={"onFull": "Reject"})
    booked = {"claims": [claim("x", count=7)], "releases": [Release("x", "node-a", 7, at(60), "lab")]}
    made = decide(offer(**TASK), policies=[rules], **booked).answer
    assert made.admission is not None
    assert made.admission.assignments[0].count == 1


@pytest.mark.parametrize(
    ("demand", "wanted"),
    [
        (Demand(1, "lab"), (0, "n2")),
        (Demand(2, "lab"), (100, "n1")),
        (Demand(4, "lab"), (300, "n1")),
        (Demand(8, "lab"), None),
        (Demand(1, "lab", lane="l", lane_gpus=2), (100, "n2")),
        (Demand(1, "lab", namespace="team", namespace_gpus=1), (300, "n2")),
        (Demand(1, "lab", slots=2), (100, "n2")),
        (Demand(1, "other", slots=1), (0, "n2")),
    ],
)
def test_when_a_demand_can_be_met_first(demand: Demand, wanted: tuple[int, str] | None) -> None:
    nodes = [NodeView("n1", 4, True), NodeView("n2", 1, True), NodeView("down", 8, False)]
    ledger = Ledger({"n1": 4}, {("lab", "l"): 2}, {"lab": {"a", "b"}}, {("lab", "team"): 1})
    releases = [
        Release("b", "n1", 2, at(300), "lab", None, "team"),
        Release("a", "n1", 2, at(100), "lab", "l", None),
    ]
    found = Timeline(NOW, ledger, releases).opening(demand, nodes)
    got = ((found.at - NOW).total_seconds(), found.node) if found is not None else None
    assert got == wanted


def test_a_job_that_is_overdue_is_expected_to_take_as_long_again() -> None:
    timeline = Timeline(NOW, Ledger({"n": 1}, {}, {}), [Release("a", "n", 1, at(-500))])
    found = timeline.opening(Demand(1, "lab"), [NodeView("n", 1, True)])
    assert found is not None
    assert found.at - NOW == timedelta(seconds=500)


EARNING = {
    "filters": {"minScore": "0"},
    "scoring": {"terms": None, "expectedValue": {"penalty": "1"}},
    "estimation": HOURLY,
    "size_classes": [ALL],
}


def earning(**fields: Any) -> Any:
    return policy(**{**EARNING, **fields})


def test_the_expected_value_is_won_with_its_probability_and_the_penalty_lost_without() -> None:
    answer = decide(offer(**{**TASK, "hours": 16}), policies=[earning()]).answer
    gain, loss = (item for item in answer.explanation if item.type == "Term")
    # 2 x sqrt(16 h x 8.03 billion) x 0.35 = 7.935; 90 % of the tasks of this type succeed, and time is no question.
    assert "1.00 in time x 0.90 success x value 7.93" in gain.message
    hours = float(gain.message.split("/ ")[1].split()[0])
    assert float(gain.value) == pytest.approx(0.9 * 7.935 / hours, rel=0.01)
    assert float(loss.value) == pytest.approx(-0.1 * 1 / hours, rel=0.01)
    assert answer.score == Decimal(gain.value) + Decimal(loss.value)


def test_what_is_likely_to_end_late_is_expected_to_cost_more_than_it_earns() -> None:
    rules = earning(filters={"minScore": "0.5"})
    enough = decide(offer(**{**TASK, "hours": 16, "gpus": 1}), policies=[rules]).answer
    tight = decide(offer(**{**TASK, "hours": 4.9, "gpus": 1}), policies=[rules]).answer
    assert enough.verdict is Verdict.ADMIT
    assert tight.reason is Reason.SCORE_TOO_LOW
    assert "0.5" in next(item.message for item in tight.explanation if item.name == "ExpectedGain")


def test_what_the_owner_says_an_offer_is_worth_counts_before_the_formula() -> None:
    pending = [offer("plain", **TASK), offer("dear", **TASK, spec={"value": "50"}, created=at(5))]
    made = cycle(pending, policies=[earning()], claims=[claim("x", count=7)])
    assert set(places(made)) == {"dear"}


@pytest.mark.parametrize(("urgency", "wanted"), [(None, "dear"), (1, "soon"), (1800, "soon"), (100_000, "dear")])
def test_with_an_urgency_an_offer_whose_wait_ends_soon_goes_before_a_dearer_one_that_can_wait(
    urgency: int | None, wanted: str
) -> None:
    pending = [
        offer("dear", **TASK, spec={"value": "20"}, expires_at=rfc3339(at(7200))),
        offer("soon", **TASK, spec={"value": "10"}, expires_at=rfc3339(at(60))),
    ]
    rules = earning(scoring={"terms": None, "expectedValue": {"urgencySeconds": urgency}})
    assert set(places(cycle(pending, policies=[rules], claims=[claim("x", count=7)]))) == {wanted}


def test_an_offer_without_an_end_goes_before_those_whose_wait_ends_later_than_eight_urgencies_after_it_came() -> None:
    rules = earning(scoring={"terms": None, "expectedValue": {"urgencySeconds": 1800}})
    for waited, wanted in ((0, "next"), (4 * 3600, "calm")):
        pending = [
            offer("calm", **TASK, created=at(-waited)),
            offer("next", **TASK, created=at(0), expires_at=rfc3339(at(3600))),
        ]
        assert set(places(cycle(pending, policies=[rules], claims=[claim("x", count=7)]))) == {wanted}


def test_an_expected_loss_is_shown_as_a_floor_so_that_the_terms_sum_to_the_score() -> None:
    answer = decide(offer(**TASK, spec={"value": "0.01"}), policies=[earning()]).answer
    terms = {item.name: Decimal(item.value) for item in answer.explanation if item.type == "Term"}
    assert answer.reason is Reason.SCORE_TOO_LOW
    assert terms["Floor"] > 0
    assert sum(terms.values()) == answer.score == 0


@pytest.mark.parametrize(("hours", "count"), [(16, 1), (4, 2), (2.6, 4)])
def test_the_count_of_the_highest_expected_value_is_taken(hours: float, count: int) -> None:
    made = decide(offer(**{**TASK, "hours": hours}), policies=[earning(gpu_choice="MostValue")]).answer
    assert made.admission is not None
    assert made.admission.assignments[0].count == count


@pytest.mark.parametrize(
    ("booked", "others", "count"), [(0, 0, 4), (4, 0, 2), (0, 2, 4), (0, 5, 2), (0, 6, 1), (6, 1, 1), (7, 0, 1)]
)
def test_what_nobody_waits_for_goes_on_top_of_the_count_of_the_highest_value(
    booked: int, others: int, count: int
) -> None:
    scoring = {"terms": None, "expectedValue": {"spareShare": "0.75"}}
    rules = earning(gpu_choice="MostValue", scoring=scoring)
    pending = [offer("best", **TASK, spec={"value": "90"})]
    pending += [offer(f"o{i}", **TASK, created=at(i)) for i in range(others)]
    made = cycle(pending, policies=[rules], claims=[claim("x", count=booked)] if booked else [])
    best = next(d for d in made.decisions if d.offer.key.name == "best")
    assert best.answer.admission is not None
    assert best.answer.admission.assignments[0].count == count
    duration = next(item for item in best.answer.explanation if item.name == "Duration")
    assert f"on {count} GPU(s)" in duration.message


def test_a_table_replaces_a_terms_definition() -> None:
    table = [{"below": "2", "value": "1"}, {"below": "10", "value": "0.5"}, {"value": "0.25"}]
    terms = [{"name": name, "weight": "1", "table": table} for name in ("TimeEfficiency", "SizeEfficiency", "Bonus")]
    rules = policy(scoring={"terms": terms}, filters={"minScore": None})
    answer = decide(offer(hours=10, parameters=2_000_000_000, gpus=1), policies=[rules]).answer
    values = {item.name: item.value for item in answer.explanation if item.type == "Term"}
    assert values == {"TimeEfficiency": "0.2500", "SizeEfficiency": "0.5000", "Bonus": "1.0000"}


def test_odd_numbers_of_a_policy_make_odd_scores_and_stop_no_cycle() -> None:
    scoring = {"terms": None, "expectedValue": {"factor": "99999999", "penalty": "99999999"}}
    kind = {"name": "InstructText", "accepted": True, "weight": "99999999", "successRate": "0.9"}
    rules = earning(scoring=scoring, task_types=[kind])
    answer = decide(offer(**{**TASK, "rows": 1}), policies=[rules]).answer
    assert answer.score is not None
    assert sum(Decimal(item.value) for item in answer.explanation if item.type == "Term") == answer.score
