"""Filters and score: every refusal of every filter, and a score whose terms add up."""

from decimal import Decimal
from typing import Any

import pytest

from core_builders import ONE_GPU, policy_spec, spec_of
from taskoffer.api.reasons import Reason
from taskoffer.decision.evaluate import Evaluation, evaluate

ACCEPTING_NOTHING = [{"name": "InstructText", "accepted": False, "weight": "1", "successRate": "1"}]
TWO_LANES = [
    {"name": "small", "gpus": 2, "rules": [{"sizeClasses": ["Small"], "gpusPerTask": 1}]},
    {"name": "flux", "gpus": 1, "rules": [{"taskTypes": ["Image"], "architectures": ["flux"], "gpusPerTask": 1}]},
]

REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], Reason, str]] = [
    (
        "a task type that the policy lists without accepting it",
        {"task_type": "DPO"},
        {"preset": "strategy-8xh100"},
        Reason.TASK_TYPE_NOT_ACCEPTED,
        "taskType DPO is not accepted by the policy, which takes InstructText, GRPO, Image",
    ),
    (
        "a task type that the policy does not list",
        {"task_type": "Chat"},
        {"task_types": [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1"}]},
        Reason.TASK_TYPE_NOT_ACCEPTED,
        "which takes InstructText",
    ),
    (
        "a model of an unlisted family",
        {"model": "tiiuae/falcon-7b"},
        {},
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        "model tiiuae/falcon-7b belongs to no family that the policy accepts (Llama, Mistral, Qwen, Gemma, Phi, "
        "CodeLlama, DeepSeek, SDXL, Flux)",
    ),
    (
        "a model without families",
        {},
        {"families": []},
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        "(none)",
    ),
    (
        "a model of unknown size",
        {"model": "microsoft/phi-4", "parameters": None},
        {},
        Reason.PARAMETERS_UNKNOWN,
        "set model.parameters",
    ),
    (
        "a model that no size class takes",
        {"parameters": 4_000_000},
        {"size_classes": [{"name": "Tiny", "minParameters": 0, "maxParameters": 1000000, "gpus": 1,
                           "sizeEfficiency": "1", "lora": {}, "train": {}}]},
        Reason.MODEL_SIZE_NOT_ACCEPTED,
        "no size class of the policy takes 4M parameters (classes: Tiny from 0k)",
    ),
    (
        "a time limit that is exactly the policy's",
        {"hours": 20},
        {},
        Reason.TIME_LIMIT_TOO_LONG,
        "timeLimitSeconds 72000 (20 h) is not below the policy's 72000 (20 h)",
    ),
    (
        "a score below the threshold",
        {},
        {"filters": {"minScore": "0.9"}},
        Reason.SCORE_TOO_LOW,
        "score 0.7350 does not exceed the policy's 0.9",
    ),
    (
        "a GPU count that the policy does not hand out",
        {"gpus": 8},
        {},
        Reason.GPU_COUNT_NOT_ALLOWED,
        "8 x nvidia.com/gpu is not allowed; the policy hands out 1, 2, 4",
    ),
    (
        "more GPUs than the lane has",
        {"gpus": 4},
        {"lanes": TWO_LANES},
        Reason.GPU_COUNT_NOT_ALLOWED,
        "4 x nvidia.com/gpu is more than lane small has (2)",
    ),
    (
        "a task that no lane takes",
        {"parameters": 2_000_000},
        {"lanes": TWO_LANES},
        Reason.NO_LANE,
        "no lane of the policy takes InstructText on a Medium model (lanes: small, flux)",
    ),
    (
        "a task of unknown size where lanes go by size",
        {"model": "microsoft/phi-4", "parameters": None},
        {"lanes": TWO_LANES},
        Reason.NO_LANE,
        "on a model of unknown size model",
    ),
    (
        "an image architecture that no lane takes",
        {"task_type": "Image", "architecture": "sdxl", "parameters": 2_000_000},
        {"lanes": TWO_LANES},
        Reason.NO_LANE,
        "no lane of the policy takes Image",
    ),
]  # fmt: skip


def evaluated(
    offer: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
) -> Evaluation:
    return evaluate(spec_of(**{"parameters": ONE_GPU, **(offer or {})}), policy_spec(**(policy or {})))


@pytest.mark.parametrize(("offer", "policy", "reason", "text"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_a_filter_refuses(offer: dict[str, Any], policy: dict[str, Any], reason: Reason, text: str) -> None:
    refusals = {r.reason: r.message for r in evaluated(offer, policy).refusals}
    assert reason in refusals, refusals
    assert text in refusals[reason]


def claimless(field: str) -> dict[str, Any]:
    return {"spec": {field: None}}


def of_one_file(url: str) -> dict[str, Any]:
    return {"spec": {"dataset": {"fileFormat": "hf", "source": {"persistentVolumeClaim": None, "url": {"url": url}}}}}


FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"spec": {"model": {"source": None}}}, "model.source"),
    ({"spec": {"dataset": {"source": None}}}, "dataset.source"),
    ({"spec": {"dataset": {"source": {"persistentVolumeClaim": None, "hub": {"name": "x/y"}}}}}, "dataset.source"),
    (claimless("output"), "output"),
    ({"output": {"repository": "me/out"}}, "output"),
    ({"spec": {"output": {"repository": "me/out"}}}, "output.repository"),
    ({"task_type": "Chat", "spec": {"dataset": {"chat": {"chatTemplate": "klingon"}}}}, "dataset.chat.chatTemplate"),
    ({"task_type": "Image", "spec": {"dataset": {"fileFormat": "jsonl"}}}, "dataset.fileFormat"),
    ({"spec": {"dataset": {"fileFormat": "zip"}}}, "dataset.fileFormat"),
    ({"task_type": "Chat", "spec": {"dataset": {"fileFormat": "zip"}}}, "dataset.fileFormat"),
    (of_one_file("https://data.test/rows?sig=1"), "dataset.fileFormat"),
    (of_one_file("s3://rows/set"), "dataset.fileFormat"),
    ({"spec": {"klCoefficient": "0.1"}}, "klCoefficient"),
    ({"spec": {"extraDatasets": [{"name": "x/y"}]}}, "extraDatasets"),
    ({"task_type": "Image", "spec": {"model": {"yarnFactor": 2}}}, "model.yarnFactor"),
    ({"spec": {"tracking": {"mode": "Online"}}}, "tracking.mode"),
]


@pytest.mark.parametrize(("offer", "field"), FEATURES)
def test_what_is_not_served_yet_is_refused_by_the_fields_name(offer: dict[str, Any], field: str) -> None:
    refusals = [r for r in evaluated(offer).refusals if r.reason is Reason.FEATURE_NOT_SERVED]
    assert any(r.message.startswith(f"spec.{field} is not served") and r.counterfactual for r in refusals), refusals


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("Image", "zip"),
        ("Image", None),
        ("InstructText", None),
        *(("Chat", k) for k in ["json", "jsonl", "csv", "parquet", "hf"]),
    ],
)
def test_a_format_that_the_trainer_reads_is_no_obstacle(task: str, kind: str | None) -> None:
    refusals = evaluated({"task_type": task, "spec": {"dataset": {"fileFormat": kind}}}, {"preset": "sound"}).refusals
    assert Reason.FEATURE_NOT_SERVED not in {r.reason for r in refusals}


def test_tracking_that_is_switched_off_is_no_obstacle() -> None:
    assert evaluated({"spec": {"tracking": {"mode": "Disabled"}}}).refusals == ()


def test_all_refusals_are_returned_and_each_says_what_would_change_it() -> None:
    found = evaluated(
        {
            "task_type": "GRPO",
            "model": "tiiuae/falcon",
            "parameters": None,
            "hours": 30,
            "gpus": 8,
            "spec": {"klCoefficient": "1"},
        },
        {
            "preset": "strategy-8xh100",
            "task_types": [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1"}],
        },
    )
    assert [r.reason for r in found.refusals] == [
        Reason.TASK_TYPE_NOT_ACCEPTED,
        Reason.MODEL_FAMILY_NOT_ACCEPTED,
        Reason.PARAMETERS_UNKNOWN,
        Reason.TIME_LIMIT_TOO_LONG,
        Reason.NO_LANE,
        Reason.GPU_COUNT_NOT_ALLOWED,
        Reason.FEATURE_NOT_SERVED,
    ]
    assert found.score is None
    assert all(r.counterfactual for r in found.refusals if r.reason is not Reason.NO_LANE)


def test_what_the_policy_guesses_about_unknown_models_is_taken() -> None:
    guessing = {"filters": {"unknownFamily": "0.5", "unknownParameters": 2_000_000}}
    found = evaluated({"model": "tiiuae/falcon", "parameters": None}, guessing)
    assert found.refusals == ()
    assert found.size_class == "Medium"
    assert found.gpus == 2
    assert found.score is not None
    assert {t.name: t.value for t in found.score.terms}["ModelPerformance"] == "0.1250"


def test_a_policy_without_bounds_refuses_nothing_and_gives_full_time_efficiency() -> None:
    found = evaluated({"hours": 900}, {"filters": {"minScore": None, "maxTimeLimitSeconds": None}})
    assert found.refusals == ()
    assert found.score is not None
    assert {t.name: t.value for t in found.score.terms}["TimeEfficiency"] == "0.1000"


def test_the_h100_documents_score_of_a_ten_hour_instruct_task_on_an_8b_llama() -> None:
    found = evaluate(spec_of(hours=10), policy_spec(preset="strategy-8xh100"))
    assert found.score is not None
    # 0.35*0.35 + 0.25*0.95 + 0.20*0.90 + 0.10*0.5 + 0.05*0.8 + 0.05*1
    assert found.score.total == Decimal("0.6800")
    assert [(t.name, t.value, t.message) for t in found.score.terms] == [
        ("TaskWeight", "0.1225", "0.35 x 0.35"),
        ("ModelPerformance", "0.2375", "0.25 x 0.95"),
        ("TaskSuccessRate", "0.1800", "0.20 x 0.9"),
        ("TimeEfficiency", "0.0500", "0.10 x 0.5"),
        ("SizeEfficiency", "0.0400", "0.05 x 0.8"),
        ("Bonus", "0.0500", "0.05 x 1"),
    ]
    assert (found.gpus, found.size_class, found.lane) == (2, "Medium", "medium-text")


def test_a_capped_score_shows_the_excess_as_a_negative_term() -> None:
    found = evaluated(policy={"scoring": {"cap": "0.5"}})
    assert found.score is not None
    assert found.score.total == Decimal("0.5000")
    cap = found.score.terms[-1]
    assert cap.name == "Cap"
    assert Decimal(cap.value) < 0
    assert sum(Decimal(t.value) for t in found.score.terms) == found.score.total


def test_a_score_that_equals_the_threshold_is_too_low() -> None:
    capped = {"scoring": {"cap": "0.5"}, "filters": {"minScore": "0.5"}}
    assert [r.reason for r in evaluated(policy=capped).refusals] == [Reason.SCORE_TOO_LOW]
    just_above = {"scoring": {"cap": "0.5"}, "filters": {"minScore": "0.4999"}}
    assert evaluated(policy=just_above).refusals == ()


def test_a_task_types_factor_raises_the_gpus_but_not_the_size_class() -> None:
    factor = {"task_types": [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1", "parameterFactor": "3"}]}  # fmt: skip  # noqa: E501
    found = evaluated({"parameters": 900_000}, factor)
    assert (found.size_class, found.gpus) == ("Small", 2)


def test_a_factor_that_leads_out_of_all_classes_keeps_the_models_own_class() -> None:
    one = {"name": "Only", "minParameters": 0, "maxParameters": 1000000, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}  # fmt: skip  # noqa: E501
    types = [{"name": "InstructText", "accepted": True, "weight": "1", "successRate": "1", "parameterFactor": "9"}]
    assert evaluated({}, {"size_classes": [one], "task_types": types}).gpus == 1


@pytest.mark.parametrize(
    ("offer", "lane", "gpus"),
    [
        ({"model": "x/Qwen-0.5B"}, "small-text", 2),
        ({"model": "x/Qwen-7B"}, "medium-text", 2),
        ({"model": "x/Qwen-13B"}, "large-text", 2),
        ({"model": "x/Qwen-70B"}, "xlarge-text-and-image", 2),
        ({"model": "x/Qwen-70B", "task_type": "Image", "architecture": "flux"}, "xlarge-text-and-image", 1),
        ({"model": "x/Qwen-1B", "task_type": "Image", "architecture": "sdxl"}, "xlarge-text-and-image", 1),
        ({"model": "x/Qwen-0.5B", "gpus": 1}, "small-text", 1),
    ],
)
def test_the_h100_documents_lanes(offer: dict[str, Any], lane: str, gpus: int) -> None:
    found = evaluate(spec_of(**offer), policy_spec(preset="strategy-8xh100"))
    assert (found.lane, found.gpus) == (lane, gpus)


def test_a_policy_that_accepts_nothing_says_so() -> None:
    refusals = evaluated(policy={"task_types": ACCEPTING_NOTHING}).refusals
    assert refusals[0].reason is Reason.TASK_TYPE_NOT_ACCEPTED
