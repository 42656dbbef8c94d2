"""The small rules: names that fit, conditions that move, settings that are scaled."""

from typing import Any

import pytest

from core_builders import NOW, at, condition, policy_spec, spec_of
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1 import taskoffer
from taskoffer.decision.conditions import condition_of, is_true, set_condition
from taskoffer.decision.naming import attempt_name, job_name
from taskoffer.decision.recipe import requested_settings

UID = "01234567-89ab-4cde-8f01-23456789abcd"


def test_every_name_that_follows_from_the_longest_offer_name_fits_a_label() -> None:
    job = job_name("a" * taskoffer.MAX_OFFER_NAME, UID)
    attempt = attempt_name(job, 20)
    pod = f"{attempt}-abcde"
    assert (len(job), len(attempt), len(pod)) == (54, 57, 63)


def test_an_offer_that_was_created_again_under_its_name_gets_another_job() -> None:
    assert job_name("offer", UID) == "offer-01234567"
    assert job_name("offer", UID) != job_name("offer", UID[::-1])
    assert attempt_name("offer-01234567", 2) == "offer-01234567-2"


def test_a_condition_moves_its_time_only_with_its_status() -> None:
    first = set_condition((), "Running", False, Reason.PENDING, "one", now=NOW, generation=1)
    second = set_condition(first, "Running", False, Reason.RUNNING, "two", now=at(5), generation=2)
    third = set_condition(second, "Running", True, Reason.RUNNING, "three", now=at(9.75), generation=2)
    assert [c.last_transition_time for c in (*first, *second, *third)] == [NOW, NOW, at(9)]
    assert (second[0].reason, second[0].message, second[0].observed_generation) == ("Running", "two", 2)


def test_a_condition_keeps_its_place_among_the_others_and_its_message_within_bounds() -> None:
    kept = (condition("A", True, "X"), condition("B", False, "Y"), condition("C", None, "Z"))
    made = set_condition(kept, "B", None, Reason.NODE_LOST, "x" * 5000, now=NOW, generation=1)
    assert [c.type for c in made] == ["A", "B", "C"]
    assert made[1].status.value == "Unknown"
    assert len(made[1].message) == 2048


def test_conditions_are_found_by_type() -> None:
    kept = (condition("A", True, "X"), condition("B", False, "Y"), condition("C", None, "Z"))
    assert [is_true(kept, kind) for kind in "ABCD"] == [True, False, False, False]
    found = condition_of(kept, "B")
    assert found is not None
    assert found.reason == "Y"
    assert condition_of(kept, "D") is None


# The 8xH100 document: rank 256 to 2048 by size; instruct +40 % rank and +20 % rate, GRPO +60 % and -15 %,
# image +50 % and +15 %. Alpha keeps its ratio to the rank. Batches of pictures are the preset's own.
RECIPES = [
    ("InstructText", "x/Qwen-0.5B", 358, 90, 4.8e-4, 0.05, 16, 1),
    ("InstructText", "x/Qwen-7B", 717, 179, 3.6e-4, 0.1, 8, 2),
    ("InstructText", "x/Qwen-13B", 1434, 358, 2.4e-4, 0.15, 4, 4),
    ("InstructText", "x/Qwen-70B", 2867, 717, 1.2e-4, 0.2, 2, 8),
    ("GRPO", "x/Qwen-0.5B", 410, 102, 3.4e-4, 0.05, 16, 1),
    ("GRPO", "x/Qwen-70B", 3277, 819, 0.85e-4, 0.2, 2, 8),
    ("Image", "x/Qwen-0.5B", 384, 96, 4.6e-4, 0.05, 4, 1),
    ("DPO", "x/Qwen-0.5B", 256, 64, 4e-4, 0.05, 16, 1),
]


@pytest.mark.parametrize(("task", "model", "rank", "alpha", "rate", "dropout", "batch", "steps"), RECIPES)
def test_settings_are_the_size_classs_times_the_task_types_factors(
    task: str, model: str, rank: int, alpha: int, rate: float, dropout: float, batch: int, steps: int
) -> None:
    made = requested_settings(spec_of(task_type=task, model=model), policy_spec(preset="strategy-8xh100"))
    assert (made.lora.r, made.lora.lora_alpha, made.lora.lora_dropout) == (rank, alpha, dropout)
    assert made.train.learning_rate == pytest.approx(rate, rel=1e-12)
    assert made.train.per_device_train_batch_size == batch
    assert made.train.gradient_accumulation_steps == steps


def test_a_factor_near_zero_leaves_a_rank_of_one() -> None:
    tiny = [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1", "loraRankFactor": "0.001"}]
    made = requested_settings(spec_of(parameters=1), policy_spec(task_types=tiny))
    assert (made.lora.r, made.lora.lora_alpha) == (1, 1)


@pytest.mark.parametrize(
    ("offer", "policy"),
    [
        ({"model": "x/phi-4"}, {}),
        ({"task_type": "DPO"}, {"task_types": [{"name": "Chat", "accepted": True, "weight": "1", "successRate": "1"}]}),
    ],
)
def test_an_offer_that_the_policy_has_no_settings_for_is_named(offer: dict[str, Any], policy: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the policy has no settings for"):
        requested_settings(spec_of(**offer), policy_spec(**policy))
