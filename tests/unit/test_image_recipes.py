"""How pictures are trained under each preset, and how long that takes: numbers worked out by hand.

Ten to fifty pictures with captions are a task of the market, in one to two hours (2025), half an hour to one (2026).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from core_builders import policy_spec, spec_of
from simulation_builders import entry, run_of, timeline
from taskoffer import presets
from taskoffer.api.contract import TrainSettings
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.lint import lint
from taskoffer.decision.lint_steps import FEWEST_STEPS, optimizer_steps
from taskoffer.decision.prediction import predict
from taskoffer.decision.recipe import requested_settings

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "sdxl": {"model": "stabilityai/stable-diffusion-xl-base-1.0", "parameters": 2_567_463_684},
    "flux": {"model": "black-forest-labs/FLUX.1-dev", "parameters": 11_901_408_320},
}


def pictures(architecture: str, hours: float = 1, **fields: Any) -> TaskOfferSpec:
    """Return an offer of thirty pictures for a model of real size."""
    given = {"task_type": "Image", "architecture": architecture, "hours": hours, "rows": 30}
    return spec_of(**{**given, **MODELS[architecture], **fields})


def answer(preset: str, spec: TaskOfferSpec) -> Evaluation:
    """Return what a preset says of an offer."""
    return evaluate(spec, policy_spec(preset=preset))


# Rank, alpha, rate; GPUs, pictures of a step, steps. The ranks are what is asked for, before memory has its say.
RECIPES = [
    ("strategy-8xh100", "sdxl", 384, 96, 4.6e-4, 1, 4, 1600),  # 256 x 1.5, 64 x 1.5, 4e-4 x 1.15
    ("strategy-8xh100", "flux", 768, 192, 3.45e-4, 1, 1, 1500),  # 512 x 1.5, 128 x 1.5, 3e-4 x 1.15
    ("strategy-maximum-accuracy", "sdxl", 8192, 2048, 2e-4, 4, 4, 1600),
    ("strategy-maximum-accuracy", "flux", 8192, 2048, 2e-4, 4, 4, 1500),
    ("balanced-4", "sdxl", 1024, 256, 3e-4, 2, 4, 1600),
    ("balanced-4", "flux", 1024, 256, 3e-4, 2, 2, 1500),
    ("market-table", "sdxl", 32, 32, 1e-4, 1, 4, 1600),
    ("market-table", "flux", 128, 128, 1e-4, 1, 1, 1500),
    ("sound", "sdxl", 32, 32, 1e-4, 1, 4, 1600),
    ("sound", "flux", 128, 128, 1e-4, 1, 1, 1500),
    ("expected-value", "sdxl", 32, 32, 1e-4, 1, 4, 1600),
    ("expected-value", "flux", 128, 128, 1e-4, 1, 1, 1500),
]


def test_every_preset_that_takes_pictures_has_a_recipe_here() -> None:
    taking = {
        name
        for name in presets.names()
        if any(rule["name"] == "Image" and rule["accepted"] for rule in presets.load(name)["spec"]["taskTypes"])
    }
    # The lab's size classes train everything for 40 steps.
    assert {preset for preset, *_ in RECIPES} == taking - {"lab"}


@pytest.mark.parametrize(("preset", "architecture", "r", "alpha", "rate", "gpus", "batch", "steps"), RECIPES)
def test_pictures_are_trained_for_a_number_of_steps(
    preset: str, architecture: str, r: int, alpha: int, rate: float, gpus: int, batch: int, steps: int
) -> None:
    spec = pictures(architecture)
    assert answer(preset, spec).gpus == gpus
    made = requested_settings(spec, policy_spec(preset=preset))
    assert (made.lora.r, made.lora.lora_alpha) == (r, alpha)
    assert made.train.learning_rate == pytest.approx(rate, rel=1e-12)
    each = made.train.per_device_train_batch_size * made.train.gradient_accumulation_steps
    assert (each * gpus, made.train.max_steps) == (batch, steps)
    # A held-out picture goes forward eight times, one that is trained counts as four: of fifty, five are held out.
    assert 0.4 * made.train.eval_steps * batch + 1e-9 >= 8 * 5


# A picture of 1024 x 1024 is four forward passes of 6.76 and 74.4 TFLOP, on GPUs that reach 0.35 of 989 TFLOP/s: 0.0781
# and 0.8597 s on one GPU. A tenth is added for evaluations, 300 s for the start, and 180 s are to be left at the end.
#   SDXL, 6,400 pictures: 499.9 x 1.1 + 300 = 850 s on one GPU, 575 s on two, 437 s on four.
#   Flux, 1,500 pictures: 1,289.6 x 1.1 + 300 = 1,719 s on one GPU; 3,000 on two and 6,000 on four take as long.
SECONDS = [
    ("strategy-8xh100", "sdxl", 850),
    ("market-table", "sdxl", 850),
    ("sound", "sdxl", 850),
    ("expected-value", "sdxl", 850),
    ("balanced-4", "sdxl", 575),
    ("strategy-maximum-accuracy", "sdxl", 437),
    *((preset, "flux", 1719) for preset in sorted({preset for preset, *_ in RECIPES})),
]


@pytest.mark.parametrize(("preset", "architecture", "seconds"), SECONDS)
def test_how_long_pictures_are_predicted_to_take(preset: str, architecture: str, seconds: int) -> None:
    spec = pictures(architecture, hours=2)
    found = predict(spec, policy_spec(preset=preset), answer(preset, spec).gpus)
    assert found is not None
    assert found.finish is not None
    assert round(found.finish.seconds) == seconds
    # However many pictures there are, and whether or not the offer says so.
    without = predict(pictures(architecture, hours=2, rows=None), policy_spec(preset=preset), found.finish.gpus)
    assert without is not None
    assert without.finish is not None
    assert without.finish.seconds == found.finish.seconds


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in RECIPES}))
@pytest.mark.parametrize(
    ("architecture", "hours", "refused"),
    [
        ("sdxl", 0.5, set()),
        ("sdxl", 2, set()),
        # 1,719 s of start and training and 180 s at the end are 31.7 minutes.
        ("flux", 0.5, {Reason.CANNOT_FINISH_IN_TIME}),
        ("flux", 0.75, set()),
        ("flux", 1, set()),
        ("flux", 2, set()),
    ],
)
def test_the_markets_hours_are_enough_but_for_flux_in_half_an_hour(
    preset: str, architecture: str, hours: float, refused: set[Reason]
) -> None:
    refusals = answer(preset, pictures(architecture, hours)).refusals
    assert {refusal.reason for refusal in refusals} == refused
    if refused:
        assert refusals[0].counterfactual == "accepted with timeLimitSeconds of at least 1899"


@pytest.mark.parametrize("architecture", ["sdxl", "flux"])
def test_a_simulated_task_of_pictures_takes_as_long_as_its_steps(architecture: str) -> None:
    seconds = {"sdxl": 850, "flux": 1719}[architecture]
    fields = {"task_type": "Image", "architecture": architecture, "hours": 1, **MODELS[architecture]}
    few, many = entry("few", rows=10, **fields), entry("many", rows=5_000, **fields)
    result = run_of(few, many, policy=policy_spec(preset="market-table"), gpus=8)
    ends = {name: end for name, (_, end, _) in timeline(result).items()}
    assert ends == {
        "few": pytest.approx(seconds * few.truth.factor, abs=1),
        "many": pytest.approx(seconds * many.truth.factor, abs=1),
    }


def _offers() -> list[tuple[str, dict[str, Any]]]:
    """Return the offers of pictures in the examples and in the guide."""
    found = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("examples/types/*image*.yaml"))]
    guide = (ROOT / "docs/howto/train-image.md").read_text(encoding="utf-8")
    found.append(("train-image.md", guide.split("```yaml\n")[1].split("```")[0]))
    return [(name, yaml.safe_load(text)["spec"]) for name, text in found]


@pytest.mark.parametrize("preset", [*sorted({preset for preset, *_ in RECIPES}), "lab"])
@pytest.mark.parametrize(("name", "fields"), _offers())
def test_the_examples_of_pictures_are_taken_by_every_preset(preset: str, name: str, fields: dict[str, Any]) -> None:
    # Two presets hand out more than one GPU, and an example asks for one.
    fields = {key: value for key, value in fields.items() if key != "gpuCount"}
    assert answer(preset, TaskOfferSpec.model_validate(fields)).refusals == (), name


STEPS = [
    # Per device, accumulation, epochs, number of steps; task type, rows, GPUs: optimizer steps, rows of one.
    ({"perDeviceTrainBatchSize": 16, "gradientAccumulationSteps": 4, "numTrainEpochs": 2}, "Image", 50, 1, 2, 64),
    ({"perDeviceTrainBatchSize": 16, "gradientAccumulationSteps": 4, "numTrainEpochs": 2}, "Image", 30, 1, 1, 64),
    ({"perDeviceTrainBatchSize": 16, "lrSchedulerType": "constant"}, "Image", 10, 1, 1, 16),
    ({"perDeviceTrainBatchSize": 16, "warmupSteps": 0}, "Image", 10, 1, 1, 16),
    ({"perDeviceTrainBatchSize": 4, "maxSteps": 1600}, "Image", 10, 1, 1600, 4),
    # A tenth is held out, 400 rows at most: 7,600 in steps of 512.
    ({"perDeviceTrainBatchSize": 128}, "InstructText", 8_000, 4, 15, 512),
    ({"perDeviceTrainBatchSize": 128}, "InstructText", 2_000, 4, 4, 512),
    # Four completions of each of 1,800 prompts.
    ({"perDeviceTrainBatchSize": 128}, "GRPO", 2_000, 4, 15, 512),
    # 6 rows are rounded up to whole groups of 8.
    ({"perDeviceTrainBatchSize": 6, "grpo": {"numGenerations": 8}}, "GRPO", 2_000, 1, 1800, 8),
]


@pytest.mark.parametrize(("train", "task", "rows", "gpus", "steps", "per_step"), STEPS)
def test_the_optimizer_steps_of_a_run(
    train: dict[str, Any], task: str, rows: int, gpus: int, steps: int, per_step: int
) -> None:
    found = optimizer_steps(TrainSettings.model_validate(train), TaskType(task), rows, gpus)
    assert found == (steps, per_step)


def test_lint_tells_where_a_small_task_has_hardly_a_step_to_learn_in() -> None:
    spec = presets.load("sound")["spec"]
    without = [
        {key: value for key, value in rule.items() if key not in ("lora", "train", "architectures")}
        for rule in spec["taskTypes"]
    ]
    told = [f.message for f in lint(policy_spec(preset="sound", task_types=without)) if f.field.endswith(".train")]
    assert told[0] == (
        "sizeClasses[UpTo4B].train: 10 pictures of Image make 1 optimizer step(s) of 64, fewer than 10: "
        "lower gradientAccumulationSteps or perDeviceTrainBatchSize, or set maxSteps, here or in taskTypes[].train"
    )
    assert len(told) == len(spec["sizeClasses"])


SMALL = [("Image", 10), ("Image", 50), *((task, 8_000) for task in ("InstructText", "Chat", "DPO", "GRPO"))]
"""The smallest and the largest set of pictures, and the fewest rows of text, that the market has had in 2026."""


@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize(("task", "rows"), SMALL)
@pytest.mark.parametrize("billions", [1, 8, 14, 70])
def test_every_task_of_the_markets_size_has_steps_to_learn_in(preset: str, task: str, rows: int, billions: int) -> None:
    policy = policy_spec(preset=preset)
    for architecture in ("sdxl", "flux") if task == "Image" else (None,):
        spec = spec_of(task_type=task, parameters=billions * 10**9, rows=rows, architecture=architecture, hours=12)
        made = requested_settings(spec, policy)
        steps, _ = optimizer_steps(made.train, TaskType(task), rows, evaluate(spec, policy).gpus)
        assert steps >= FEWEST_STEPS, architecture
