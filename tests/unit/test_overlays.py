"""Settings of a task type in place of its size class's: what counts before what, and what is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from builders import make_policy
from core_builders import policy_spec, spec_of
from crd_schema import faults, schema_of
from taskoffer.api.base import WireModel
from taskoffer.api.contract import GRPOSettings, LoraSettings, TrainSettings
from taskoffer.api.techniques import AdaptiveLR
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.overlays import LoraOverlay, TrainOverlay
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.recipe import requested_settings

SIZE = {
    "name": "S",
    "minParameters": 0,
    "gpus": 1,
    "sizeEfficiency": "1",
    "lora": {"r": 10, "loraAlpha": 20, "loraDropout": 0.1, "rankPattern": [{"module": "k_proj", "r": 5}]},
    "train": {"perDeviceTrainBatchSize": 16, "learningRate": 0.001, "evalSteps": 25, "saveSteps": 50},
}
TASK = {"name": "Image", "accepted": True, "weight": "1", "successRate": "1"}


def fields(**task: Any) -> dict[str, Any]:
    """Return a policy of one task type and one size class."""
    return {"size_classes": [SIZE], "task_types": [{**TASK, **task}]}


def settings(architecture: str = "sdxl", **task: Any) -> Settings:
    """Return what a picture task is trained with under a policy with this rule for them."""
    spec = spec_of(task_type=task.get("name", "Image"), parameters=1)
    if task.get("name", "Image") == "Image":
        spec = spec_of(task_type="Image", parameters=1, architecture=architecture)
    return requested_settings(spec, policy_spec(**fields(**task)))


def within(field: str) -> type[WireModel]:
    """Return the type of the settings within an overlay's training settings."""
    found: type[WireModel] = get_args(TrainOverlay.model_fields[field].annotation)[0]
    return found


PAIRS = [
    (LoraOverlay, LoraSettings),
    (TrainOverlay, TrainSettings),
    (within("grpo"), GRPOSettings),
    (within("adaptive_lr"), AdaptiveLR),
]
OVERLAY_REFS = {f"#/$defs/{whole.__name__}": f"#/$defs/{overlay.__name__}" for overlay, whole in PAIRS}


@pytest.mark.parametrize(("overlay", "whole"), PAIRS)
def test_an_overlay_has_every_field_of_the_settings_with_its_bounds_and_no_default(
    overlay: type[WireModel], whole: type[WireModel]
) -> None:
    assert overlay().to_wire() == {}
    assert list(overlay.model_fields) == list(whole.model_fields)
    given, asked = overlay.model_json_schema()["properties"], whole.model_json_schema()["properties"]
    for name, field in asked.items():
        bounds = {key: value for key, value in field.items() if key not in ("default", "description", "title")}
        options = given[name].get("anyOf", [given[name]])
        inner = [option for option in options if option.get("type") != "null"]
        wanted = [option for option in bounds.pop("anyOf", [bounds]) if option.get("type") != "null"]
        for mine, theirs in zip(inner, wanted, strict=True):
            marks = {key: value for key, value in theirs.items() if not key.startswith("x-")}
            if marks.get("$ref") in OVERLAY_REFS:
                marks["$ref"] = OVERLAY_REFS[marks["$ref"]]
            assert {key: mine.get(key) for key in marks} == marks, name
        assert given[name].get("description") == field.get("description"), name


def test_what_the_task_type_sets_counts_and_the_rest_stays_the_size_classs() -> None:
    made = settings(lora={"r": 32}, train={"maxSteps": 100, "perDeviceTrainBatchSize": 2})
    assert (made.lora.r, made.lora.lora_alpha, made.lora.lora_dropout) == (32, 20, 0.1)
    assert (made.train.max_steps, made.train.per_device_train_batch_size) == (100, 2)
    assert (made.train.learning_rate, made.train.save_steps) == (0.001, 50)


def test_an_empty_list_and_a_zero_count_as_set() -> None:
    made = settings(lora={"rankPattern": [], "loraDropout": 0})
    assert (made.lora.rank_pattern, made.lora.lora_dropout) == ((), 0.0)
    assert settings().lora.rank_pattern[0].r == 5


def test_an_architecture_counts_before_its_task_type() -> None:
    rule = {
        "lora": {"r": 32, "loraAlpha": 32},
        "train": {"maxSteps": 100, "learningRate": 0.01},
        "architectures": [{"name": "flux", "lora": {"r": 128}, "train": {"maxSteps": 300}}],
    }
    sdxl, flux = settings("sdxl", **rule), settings("flux", **rule)
    assert (sdxl.lora.r, sdxl.lora.lora_alpha, sdxl.train.max_steps) == (32, 32, 100)
    assert (flux.lora.r, flux.lora.lora_alpha, flux.train.max_steps) == (128, 32, 300)
    assert flux.train.learning_rate == sdxl.train.learning_rate == 0.01


OF_SIZE, OF_TASK = {"numGenerations": 8, "maxCompletionLength": 16}, {"beta": 0.01, "numGenerations": 6}
INNER: list[tuple[str, dict[str, Any] | None, list[dict[str, Any]], dict[str, Any] | None]] = [
    ("grpo", OF_SIZE, [], OF_SIZE),
    ("grpo", OF_SIZE, [{}], OF_SIZE),
    ("grpo", OF_SIZE, [{"beta": 0.01}], {**OF_SIZE, "beta": 0.01}),
    ("grpo", OF_SIZE, [{"numGenerations": 4}], {**OF_SIZE, "numGenerations": 4}),
    ("grpo", OF_SIZE, [{"beta": 0}], {**OF_SIZE, "beta": 0}),
    ("grpo", OF_SIZE, [OF_TASK, {"beta": 0.02}], {**OF_SIZE, **OF_TASK, "beta": 0.02}),
    ("grpo", None, [OF_TASK, {"beta": 0.02}], {**OF_TASK, "beta": 0.02}),
    ("grpo", None, [], None),
    ("adaptiveLr", {"patience": 5}, [{"max": 3}], {"patience": 5, "max": 3}),
    ("adaptiveLr", {"patience": 5}, [{"max": 3}, {"patience": 2}], {"patience": 2, "max": 3}),
    ("adaptiveLr", None, [{}], {}),
]


@pytest.mark.parametrize("stored", [False, True], ids=["as written", "as the status keeps it"])
@pytest.mark.parametrize(("field", "size", "overlays", "wanted"), INNER)
def test_of_settings_within_settings_too_only_those_count_that_are_there(
    field: str,
    size: dict[str, Any] | None,
    overlays: list[dict[str, Any]],
    wanted: dict[str, Any] | None,
    stored: bool,
) -> None:
    over_task, over_flux = ([{"train": {field: one}} for one in overlays] + [{}, {}])[:2]
    whole_size = {**SIZE, "train": {field: size}}
    policy = policy_spec(
        size_classes=[whole_size], task_types=[{**TASK, **over_task, "architectures": [{"name": "flux", **over_flux}]}]
    )
    if stored:
        policy = CapacityPolicySpec.model_validate_json(json.dumps(policy.to_wire()))
    made = requested_settings(spec_of(task_type="Image", parameters=1, architecture="flux"), policy)
    assert made.train == TrainSettings.model_validate({field: wanted})


def test_the_factors_come_last() -> None:
    rule = {"lora": {"r": 32}, "train": {"learningRate": 0.01}, "loraRankFactor": "1.5", "learningRateFactor": "0.1"}
    made = settings(**rule, architectures=[{"name": "flux", "lora": {"r": 100}}])
    # 32 x 1.5 of the task type's rank, 20 x 1.5 of the size class's alpha.
    assert (made.lora.r, made.lora.lora_alpha) == (48, 30)
    assert made.train.learning_rate == pytest.approx(0.001, rel=1e-12)
    flux = settings("flux", **rule, architectures=[{"name": "flux", "lora": {"r": 100}}])
    assert flux.lora.r == 150


def test_every_task_type_can_have_its_own() -> None:
    made = settings(name="DPO", train={"beta": 0.2, "numTrainEpochs": 3})
    assert (made.train.beta, made.train.num_train_epochs) == (0.2, 3)


REFUSED = [
    (
        {"train": {"evalSteps": 40}},
        "taskTypes[Image] does not go with sizeClasses[S]: saveSteps (50) must be a multiple of evalSteps (40)",
    ),
    (
        {"architectures": [{"name": "flux", "train": {"saveSteps": 30}}]},
        "taskTypes[Image] for flux does not go with sizeClasses[S]: saveSteps (30) must be a multiple of",
    ),
    (
        {"lora": {"r": 60_000}, "loraRankFactor": "2"},
        "taskTypes[Image] scales r of sizeClasses[S] to 120000, which must be at most 65536: change the factor",
    ),
    (
        {"name": "DPO", "architectures": [{"name": "flux", "lora": {"r": 4}}]},
        "architectures is only for the task type Image: remove it, and use lora and train",
    ),
    ({"lora": {"r": 0}}, "greater than or equal to 1"),
    ({"train": {"steps": 5}}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("task", "message"), REFUSED)
def test_a_policy_whose_overlays_lead_to_impossible_settings_is_invalid(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as fault:
        policy_spec(**fields(**task))
    assert message in str(fault.value)


def test_settings_that_only_go_together_with_the_size_classs_are_taken() -> None:
    # 30 is no multiple of the default of evalSteps, but of the class's.
    size = {**SIZE, "train": {"evalSteps": 10, "saveSteps": 20}}
    made = policy_spec(size_classes=[size], task_types=[{**TASK, "train": {"saveSteps": 30}}])
    assert requested_settings(spec_of(task_type="Image", parameters=1), made).train.save_steps == 30


def test_a_policy_with_overlays_is_stored_and_read_again_as_it_is() -> None:
    rule = {
        "lora": {"rankPattern": []},
        "train": {"maxSteps": 9, "grpo": {"beta": 0.01}},
        "architectures": [{"name": "sdxl", "lora": {"r": 2}, "train": {"adaptiveLr": {}}}],
    }
    manifest = make_policy(**fields(**rule))
    assert list(faults(schema_of("CapacityPolicy"), manifest)) == []
    spec = CapacityPolicySpec.model_validate(manifest["spec"])
    assert CapacityPolicySpec.model_validate(spec.to_wire()) == spec
    (stored,) = spec.to_wire()["taskTypes"]
    assert {name: stored[name] for name in rule} == rule
