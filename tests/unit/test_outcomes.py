"""What is learned from finished jobs, by numbers that were worked out by hand, and what counts as an outcome at all."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core_builders import at, offer, policy, policy_spec, snapshot, spec_of
from finished_jobs import finished, job
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.decision.evaluate import evaluate
from taskoffer.decision.explain import explain
from taskoffer.decision.outcomes import (
    FAILURES,
    NOTHING,
    UNKNOWN,
    Estimate,
    Kind,
    Learned,
    Outcome,
    estimate,
    group_of,
    outcome_of,
)
from taskoffer.decision.prediction import predict

KIND = Kind(TaskType.INSTRUCT_TEXT, "Llama", "Small", 1)


def outcome(
    number: int = 0, success: bool | None = None, duration: float | None = None, memory: float | None = None
) -> Outcome:
    """Return an outcome; durations and peaks are given as ratios."""
    logs = [None if ratio is None else math.log(ratio) for ratio in (duration, memory)]
    return Outcome(f"u{number:03}", "lab", KIND, at(number), success, *logs)


def learning(strength: str = "10", newest: int = 50) -> Learning:
    return Learning(prior_strength=strength, newest=newest)


# The estimator

RATES: list[tuple[str, str, int, int, str]] = [
    # prior, k, successes, failures, posterior
    ("0.90", "10", 0, 0, "0.90"),
    ("0.90", "10", 1, 0, "0.9091"),  # 10 / 11
    ("0.90", "10", 0, 1, "0.8182"),  # 9 / 11
    ("0.90", "10", 0, 10, "0.4500"),  # 9 / 20
    ("0.90", "10", 10, 0, "0.9500"),  # 19 / 20
    ("0.80", "5", 3, 2, "0.7000"),  # (4 + 3) / 10
    ("0.50", "0.5", 0, 2, "0.1000"),  # 0.25 / 2.5
]


@pytest.mark.parametrize(("prior", "strength", "successes", "failures", "rate"), RATES)
def test_the_success_rate_is_the_mean_of_prior_and_outcomes(
    prior: str, strength: str, successes: int, failures: int, rate: str
) -> None:
    seen = [outcome(n, n < successes) for n in range(successes + failures)]
    found = estimate(seen, learning(strength))
    assert (found.judged, found.successes) == (successes + failures, successes)
    assert str(Learned(Decimal(strength)).success_rate(found, Decimal(prior))) == rate


FACTORS: list[tuple[str, list[float], str]] = [
    ("8", [], "1"),
    ("8", [1.25] * 8, "1.12"),  # sqrt(1.25) = 1.1180
    ("1", [2.0], "1.41"),  # sqrt(2)
    ("1", [2.0, 0.5], "1.00"),  # they cancel out
    ("2", [4.0, 4.0], "2.00"),  # 16 ** (1/4)
    ("1", [0.25], "0.50"),
    ("1", [1000.0], "3.16"),  # taken as 10: sqrt(10)
]


@pytest.mark.parametrize(("strength", "ratios", "factor"), FACTORS)
def test_the_duration_factor_is_a_geometric_mean_drawn_towards_one(
    strength: str, ratios: list[float], factor: str
) -> None:
    jobs = [finished(f"j{n}", training=round(ratio * 4000), predicted=4000) for n, ratio in enumerate(ratios)]
    found = estimate([made for raw in jobs if (made := outcome_of(job(raw)))], learning(strength))
    assert (found.durations, str(found.duration_factor)) == (len(ratios), factor)


@pytest.mark.parametrize(("ratio", "factor"), [(1.21, "1.10"), (0.5, "1")])
def test_a_peak_below_the_prediction_does_not_lower_it(ratio: float, factor: str) -> None:
    found = estimate([outcome(n, memory=ratio) for n in range(10)], learning("10"))
    assert (found.memories, str(found.memory_factor)) == (10, factor)


def test_only_the_newest_outcomes_count() -> None:
    old = [outcome(n, False, 4.0) for n in range(20)]
    new = [outcome(n, True, 1.0) for n in range(20, 23)]
    found = estimate([*old, *new], learning("1", newest=3))
    assert (found.judged, found.successes, found.durations, found.duration_factor) == (3, 3, 3, Decimal("1.00"))


RATIOS = st.floats(0.1, 10)
SEEN = st.lists(st.tuples(st.none() | st.booleans(), st.none() | RATIOS, st.none() | RATIOS), max_size=30)


@given(SEEN, st.decimals("0", "1", places=2), st.decimals("0.1", "50", places=1))
def test_the_estimates_lie_between_what_was_assumed_and_what_was_seen(
    seen: list[tuple[bool | None, float | None, float | None]], prior: Decimal, strength: Decimal
) -> None:
    found = estimate([outcome(n, *one) for n, one in enumerate(seen)], learning(str(strength)))
    rate = Learned(strength).success_rate(found, prior)
    judged = [success for success, _, _ in seen if success is not None]
    share = sum(judged) / len(judged) if judged else float(prior)
    assert min(float(prior), share) - 1e-4 <= rate <= max(float(prior), share) + 1e-4
    ratios = [ratio for _, ratio, _ in seen if ratio is not None]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
    assert min(1.0, mean) - 0.01 <= found.duration_factor <= max(1.0, mean) + 0.01
    assert found.memory_factor >= 1


@given(SEEN, st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_order_in_which_outcomes_come_in_does_not_matter(
    seen: list[tuple[bool | None, float | None, float | None]], newest: int, chance: random.Random
) -> None:
    outcomes = [outcome(n // 2, *one) for n, one in enumerate(seen)]
    outcomes = [replace(one, uid=f"u{number}") for number, one in enumerate(outcomes)]
    expected = estimate(outcomes, learning(newest=newest))
    chance.shuffle(outcomes)
    assert estimate(outcomes, learning(newest=newest)) == expected


@given(st.decimals("0", "1", places=6), st.decimals("0.1", "99", places=6))
def test_without_outcomes_the_policys_word_stands_to_the_last_digit(prior: Decimal, strength: Decimal) -> None:
    assert estimate([], learning(str(strength))) == UNKNOWN
    assert str(Learned(strength).success_rate(UNKNOWN, prior)) == str(prior)


def test_a_prior_that_weighs_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be above 0, or a single failure"):
        Learning(prior_strength="0")


# What is an outcome

ENDS: list[tuple[str, dict[str, Any], bool | None]] = [
    ("trained and verified", {}, True),
    ("data that cannot be read", {"reason": "Failed", "exit_code": 65}, False),
    ("a result that fails its check", {"reason": "Failed", "exit_code": 74}, False),
    ("out of memory to the end", {"reason": "AttemptsExhausted", "exit_code": 137}, False),
    ("gradients that are not finite to the end", {"reason": "AttemptsExhausted", "exit_code": 138}, False),
    ("too slow for its deadline", {"reason": "DeadlineExceeded", "outcome": "Stopped"}, False),
    ("cancelled", {"reason": "Cancelled", "outcome": "Stopped"}, None),
    ("its last node was lost", {"reason": "AttemptsExhausted", "outcome": "NodeLost"}, None),
    ("it never started", {"reason": "AttemptsExhausted", "outcome": "StartTimeout"}, None),
    ("stopped by somebody to the end", {"reason": "AttemptsExhausted", "outcome": "Stopped", "exit_code": 143}, None),
    ("a lost node ate the time", {"reason": "DeadlineExceeded", "outcome": "NodeLost"}, None),
    ("its admission could not be read", {"reason": "InvalidOffer", "outcome": "Stopped"}, None),
    ("the policy changed", {"reason": "PolicyChanged"}, None),
    ("a reason of a later version", {"reason": "SomethingNew"}, None),
]


@pytest.mark.parametrize(("fields", "success"), [end[1:] for end in ENDS], ids=[end[0] for end in ENDS])
def test_only_ends_that_say_something_of_the_task_are_judged(fields: dict[str, Any], success: bool | None) -> None:
    found = outcome_of(job(success=not fields, **fields))
    assert found is not None
    assert found.success is success


def test_a_best_adapter_so_far_that_was_handed_over_is_neither_a_success_nor_a_failure() -> None:
    early = {"reason": "AttemptsExhausted", "message": "attempt 3 ran out of memory"}
    found = outcome_of(job(finished(), status={"earlyEnd": early}))
    assert found is not None
    assert found.success is None


def test_a_pod_that_somebody_removed_is_no_failure_of_its_task() -> None:
    wire = finished(success=False, reason="AttemptsExhausted")
    del wire["status"]["attempts"][0]["exitCode"]
    found = outcome_of(job(wire))
    assert found is not None
    assert found.success is None


def test_a_deadline_that_passed_before_the_container_ran_is_no_failure_of_the_task() -> None:
    wire = finished(success=False, reason="DeadlineExceeded", outcome="Stopped")
    del wire["status"]["attempts"][0]["startedAt"]
    found = outcome_of(job(wire))
    assert found is not None
    assert found.success is None


def test_no_reason_of_a_decision_or_of_the_cluster_counts_as_a_failure() -> None:
    assert set(FAILURES) == {Reason.FAILED, Reason.ATTEMPTS_EXHAUSTED, Reason.DEADLINE_EXCEEDED}
    assert all(FAILURES.values())


TIMES: list[tuple[str, dict[str, Any], float | None]] = [
    ("the whole training", {"training": 1200, "predicted": 1000}, 1.2),
    ("half of it, against half of the prediction", {"training": 600, "predicted": 1000, "share": "0.5"}, 1.2),
    ("too short a part", {"training": 100, "predicted": 1000, "share": "0.49"}, None),
    ("nothing was predicted", {"training": 1200}, None),
    ("nothing was measured", {"predicted": 1000}, None),
    ("it took no second", {"training": 0, "predicted": 1000}, None),
]


@pytest.mark.parametrize(("fields", "ratio"), [time[1:] for time in TIMES], ids=[time[0] for time in TIMES])
def test_times_are_compared_for_the_same_share_of_the_work(fields: dict[str, Any], ratio: float | None) -> None:
    found = outcome_of(job(**fields))
    assert found is not None
    assert found.duration == (None if ratio is None else pytest.approx(math.log(ratio)))


def test_the_kind_comes_from_the_job_itself() -> None:
    found = outcome_of(job(gpus=4, taskType="DPO", family=None, size="Large", peak=12, predicted_peak=10))
    assert found is not None
    assert (found.policy, found.kind) == ("lab", Kind(TaskType.DPO, "", "Large", 4))
    assert found.memory == pytest.approx(math.log(1.2))


def test_a_job_that_runs_or_does_not_know_its_kind_is_no_outcome() -> None:
    assert outcome_of(job(size=None)) is None
    running = finished()
    running["status"]["conditions"] = []
    assert outcome_of(job(running)) is None


# What it changes

PREDICTING = {"gpuMemory": "80G", "duration": {"startSeconds": 300, "reserveSeconds": 0}}
LLAMA = {"model": "meta-llama/Meta-Llama-3-8B", "parameters": 8_030_000_000, "rows": 20_000}


def learned(known: Estimate, strength: str = "10", **offer: Any) -> Learned:
    """Return what a policy has learned that knows this of an offer's kind on one GPU."""
    group = group_of(spec_of(**offer), policy_spec(estimation=PREDICTING))
    assert group is not None
    return Learned(Decimal(strength), {Kind(*group, 1): known}, {group: 1})


def test_the_score_takes_the_learned_rate_and_says_what_it_is_made_of() -> None:
    known = Estimate(judged=10, successes=0)
    offered, policy = spec_of(parameters=500_000), policy_spec()
    before, after = evaluate(offered, policy), evaluate(offered, policy, learned=learned(known, parameters=500_000))
    assert before.score is not None
    assert after.score is not None
    terms = {term.name: (term.value, term.message) for term in after.score.terms}
    assert terms["TaskSuccessRate"] == ("0.0900", "0.20 x 0.45 (policy 0.90, 0 of 10 succeeded)")
    assert before.score.total - after.score.total == Decimal("0.0900")
    others = evaluate(offered, policy, learned=learned(known, parameters=5_000_000))
    assert others.score == before.score, "other kinds are left alone"


def test_a_learned_rate_can_bring_an_offer_below_the_threshold() -> None:
    policy = policy_spec(filters={"minScore": "0.7"})
    offered = spec_of(parameters=500_000)
    assert evaluate(offered, policy).refusals == ()
    found = evaluate(offered, policy, learned=learned(Estimate(judged=30, successes=0), parameters=500_000))
    assert [refusal.reason for refusal in found.refusals] == [Reason.SCORE_TOO_LOW]


def test_predicted_times_are_corrected_and_say_so() -> None:
    policy = policy_spec(estimation=PREDICTING)
    spec = spec_of(**LLAMA, hours=10, gpus=1)
    known = Estimate(durations=8, duration_factor=Decimal("1.12"))
    before, after = predict(spec, policy, 1), predict(spec, policy, 1, learned(known, **LLAMA))
    assert before is not None
    assert before.finish is not None
    assert after is not None
    assert after.finish is not None
    assert after.finish.training == pytest.approx(1.12 * before.finish.training)
    assert after.finish.start == before.finish.start == 300
    assert after.finish.numbers.endswith(f"{before.finish.basis}, x1.12 from 8 outcomes")
    seconds = before.finish.training
    assert after.record().to_wire() == {
        "trainingSeconds": round(seconds),
        "peakMemoryBytes": round(before.fit.peak),
        "checkpointBytes": before.fit.checkpoint_bytes,
        "durationFactor": "1.12",
        "memoryFactor": "1",
    }


def test_an_offer_that_tasks_like_it_have_shown_to_be_too_slow_is_refused() -> None:
    at_once = {"gpuMemory": "80G", "duration": {"startSeconds": 0, "reserveSeconds": 0}}
    policy = policy_spec(estimation=at_once)
    found = predict(spec_of(**LLAMA, gpus=1), policy, 1)
    assert found is not None
    assert found.finish is not None
    offered = spec_of(**LLAMA, gpus=1, seconds=round(found.finish.seconds * 1.1))
    assert evaluate(offered, policy).refusals == ()
    slow = learned(Estimate(durations=1, duration_factor=Decimal("1.2")), **LLAMA)
    (refusal,) = evaluate(offered, policy, learned=slow).refusals
    assert refusal.reason is Reason.CANNOT_FINISH_IN_TIME
    assert "x1.2 from 1 outcome" in refusal.message


def test_learned_memory_lowers_the_micro_batch_or_refuses() -> None:
    policy = policy_spec(
        estimation={"gpuMemory": "80G"},
        size_classes=[
            {
                "name": "All",
                "minParameters": 0,
                "gpus": 1,
                "sizeEfficiency": "1",
                "lora": {"r": 64, "loraAlpha": 128},
                "train": {"maxLength": 2048, "perDeviceTrainBatchSize": 16},
            }
        ],
    )
    spec = spec_of(**LLAMA, gpus=1)
    group = group_of(spec, policy)
    assert group is not None

    def with_factor(factor: str) -> Learned:
        return Learned(Decimal(1), {Kind(*group, 1): Estimate(memories=3, memory_factor=Decimal(factor))}, {group: 1})

    plain, more = predict(spec, policy, 1), predict(spec, policy, 1, with_factor("1.5"))
    assert plain is not None
    assert more is not None
    assert 0 < more.fit.largest_rows < plain.fit.largest_rows
    assert more.fit.peak <= more.fit.limit == plain.fit.limit
    assert more.memory_numbers.endswith(", x1.5 from 3 outcomes")
    (refusal,) = evaluate(spec, policy, learned=with_factor("9")).refusals
    assert refusal.reason is Reason.INSUFFICIENT_MEMORY
    assert "x9 from 3 outcomes" in refusal.message


def test_a_policy_without_learning_decides_as_before() -> None:
    offered, policy = spec_of(parameters=500_000), policy_spec(estimation=PREDICTING)
    assert policy.learning is None
    assert evaluate(offered, policy) == evaluate(offered, policy, learned=NOTHING)
    assert evaluate(offered, policy).group is None
    learns = policy_spec(estimation=PREDICTING, learning={})
    assert learns.learning == Learning(prior_strength="10", newest=50, refresh_seconds=300)
    assert evaluate(offered, learns).score == evaluate(offered, policy).score


def test_an_explanation_decides_again_with_what_the_policy_has_learned() -> None:
    view, rules = offer("slow", parameters=500_000), policy(filters={"minScore": "0.7"})
    bad = learned(Estimate(judged=40, successes=0), parameters=500_000)
    shown = replace(snapshot([view], policies=[rules]), learned={"lab": bad})
    found = explain(shown, view)
    assert (found.verdict, found.reason) == ("Reject", "ScoreTooLow")
    assert "0 of 40 succeeded" in str(found.to_wire())
