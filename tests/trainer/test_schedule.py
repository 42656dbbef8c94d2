"""The learning rate as a function of the step and of what was observed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from taskoffer.api.contract import TrainSettings
from taskoffer_trainer.schedule import LearningRate

pytestmark = pytest.mark.trainer

ADAPTIVE = {"adaptiveLr": {"increase": 1.05, "decrease": 0.8, "min": 0.05, "max": 1.5}}
STAGES = {
    "stages": [{"share": 0.6, "factor": 1}, {"share": 0.3, "factor": 0.3}, {"share": 0.1, "factor": 0.1}],
    "lrSchedulerType": "constant_with_warmup",
    "warmupSteps": 0,
}


def rate(total: int = 100, **settings: Any) -> LearningRate:
    return LearningRate(TrainSettings.model_validate(settings), total)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lrSchedulerType": "constant"}, {0: 1, 50: 1, 99: 1}),
        ({"lrSchedulerType": "constant_with_warmup", "warmupSteps": 10}, {0: 1 / 11, 5: 6 / 11, 10: 1, 99: 1}),
        ({"lrSchedulerType": "linear", "warmupSteps": 0.1}, {0: 1 / 11, 5: 6 / 11, 10: 1, 55: 0.5, 100: 0}),
        ({"lrSchedulerType": "cosine", "warmupSteps": 0}, {0: 1, 50: 0.5, 100: 0}),
        ({"lrSchedulerType": "cosine", "warmupSteps": 0, "minLrRate": 0.1}, {0: 1, 50: 0.55, 100: 0.1}),
        (STAGES, {0: 1, 59: 1, 60: 0.3, 89: 0.3, 90: 0.1, 99: 0.1, 100: 0.1}),
        (STAGES | {"lrSchedulerType": "cosine"}, {0: 1, 60: 0.3 * 0.5 * (1 + math.cos(0.6 * math.pi))}),
        # A share of all steps is rounded up, as transformers does.
        ({"lrSchedulerType": "linear", "warmupSteps": 0.011}, {0: 1 / 3, 1: 2 / 3, 2: 1}),
    ],
)
def test_warm_up_decline_and_stages_multiply(settings: dict[str, Any], expected: dict[int, float]) -> None:
    found = rate(**settings)
    assert {step: found(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1, 4, 1000])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 200])
def test_no_step_of_a_run_has_a_rate_of_zero(kind: str, warmup: float, total: int) -> None:
    """A run may have a single step, and that one has to learn something."""
    found = rate(total, lrSchedulerType=kind, warmupSteps=warmup)
    assert min(found(step) for step in range(total)) > 0


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
def test_after_the_warm_up_the_rate_is_that_of_transformers(kind: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=10, num_training_steps=100).lr_lambdas[0]
    ours = rate(lrSchedulerType=kind, warmupSteps=10)
    assert [ours(step) for step in range(10, 100)] == pytest.approx([theirs(step) for step in range(10, 100)])
    assert [ours(step) for step in range(10)] == pytest.approx([(step + 1) / 11 for step in range(10)])


def test_without_a_warm_up_which_the_benchmark_leaves_out_every_rate_is_that_of_transformers() -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=80).lr_lambdas[0]
    ours = rate(80, lrSchedulerType="cosine", warmupSteps=0)
    assert [ours(step) for step in range(80)] == pytest.approx([theirs(step) for step in range(80)])


def test_the_factor_rises_while_the_loss_falls_and_stays_within_its_bound() -> None:
    found = rate(**ADAPTIVE)
    factors = [found.observe(1 / number) for number in range(1, 13)]
    # 1.05 to the power of 9 is the first above 1.5; unbounded, 40 good evaluations would be sevenfold.
    assert factors[:9] == pytest.approx([1.05**number for number in range(1, 9)] + [1.5])
    assert factors[9:] == [None, None, None]
    assert found.factor == 1.5


def test_two_evaluations_without_an_improvement_lower_it_and_the_next_counts_for_nothing() -> None:
    found = rate(**ADAPTIVE)
    losses = [1.0, 1.0, 0.9995, 0.5, 0.4]
    # The first improves, two do not (0.05 % is too little), one is the rest after the decrease.
    assert [found.observe(loss) for loss in losses] == pytest.approx([1.05, None, 0.84, None, 0.882])


def test_the_factor_does_not_fall_below_its_bound_and_a_loss_that_is_no_number_lowers_it() -> None:
    found = rate(**ADAPTIVE)
    assert found.observe(math.nan) == pytest.approx(0.8)
    for _ in range(60):
        found.observe(math.inf)
    assert found.factor == 0.05


def test_a_negative_loss_improves_when_it_falls() -> None:
    """A method whose figure is to become larger gives its negative."""
    found = rate(**ADAPTIVE)
    assert [found.observe(loss) for loss in (-1.0, -1.1, -1.1001)] == pytest.approx([1.05, 1.05**2, None])


def test_the_first_evaluation_is_compared_with_the_base_model() -> None:
    """A loss that has risen since before the training is no reason to go faster."""
    settings = TrainSettings.model_validate(ADAPTIVE)
    risen, fallen = (LearningRate(settings, 100, before=2.0) for _ in range(2))
    assert [risen.observe(loss) for loss in (2.1, 2.05)] == [None, 0.8]
    assert fallen.observe(1.9) == 1.05


def test_without_the_setting_nothing_is_observed() -> None:
    found = rate(lrSchedulerType="constant")
    assert [found.observe(loss) for loss in (1.0, 2.0, 3.0)] == [None] * 3
    assert found(5) == 1.0


def test_what_a_checkpoint_keeps_is_what_was_observed_and_not_the_settings() -> None:
    first = rate(lrSchedulerType="constant", **ADAPTIVE)
    for loss in (1.0, 0.9, 0.9, 0.9):
        first.observe(loss)
    kept = dict(first.__dict__)
    assert set(kept) == {"factor", "best", "waited", "resting"}
    second = rate(lrSchedulerType="constant", **ADAPTIVE)
    second.__dict__.update(kept)
    assert [second.observe(loss) for loss in (0.8, 0.7)] == [first.observe(loss) for loss in (0.8, 0.7)]
    # A later attempt that runs without it takes the plain rate, whatever was observed before.
    third = rate(lrSchedulerType="constant")
    third.__dict__.update(kept)
    assert third(0) == 1.0
