"""Traces that are small enough to work out by hand, and what must hold in every trace."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_builders import FOUR_GPUS, HIGH_TAKES, ONE_GPU, TWO_GPUS, policy_spec, spec_of
from simulation_builders import POLICY, entry, refusals, run_of, timeline, trace_of
from taskoffer import presets
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.prediction import predict
from taskoffer.simulation.engine import Fleet, Result, simulate
from taskoffer.simulation.market import generate
from taskoffer.simulation.trace import Trace, TraceOffer, Truth
from taskoffer.simulation.truth import again_of, duration_of, expiry_of, measured_after, settings_under, tasks_of

H100 = policy_spec(preset="strategy-8xh100")
SIZES = presets.load("market-table")["spec"]["sizeClasses"]
LLAMA = {"model": "meta-llama/Llama-3.1-8B", "parameters": 8_030_000_000}


def test_offers_queue_until_a_job_really_ends_and_expire_while_they_wait() -> None:
    result = run_of(
        entry("first", at=0, gpus=4, seconds=1000),
        entry("second", at=10, gpus=4, seconds=500),
        entry("impatient", at=20, gpus=4, seconds=500, patience=900),
    )
    assert timeline(result) == {"first": (0, 1000, "InTime"), "second": (1000, 1500, "InTime")}
    assert refusals(result) == {"impatient": "Expired"}
    assert (result.seconds, result.busy, result.idle) == pytest.approx((1500, 6000, 0))


def test_an_offer_whose_time_is_up_at_the_moment_a_gpu_comes_free_is_gone() -> None:
    result = run_of(
        entry("first", gpus=4, seconds=1000),
        entry("just-too-late", at=100, gpus=4, patience=900),
        entry("just-in-time", at=100, gpus=4, patience=900.5),
    )
    assert timeline(result)["just-in-time"][0] == 1000
    assert refusals(result) == {"just-too-late": "Expired"}


def test_the_better_score_goes_first_whoever_came_before() -> None:
    result = run_of(
        entry("running", gpus=4, seconds=100),
        entry("worse", at=10, gpus=4, seconds=100, model="microsoft/phi-4"),
        entry("better", at=20, gpus=4, seconds=100),
    )
    assert [run.name for run in result.runs] == ["running", "better", "worse"]


def test_a_small_offer_runs_beside_the_one_that_waits_for_more() -> None:
    result = run_of(
        entry("half", gpus=2, seconds=1000), entry("whole", at=1, gpus=4), entry("rest", at=2, gpus=2, seconds=3000)
    )
    assert timeline(result) == {
        "half": (0, 1000, "InTime"),
        "rest": (2, 3002, "InTime"),
        "whole": (3002, 4002, "InTime"),
    }


def test_a_job_that_is_not_done_at_its_limit_is_stopped_and_earns_nothing() -> None:
    result = run_of(
        entry("slow", gpus=4, seconds=4000, worth=7, hours=1),
        entry("next", at=5, gpus=4, seconds=3600, worth=3, hours=1),
    )
    # The clock of the second one begins with its admission, so that its queueing does not count.
    assert timeline(result) == {"slow": (0, 3600, "Late"), "next": (3600, 7200, "InTime")}
    assert [run.worth for run in result.runs] == [0, 3]


def test_a_training_clock_does_not_count_the_start() -> None:
    training = {"hours": 1, "spec": {"clockMode": "Training"}}
    # Of a tiny model's time nearly all is the start.
    assert timeline(run_of(entry("a", seconds=3700, **training))) == {"a": (0, 3700, "InTime")}
    assert timeline(run_of(entry("a", seconds=3700, hours=1))) == {"a": (0, 3600, "Late")}


def test_a_deadline_ends_a_job_before_its_limit_does() -> None:
    due = {"spec": {"deadline": "2026-01-01T00:20:00Z"}}
    result = run_of(entry("busy", gpus=4, seconds=600), entry("due", at=1, gpus=4, seconds=1000, **due))
    assert timeline(result)["due"] == (600, 1200, "Late")


def test_a_failed_job_frees_its_gpus_when_it_fails() -> None:
    result = run_of(entry("fails", gpus=4, seconds=1000, fails_after=0.25), entry("next", at=1, gpus=4, seconds=100))
    assert timeline(result) == {"fails": (0, 250, "Failed"), "next": (250, 350, "InTime")}
    assert result.runs[0].worth == 0


def test_a_model_that_no_gpu_holds_fails_once_it_is_loaded() -> None:
    big = entry("big", gpus=4, seconds=1000, model="meta-llama/Llama-3.1-70B", parameters=70_554_000_000)
    assert timeline(run_of(big)) == {"big": (0, round(300 * big.truth.factor), "Failed")}


def test_a_refusal_is_counted_under_its_reason_and_holds_nothing() -> None:
    result = run_of(entry("unknown", model="tiiuae/falcon-7b"), entry("long", hours=21), entry("fine"))
    assert refusals(result) == {"unknown": "ModelFamilyNotAccepted", "long": "TimeLimitTooLong"}
    assert [run.name for run in result.runs] == ["fine"]


@pytest.mark.parametrize("kind", ["InstructText", "Chat", "DPO", "GRPO", "Image"])
def test_every_task_type_is_trained(kind: str) -> None:
    assert [run.outcome for run in run_of(entry("a", task_type=kind)).runs] == ["InTime"]


def test_what_never_fits_waits_for_ever_unless_it_expires() -> None:
    result = run_of(
        entry("patient", gpus=4), entry("impatient", gpus=4, patience=60), entry("paused", active=False), gpus=2
    )
    assert {name: reason.value for name, reason in result.waiting.items()} == {
        "patient": "WaitingForCapacity",
        "paused": "Suspended",
    }
    assert refusals(result) == {"impatient": "Expired"}


def test_a_policy_that_does_not_queue_refuses_what_finds_no_room() -> None:
    policy = policy_spec(filters={"onFull": "Reject"})
    result = run_of(entry("a", gpus=4), entry("b", at=1, gpus=4), policy=policy)
    assert refusals(result) == {"b": "CapacityFull"}


def test_only_one_offer_of_a_task_is_accepted() -> None:
    result = run_of(entry("a", at=1, task_id="same"), entry("b", at=0, task_id="same"))
    assert [run.name for run in result.runs] == ["b"]
    assert refusals(result) == {"a": "DuplicateTask"}


def test_job_slots_hold_back_what_would_fit() -> None:
    policy = policy_spec(filters={"maxConcurrentJobs": 1})
    result = run_of(entry("a", seconds=100), entry("b", at=1, seconds=100), policy=policy)
    assert timeline(result) == {"a": (0, 100, "InTime"), "b": (100, 200, "InTime")}


def test_the_end_of_a_policys_own_patience_wakes_the_cycle() -> None:
    policy = policy_spec(filters={"offerTtlSeconds": 50})
    result = run_of(entry("a", gpus=4, seconds=100), entry("b", at=1, gpus=4, seconds=100), policy=policy)
    assert refusals(result) == {"b": "Expired"}


def test_nodes_fill_one_after_the_other_so_that_whole_ones_stay() -> None:
    offers = [
        entry("a", gpus=2),
        entry("b", at=1, gpus=2),
        entry("c", at=2, gpus=4),
        entry("d", at=3, gpus=1, seconds=10),
    ]
    result = run_of(*offers, nodes=2)
    assert {run.name: run.node for run in result.runs} == {"a": "node-1", "b": "node-1", "c": "node-2", "d": "node-1"}
    assert timeline(result)["d"] == (1000, 1010, "InTime")


def test_the_nodes_carry_the_labels_that_the_policy_selects_by() -> None:
    assert H100.node_selector.match_labels
    result = simulate(trace_of(entry("a", policy=H100, gpus=2, **LLAMA)), H100)
    assert [run.outcome for run in result.runs] == ["InTime"]


def test_the_higher_priority_class_goes_first() -> None:
    policy = policy_spec(queue={"priorities": ["benchmark", "organic"]})
    result = run_of(
        entry("running", gpus=4, seconds=100),
        entry("benchmark", at=10, gpus=4, priority_class="benchmark"),
        entry("organic", at=20, gpus=4, priority_class="organic"),
        policy=policy,
    )
    assert [run.name for run in result.runs] == ["running", "organic", "benchmark"]


def test_a_large_offer_keeps_its_node_from_what_would_end_after_it_could_start() -> None:
    # Without a prediction a job is taken to hold its GPUs for its time limit: until 3600, when all of them are free.
    policy = policy_spec(queue={"reserveFromGpus": 4})
    offers = [
        entry("half", gpus=2, seconds=1000, hours=1),
        entry("whole", at=1, gpus=4),
        entry("long", at=2, gpus=2, seconds=3000, hours=1.5),
        entry("short", at=3, gpus=2, seconds=500, hours=0.5),
    ]
    assert timeline(run_of(*offers, policy=policy)) == {
        "half": (0, 1000, "InTime"),
        "short": (3, 503, "InTime"),
        "whole": (1000, 2000, "InTime"),
        "long": (2000, 5000, "InTime"),
    }


@pytest.mark.parametrize("value", ["600", "60000"])
def test_under_expected_value_an_offer_of_eight_gpus_does_not_wait_until_the_small_ones_run_out(value: str) -> None:
    # Twelve hours of one-GPU tasks, each of which is gone after two and so could have others stopped.
    text = {"model": "x/llama", "parameters": 8_030_000_000, "hours": 6}
    small = [
        TraceOffer(
            f"s{n}", max(0, n - 8) * 480.0, spec_of(task_id=f"s{n}", rows=40_000 + n * 7919 % 40_000, **text), 7200
        )
        for n in range(98)
    ]
    whole = {"model": "x/llama", "parameters": 70_000_000_000, "hours": 30, "rows": 20_000, "gpus": 8}
    large = TraceOffer("large", 1.0, spec_of(task_id="large", spec={"value": value}, **whole))
    result = simulate(trace_of(large, *small), policy_spec(preset="expected-value"))
    (found,) = [run for run in result.runs if run.name == "large"]
    assert (found.gpus, found.outcome) == (8, "InTime")
    assert found.start < 3 * 3600


def test_a_namespace_holds_no_more_than_it_may() -> None:
    policy = policy_spec(namespaces=[{"name": "team", "gpus": 2}])
    offers = [entry(f"team/{name}", task_id=name, gpus=2, seconds=100) for name in "ab"]
    result = run_of(*offers, entry("other", gpus=2, seconds=50), policy=policy)
    assert timeline(result) == {
        "team/a": (0, 100, "InTime"),
        "other": (0, 50, "InTime"),
        "team/b": (100, 200, "InTime"),
    }


def test_the_daily_floor_counts_admissions_of_the_last_24_hours() -> None:
    types = [{"name": "InstructText", "accepted": True, "weight": "0", "successRate": "0", "dailyFloor": 1}]
    policy = policy_spec(task_types=types, filters={"minScore": "0.9", "floorMinScore": "0.1"})
    offers = [entry("first"), entry("second", at=86_000), entry("third", at=86_500)]
    result = run_of(*offers, policy=policy)
    assert [run.name for run in result.runs] == ["first", "third"]
    assert refusals(result) == {"second": "ScoreTooLow"}


def test_a_shared_gpu_runs_several_tasks_each_at_its_share_of_the_speed() -> None:
    parts = [{"name": "nvidia.com/gpu.shared", "counts": [1], "unitsPerGpu": 4}]
    policy = policy_spec(preset="market-table", resources=parts, size_classes=[{**SIZES[0], "maxParameters": None}])
    small = {"model": "Qwen/Qwen2.5-0.5B", "parameters": 494_000_000, "rows": 100_000, "policy": policy, "hours": 5}
    offers = [entry(name, seconds=2000, gpus=1, **small) for name in "abcde"]
    result = run_of(*offers, gpus=1, policy=policy)
    whole, start = 2000, 300 * offers[0].truth.factor
    shared = result.runs[0].end
    # The reference speed is cut to whole teraflops: 247 of 989.
    assert shared == pytest.approx(start + (whole - start) * 989 / 247)
    assert [run.start for run in result.runs] == pytest.approx([0, 0, 0, 0, shared])
    assert result.busy == pytest.approx(5 * shared / 4)


def test_the_policy_that_an_offer_names_does_not_count() -> None:
    assert timeline(run_of(entry("a", policy=POLICY, spec={"policyName": "another"}))) == {"a": (0, 1000, "InTime")}


def test_the_real_time_is_the_predicted_one_times_the_factor() -> None:
    (offer,) = trace_of(entry("a", policy=H100, gpus=2, **LLAMA)).offers
    found = predict(offer.spec, H100, 2)
    assert found is not None
    assert found.finish is not None
    assert duration_of(offer, found.fit.effective, 2) == pytest.approx(found.finish.seconds * offer.truth.factor)


def test_a_trace_without_offers_has_no_runs() -> None:
    result = simulate(trace_of(seconds=3600), POLICY)
    assert (result.runs, result.refusals, result.waiting) == ((), {}, {})
    assert (result.busy, result.idle) == (0, 8 * 3600)


# What is known in hindsight


def test_a_task_is_what_can_be_done_in_time_with_the_gpus_that_do_it() -> None:
    offer = entry("a", at=5, gpus=2, seconds=5400, hours=2, patience=60, worth=2, rows=100_000, policy=H100, **LLAMA)
    (task,) = tasks_of(trace_of(offer), H100)
    assert (task.name, task.arrival, task.last_start, task.worth) == ("a", 5, 65, 2)
    # Training takes half as long on twice the GPUs, starting takes as long; one GPU is too slow for two hours.
    start = 300 * offer.truth.factor
    expected = {gpus: start + (5400 - start) * 2 / gpus for gpus in (2, 4, 8)}
    assert task.seconds_by_gpus == pytest.approx(expected)
    assert start + (5400 - start) * 2 > 7200


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"seconds": 3600}, [1, 2, 4, 8]),
        ({"seconds": 3700}, []),
        ({"seconds": 3600, "fails_after": 0.5}, []),
        ({"seconds": 3600, "model": "meta-llama/Llama-3.1-70B", "parameters": 70_554_000_000}, [8]),
        ({"seconds": 3600, "model": "meta-llama/Llama-3.1-405B", "parameters": 405_000_000_000}, []),
    ],
)
def test_what_fails_or_comes_too_late_in_any_case_is_no_task(fields: dict[str, float], counts: list[int]) -> None:
    tasks = tasks_of(trace_of(entry("a", hours=1, **fields)), POLICY)
    assert [gpus for task in tasks for gpus in task.seconds_by_gpus] == counts


def test_a_task_with_a_deadline_starts_early_enough_for_it() -> None:
    (task,) = tasks_of(trace_of(entry("a", seconds=1000, spec={"deadline": "2026-01-01T01:00:00Z"})), POLICY)
    assert task.deadline == 3600
    assert {task.last_start_on(gpus) + seconds for gpus, seconds in task.seconds_by_gpus.items()} == {3600}


# What must hold in every trace

fast = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
entries = st.builds(
    entry,
    st.just("x"),
    at=st.integers(0, 3000).map(float),
    seconds=st.sampled_from([100.0, 900.0, 3599.0, 3700.0, 8000.0]),
    gpus=st.sampled_from([1, 2, 4]),
    patience=st.sampled_from([None, 1.0, 600.0, 5000.0]),
    fails_after=st.sampled_from([None, None, 0.0, 0.5]),
    parameters=st.sampled_from([ONE_GPU, TWO_GPUS, FOUR_GPUS]),
    model=st.sampled_from(["x/llama", "x/phi-4", "x/falcon"]),
    task_id=st.sampled_from([f"t{n}" for n in range(12)]),
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    offers = draw(st.lists(entries, max_size=12))
    return trace_of(*(replace(offer, name=f"o{number}") for number, offer in enumerate(offers)))


def check(trace: Trace, result: Result, fleet: Fleet) -> None:
    """Fail unless the result is one that can have been."""
    by_name = {offer.name: offer for offer in trace.offers}
    names = [run.name for run in result.runs] + [*result.refusals] + [*result.waiting]
    assert sorted(names) == sorted(by_name)
    changes = defaultdict(list)
    for run in result.runs:
        offer = by_name[run.name]
        expiry = expiry_of(offer)
        assert run.start >= offer.at
        assert expiry is None or run.start < expiry
        assert run.end - run.start <= offer.spec.time_limit_seconds + 1e-6
        assert run.worth == (offer.worth if run.outcome == "InTime" else 0)
        assert (run.parts[0].start, run.parts[-1].end) == (run.start, run.end)
        for part in run.parts:
            if part.start < part.end:
                changes[part.node] += [(part.end, -run.gpus), (part.start, run.gpus)]
    for node in changes.values():
        booked = 0
        for _, change in sorted(node):
            booked += change
            assert 0 <= booked <= fleet.gpus
    assert len(changes) <= fleet.nodes
    assert result.idle >= -1e-6


@fast
@given(traces(), st.integers(1, 2), st.sampled_from([1, 4]), st.sampled_from(["Wait", "Reject"]))
def test_no_node_is_overbooked_and_every_offer_comes_to_one_end(trace: Trace, nodes: int, gpus: int, full: str) -> None:
    fleet = Fleet(nodes, gpus)
    check(trace, simulate(trace, policy_spec(filters={"onFull": full}), fleet=fleet), fleet)


@pytest.mark.parametrize("load", [0.5, 2])
@pytest.mark.parametrize("preset", presets.names())
def test_a_drawn_trace_keeps_the_books_and_hindsight_knows_every_job_that_was_done(preset: str, load: float) -> None:
    trace, fleet, policy = generate(3, load, 300), Fleet(), policy_spec(preset=preset)
    result = simulate(trace, policy, fleet=fleet)
    check(trace, result, fleet)
    tasks = {task.name: task for task in tasks_of(trace, policy)}
    offers = {offer.name: offer for offer in trace.offers}
    done = [run for run in result.runs if run.outcome == "InTime"]
    assert len(done) > 10
    for run in done:
        again = len(run.stretches) - 1 if run.stretches else 0
        seconds = tasks[run.name].seconds_by_gpus[run.gpus] + again * again_of(offers[run.name])
        assert run.seconds == pytest.approx(seconds)
        assert tasks[run.name].arrival <= run.start <= tasks[run.name].last_start_on(run.gpus)


def test_the_same_trace_gives_the_same_result() -> None:
    trace = generate(1, 1, 200)
    assert simulate(trace, H100) == simulate(trace, H100)


def test_settings_without_a_policy_are_the_reference_ones() -> None:
    (offer,) = trace_of(entry("a")).offers
    assert settings_under(None, offer.spec, 1).lora.r == 128
    with pytest.raises(ValueError, match="the policy has no settings for Chat"):
        settings_under(
            policy_spec(task_types=[{"name": "GRPO", "accepted": True, "weight": "1", "successRate": "1"}]),
            entry("chat", task_type="Chat").spec,
            1,
        )


PREEMPTING = policy_spec(
    queue={"priorities": ["low", "high"]},
    preemption={**HIGH_TAKES, "minRunSeconds": 100, "resumeSeconds": 50},
    estimation={"gpuMemory": "80G", "duration": {"startSeconds": 1, "reserveSeconds": 0}},
)


def test_a_job_stops_for_a_higher_priority_goes_on_after_it_and_pays_for_its_next_start() -> None:
    low = entry("low", gpus=4, seconds=1000, policy=PREEMPTING, priority_class="low")
    high = entry("high", at=400, gpus=4, seconds=500, policy=PREEMPTING, priority_class="high")
    result = run_of(low, high, policy=PREEMPTING)
    again = again_of(low)
    found = {run.name: run for run in result.runs}
    parts = [(round(part.start), round(part.end)) for part in found["low"].parts]
    # A cycle comes a second after the stop.
    assert parts == [(0, 400), (901, round(901 + 600 + again))]
    assert (found["low"].outcome, found["low"].worth) == ("InTime", 1.0)
    assert timeline(result)["high"] == (401, 901, "InTime")
    assert result.busy == pytest.approx(4 * (1000 + again + 500))


def test_a_job_stops_only_once_it_has_run_for_long_enough() -> None:
    low = entry("low", gpus=4, seconds=1000, policy=PREEMPTING, priority_class="low")
    high = entry("high", at=30, gpus=4, seconds=500, policy=PREEMPTING, priority_class="high")
    assert timeline(run_of(low, high, policy=PREEMPTING))["high"][:2] == (101, 601)


def test_a_stopped_job_that_gets_no_gpus_before_its_deadline_is_late() -> None:
    low = entry("low", gpus=4, seconds=1000, policy=PREEMPTING, priority_class="low", hours=1)
    crowd = [
        entry(f"high-{n}", at=400, gpus=4, seconds=900, policy=PREEMPTING, priority_class="high") for n in range(5)
    ]
    result = run_of(low, *crowd, policy=PREEMPTING)
    stopped = next(run for run in result.runs if run.name == "low")
    assert (stopped.outcome, stopped.worth) == ("Late", 0.0)
    assert [(round(part.start), round(part.end)) for part in stopped.parts] == [(0, 400)]


WAITING_PAYS = policy_spec(
    gpu_choice="EarliestEnd",
    size_classes=[
        {"name": "All", "minParameters": 0, "gpus": 2, "sizeEfficiency": "1", "lora": {}, "train": {"maxLength": 2048}}
    ],
    estimation={"gpuMemory": "80G", "duration": {"startSeconds": 1, "reserveSeconds": 0}},
)


@pytest.mark.parametrize(("arrives", "starts", "gpus"), [(0.2, 0.2, 2), (0.6, 1.0, 4)], ids=["before", "after"])
def test_the_end_that_a_trainer_tells_counts_once_it_has_measured_its_steps(
    arrives: float, starts: float, gpus: int
) -> None:
    """A job on half of the GPUs takes a tenth of what is predicted. For an offer of its size its end is near enough
    to be waited for, as it is told, and too far away as it is predicted."""
    fields = {"policy": WAITING_PAYS, "parameters": 8_030_000_000, "hours": 6, "rows": 20_000}
    as_predicted = entry("first", gpus=2, **fields)
    seconds = 0.1 * duration_of(replace(as_predicted, truth=Truth()), settings_of(as_predicted), 2)
    first = entry("first", gpus=2, seconds=seconds, **fields)
    assert 0.2 * seconds < measured_after(first, seconds) < 0.6 * seconds
    second = entry("second", at=arrives * seconds, gpus=4, **fields)
    second = replace(second, spec=second.spec.model_copy(update={"gpu_count": None}))
    run = next(run for run in run_of(first, second, policy=WAITING_PAYS).runs if run.name == "second")
    assert (run.start, run.gpus) == (pytest.approx(starts * seconds, abs=0.01), gpus)


def settings_of(offer: TraceOffer) -> Settings:
    return settings_under(WAITING_PAYS, offer.spec, 2)
