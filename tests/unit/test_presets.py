"""The presets against their documents: every number was worked out by hand from the text, none by the program.

A sum of literals is a score, term by term in the order of the preset's formula; ``3 * 7`` in a size is a factor times
billions of parameters.
"""

from __future__ import annotations

import itertools
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_builders import answers, at, claim, cycle, node, offer, policy, policy_spec, spec_of
from crd_schema import faults, schema_of
from taskoffer import presets
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.cli.main import main
from taskoffer.decision.evaluate import Evaluation, evaluate
from taskoffer.decision.ledger import NodeView, Release
from taskoffer.decision.outcomes import NOTHING, Learned
from taskoffer.decision.recipe import requested_settings
from taskoffer.decision.snapshot import OfferView, PolicyView
from taskoffer.decision.verdict import Verdict

H100 = "strategy-8xh100"
ACCURACY = "strategy-maximum-accuracy"
BALANCED = "balanced-4"
MARKET = "market-table"
EXPECTED = "expected-value"
SOUND = "sound"
WRITTEN = [H100, ACCURACY, BALANCED, MARKET, EXPECTED, SOUND]
"""The presets that stand for a document."""

TYPES = ["InstructText", "GRPO", "Image", "DPO", "Chat"]
BILLION = 10**9
H100_NODE = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def judged(preset: str, changes: dict[str, Any] | None = None, **fields: Any) -> Evaluation:
    """Evaluate an offer under a preset, some of whose fields are changed."""
    return evaluate(spec_of(**fields), policy_spec(preset=preset, **(changes or {})))


def reasons(preset: str, changes: dict[str, Any] | None = None, **fields: Any) -> set[Reason]:
    """Return what a preset has against an offer, apart from what this version's trainers cannot do."""
    found = {refusal.reason for refusal in judged(preset, changes, **fields).refusals}
    return found - {Reason.FEATURE_NOT_SERVED}


# Scores

FIRST_FORMULA = [
    # 0.35 x weight + 0.25 x family + 0.20 x 0.90 + 0.10 x (1 - hours / 20) + 0.05 x size efficiency + 0.05 x 1
    (H100, "InstructText", "x/llama-8b", 10, "0.1225 0.2375 0.1800 0.0500 0.0400 0.0500", "0.6800"),
    (H100, "InstructText", "x/codellama-34b", 1, "0.1225 0.2250 0.1800 0.0950 0.0300 0.0500", "0.7025"),
    (H100, "InstructText", "x/qwen-0.5b", 20, "0.1225 0.2125 0.1800 0.0000 0.0500 0.0500", "0.6150"),
    (H100, "GRPO", "x/mistral-7b", 5, "0.1050 0.2250 0.1800 0.0750 0.0400 0.0500", "0.6750"),
    (H100, "GRPO", "x/gemma-2b", 12, "0.1050 0.2000 0.1800 0.0400 0.0500 0.0500", "0.6250"),
    (H100, "GRPO", "x/DeepSeek-R1-Distill-Qwen-7B", 2, "0.1050 0.2125 0.1800 0.0900 0.0400 0.0500", "0.6775"),
    # 19.99 hours leave 0.0005 of the time, and a tenth of that is rounded half up.
    (H100, "Image", "x/phi-4-70b", 19.99, "0.0700 0.1875 0.1800 0.0001 0.0200 0.0500", "0.5076"),
    (H100, "DPO", "x/llama-8b", 10, "0.0525 0.2375 0.1800 0.0500 0.0400 0.0500", "0.6100"),
    # The same formula over 48 hours, with two size classes.
    (BALANCED, "InstructText", "x/llama-8b", 12, "0.1225 0.2375 0.1800 0.0750 0.0500 0.0500", "0.7150"),
    (BALANCED, "Chat", "x/qwen-7b", 24, "0.0875 0.2125 0.1800 0.0500 0.0500 0.0500", "0.6300"),
    (BALANCED, "DPO", "x/phi-4-34b", 40, "0.0525 0.1875 0.1800 0.0167 0.0300 0.0500", "0.5167"),
    (BALANCED, "Image", "x/unheard-of-1b", 12, "0.0700 0.1875 0.1800 0.0750 0.0500 0.0500", "0.6125"),
]
SECOND_FORMULA = [
    # 0.15 x weight + 0.15 x family + 0.15 x 0.90 + 0.40 + 0.35, and what is above 1
    (ACCURACY, "InstructText", "x/llama-8b", 10, "0.0525 0.1425 0.1350 0.4000 0.3500 -0.0800", "1.0000"),
    (ACCURACY, "GRPO", "x/qwen-7b", 96, "0.0450 0.1275 0.1350 0.4000 0.3500 -0.0575", "1.0000"),
    (ACCURACY, "Image", "x/gemma-2b", 1, "0.0300 0.1200 0.1350 0.4000 0.3500 -0.0350", "1.0000"),
    (ACCURACY, "DPO", "x/phi-4-14b", 1, "0.0225 0.1125 0.1350 0.4000 0.3500 -0.0200", "1.0000"),
    (ACCURACY, "Chat", "x/unheard-of-1b", 1, "0.0375 0.1125 0.1350 0.4000 0.3500 -0.0350", "1.0000"),
]
MARKET_WEIGHTS = [
    (MARKET, "InstructText", "x/llama-8b", 1, "0.3500", "0.3500"),
    (MARKET, "Chat", "x/phi-4-14b", 9, "0.3500", "0.3500"),
    (MARKET, "GRPO", "x/qwen-7b", 1, "0.3000", "0.3000"),
    (MARKET, "Image", "x/unheard-of-1b", 1, "0.2000", "0.2000"),
    (MARKET, "DPO", "x/mistral-7b", 1, "0.1500", "0.1500"),
]


@pytest.mark.parametrize(
    ("preset", "task", "model", "hours", "terms", "total"), [*FIRST_FORMULA, *SECOND_FORMULA, *MARKET_WEIGHTS]
)
def test_the_score_is_the_documents_term_by_term(
    preset: str, task: str, model: str, hours: float, terms: str, total: str
) -> None:
    score = judged(preset, task_type=task, model=model, hours=hours).score
    assert score is not None
    assert [term.value for term in score.terms] == terms.split()
    assert score.total == Decimal(total) == sum(map(Decimal, terms.split()))


THRESHOLDS = [(H100, "0.45"), (BALANCED, "0.60"), (ACCURACY, "0.85")]


@pytest.mark.parametrize(("preset", "threshold"), THRESHOLDS)
def test_a_score_has_to_be_above_the_threshold(preset: str, threshold: str) -> None:
    # No offer scores so little under the documents' formulas, so the cap brings the score there.
    above = str(Decimal(threshold) + Decimal("0.0001"))
    assert reasons(preset, {"scoring": {"cap": threshold}}, hours=1) == {Reason.SCORE_TOO_LOW}
    assert reasons(preset, {"scoring": {"cap": above}}, hours=1) == set()


@pytest.mark.parametrize(
    ("hours", "score", "refused"),
    [
        # 0.0875 + 0.2125 + 0.18 + 0.05 + 0.05 = 0.58, and a tenth of the time that is left of 48 hours
        (38, "0.6008", set()),
        (38.4, "0.6000", {Reason.SCORE_TOO_LOW}),
        (40, "0.5967", {Reason.SCORE_TOO_LOW}),
    ],
)
def test_the_four_job_columns_threshold_tells_offers_apart(hours: float, score: str, refused: set[Reason]) -> None:
    found = judged(BALANCED, task_type="Chat", model="x/qwen-7b", hours=hours).score
    assert found is not None
    assert found.total == Decimal(score)
    assert reasons(BALANCED, task_type="Chat", model="x/qwen-7b", hours=hours) == refused


def test_neither_document_nor_market_refuses_any_accepted_offer_for_its_score() -> None:
    worst = {"task_type": "Image", "model": "x/phi-4-2b", "hours": 19.9}
    assert reasons(H100, **worst) == reasons(ACCURACY, **worst) == reasons(MARKET, **worst) == set()


# Acceptance

HOURS = [
    (H100, 20 * 3600, True),
    (H100, round(19.99 * 3600), False),
    (H100, 20 * 3600 - 1, False),
    (ACCURACY, 96 * 3600, False),
    (ACCURACY, 96 * 3600 + 1, True),
    (BALANCED, 48 * 3600, True),
    (BALANCED, 48 * 3600 - 1, False),
    (MARKET, 365 * 86400, False),
    (EXPECTED, 365 * 86400, False),
    (SOUND, 365 * 86400, False),
]


@pytest.mark.parametrize(("preset", "seconds", "refused"), HOURS)
def test_how_long_a_task_may_take(preset: str, seconds: int, refused: bool) -> None:
    assert (Reason.TIME_LIMIT_TOO_LONG in reasons(preset, seconds=seconds)) is refused


BY_FAMILY: dict[str, Any] = {
    "scoring": {"terms": [{"name": "ModelPerformance", "weight": "1"}], "expectedValue": None, "cap": None},
    "gpu_choice": None,
    "preemption": None,
}
"""A score of nothing but the family's success rate."""
ACCEPTED = [(preset, set(TYPES)) for preset in WRITTEN[1:]] + [(H100, {"InstructText", "GRPO", "Image"})]


@pytest.mark.parametrize(("preset", "accepted"), ACCEPTED)
def test_which_task_types_are_taken(preset: str, accepted: set[str]) -> None:
    taken = {task for task in TYPES if Reason.TASK_TYPE_NOT_ACCEPTED not in reasons(preset, task_type=task)}
    assert taken == accepted


FAMILIES = {
    "meta-llama/Llama-3.1-8B": "0.95",
    "mistralai/Mistral-7B-v0.3": "0.90",
    "Qwen/Qwen2.5-7B": "0.85",
    "google/gemma-2-9b": "0.80",
    "microsoft/phi-4-14b": "0.75",
    "codellama/CodeLlama-7b-hf": "0.90",
    "deepseek-ai/deepseek-llm-7b-base": "0.85",
}
UNKNOWN_FAMILY = [(ACCURACY, "0.75"), (BALANCED, "0.75"), (MARKET, "0.85"), (EXPECTED, "0.85"), (SOUND, "0.85")]


@pytest.mark.parametrize("preset", WRITTEN)
@pytest.mark.parametrize(("model", "rate"), FAMILIES.items())
def test_the_seven_families_are_taken_at_their_success_rates(preset: str, model: str, rate: str) -> None:
    found = judged(preset, BY_FAMILY, model=model)
    assert found.score is not None
    assert found.score.total == Decimal(rate)
    assert Reason.MODEL_FAMILY_NOT_ACCEPTED not in reasons(preset, model=model)


@pytest.mark.parametrize(
    ("model", "architecture"), [("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"), ("x/FLUX.1-dev", "flux")]
)
def test_every_preset_takes_the_image_models_once_their_size_is_given(model: str, architecture: str) -> None:
    fields = {"task_type": "Image", "model": model, "architecture": architecture, "parameters": 3 * BILLION}
    assert {preset: reasons(preset, **fields) for preset in WRITTEN} == {preset: set() for preset in WRITTEN}


def test_the_first_document_refuses_other_families() -> None:
    assert reasons(H100, model="tiiuae/falcon-7b") == {Reason.MODEL_FAMILY_NOT_ACCEPTED}


@pytest.mark.parametrize(("preset", "rate"), UNKNOWN_FAMILY)
def test_what_other_families_count_as(preset: str, rate: str) -> None:
    plain = {"scoring": {"terms": [{"name": "ModelPerformance", "weight": "1"}], "expectedValue": None, "cap": None}}
    found = judged(
        preset,
        {**plain, "gpu_choice": None, "preemption": None, "filters": {"minScore": None}},
        model="tiiuae/falcon-7b",
    )
    assert found.refusals == ()
    assert found.score is not None
    assert found.score.total == Decimal(rate)


@pytest.mark.parametrize("preset", WRITTEN)
def test_models_of_unknown_size_are_taken_by_the_markets_presets_only(preset: str) -> None:
    refused = Reason.PARAMETERS_UNKNOWN in reasons(preset, model="x/llama")
    assert refused is (preset not in (MARKET, EXPECTED, SOUND))


def test_a_policy_that_counts_deepseeks_distillates_as_qwen_names_them_in_full() -> None:
    families = presets.load(H100)["spec"]["families"]
    longer = [
        {**f, "patterns": [*f["patterns"], "deepseek-r1-distill-qwen"]} if f["name"] == "Gemma" else f for f in families
    ]
    score = judged(H100, {"families": longer}, model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B").score
    assert score is not None
    assert {term.name: term.value for term in score.terms}["ModelPerformance"] == "0.2000"


# Sizes, GPUs, lanes

SIZES = [
    (H100, 1, "Small", 2),
    (H100, 7 * BILLION - 1, "Small", 2),
    (H100, 7 * BILLION, "Medium", 2),
    (H100, 13 * BILLION - 1, "Medium", 2),
    (H100, 13 * BILLION, "Large", 2),
    (H100, 70 * BILLION - 1, "Large", 2),
    (H100, 70 * BILLION, "XLarge", 2),
    (H100, 700 * BILLION, "XLarge", 2),
    (ACCURACY, 1, "All", 4),
    (ACCURACY, 700 * BILLION, "All", 4),
    (BALANCED, 13 * BILLION - 1, "UpTo13B", 2),
    (BALANCED, 13 * BILLION, "Larger", 2),
]


@pytest.mark.parametrize(("preset", "parameters", "name", "gpus"), SIZES)
def test_sizes_and_their_gpus(preset: str, parameters: int, name: str, gpus: int) -> None:
    found = judged(preset, parameters=parameters)
    assert (found.size_class, found.gpus) == (name, gpus)


LANES = [
    ("InstructText", "Small", "small-text", 2),
    ("GRPO", "Medium", "medium-text", 2),
    ("InstructText", "Large", "large-text", 2),
    ("GRPO", "XLarge", "xlarge-text-and-image", 2),
    ("sdxl", "Small", "xlarge-text-and-image", 1),
    ("flux", "Medium", "xlarge-text-and-image", 1),
]
OF_CLASS = {"Small": BILLION, "Medium": 7 * BILLION, "Large": 13 * BILLION, "XLarge": 70 * BILLION}
LENDERS = {
    "small-text": ("medium-text", "large-text", "xlarge-text-and-image"),
    "medium-text": ("large-text", "small-text", "xlarge-text-and-image"),
    "large-text": ("medium-text", "small-text", "xlarge-text-and-image"),
    "xlarge-text-and-image": ("large-text", "medium-text", "small-text"),
}


@pytest.mark.parametrize(("kind", "size", "lane", "gpus"), LANES)
def test_the_first_documents_lanes_and_from_whom_they_borrow(kind: str, size: str, lane: str, gpus: int) -> None:
    task = {"task_type": "Image", "architecture": kind} if kind in ("sdxl", "flux") else {"task_type": kind}
    found = judged(H100, parameters=OF_CLASS[size], **task)
    assert (found.lane, found.gpus, found.borrows_from) == (lane, gpus, LENDERS[lane])


def ruled(preset: str, **changes: Any) -> PolicyView:
    return policy("rules", preset=preset, **changes)


def h100_node(name: str = "node-a", gpus: int = 8) -> NodeView:
    return node(name, gpus, labels=H100_NODE)


def task(name: str, order: int, billions: int = 1, **fields: Any) -> OfferView:
    given = {"model": "x/llama", "parameters": billions * BILLION, "hours": 15, "created": at(order), **fields}
    return offer(name, **given)


def lanes_of(pending: list[OfferView]) -> dict[str, str | None]:
    made = cycle(pending, policies=[ruled(H100)], nodes=[h100_node()])
    return {
        d.offer.key.name: d.answer.admission.assignments[0].lane if d.answer.admission else d.answer.reason.value
        for d in made.decisions
    }


def test_one_kind_of_task_alone_fills_all_lanes_in_the_order_of_their_lenders() -> None:
    assert lanes_of([task(f"s{i}", i) for i in range(5)]) == {
        "s0": "small-text",
        "s1": "medium-text",
        "s2": "large-text",
        "s3": "xlarge-text-and-image",
        "s4": "WaitingForLane",
    }


def test_each_lanes_own_tasks_come_before_borrowers() -> None:
    pending = [task("s0", 0), task("s1", 1), task("m", 2, 8), task("l", 3, 14), task("m1", 4, 8)]
    assert lanes_of(pending) == {
        "s0": "small-text",
        "m": "medium-text",
        "l": "large-text",
        "s1": "xlarge-text-and-image",
        "m1": "WaitingForLane",
    }


@pytest.mark.parametrize(
    ("billions", "types", "gpus"),
    [
        ("0.000000001", "InstructText Chat", 1),
        ("4", "InstructText Chat", 1),
        ("4.000000001", "InstructText Chat", 2),
        ("7", "InstructText Chat", 2),
        ("8.03", "InstructText Chat", 2),
        ("12", "InstructText Chat", 2),
        ("12.000000001", "InstructText Chat", 4),
        ("40", "InstructText Chat", 4),
        ("40.000000001", "InstructText Chat", 8),
        ("70", "InstructText Chat GRPO DPO", 8),
        # Three times the size: 3 x 1.333333333 = 3.999999999
        ("1.333333333", "DPO", 1),
        ("1.333333334", "DPO", 2),
        ("4", "DPO", 2),
        ("4.000000001", "DPO", 4),
        ("7", "DPO", 4),
        ("13.333333333", "DPO", 4),
        ("13.333333334", "DPO", 8),
        ("14", "DPO", 8),
        # Twice the size
        ("2", "GRPO", 1),
        ("2.000000001", "GRPO", 2),
        ("6", "GRPO", 2),
        ("6.000000001", "GRPO", 4),
        ("20", "GRPO", 4),
        ("20.000000001", "GRPO", 8),
        # One GPU whatever the size
        ("0.9", "Image", 1),
        ("12", "Image", 1),
        ("41", "Image", 1),
        ("1000", "Image", 1),
        ("unknown", "InstructText Chat GRPO DPO Image", 1),
    ],
)
def test_the_markets_table_of_gpus(billions: str, types: str, gpus: int) -> None:
    parameters = None if billions == "unknown" else int(Decimal(billions) * BILLION)
    found = {
        task: judged(MARKET, task_type=task, model="x/llama", parameters=parameters).gpus for task in types.split()
    }
    assert found == dict.fromkeys(types.split(), gpus)


def test_the_sound_preset_is_the_markets_table_with_other_training_settings() -> None:
    sound, market = (policy_spec(preset=name).model_dump() for name in (SOUND, MARKET))
    for made in (sound, market):
        for size in made["size_classes"]:
            del size["lora"], size["train"]
        for rule in made["task_types"]:
            del rule["lora_rank_factor"], rule["learning_rate_factor"]
            if rule["name"] == "GRPO":
                del rule["train"]
    assert sound == market


# What is learned


LEARNING = [MARKET, EXPECTED, SOUND]


@pytest.mark.parametrize("preset", presets.names())
def test_the_presets_whose_numbers_are_ours_learn_with_the_defaults_and_the_documents_do_not(preset: str) -> None:
    assert policy_spec(preset=preset).learning == (Learning() if preset in LEARNING else None)


@pytest.mark.parametrize("learned", [NOTHING, Learned(Decimal(10))], ids=["nothing yet", "no outcome"])
@pytest.mark.parametrize("task", TYPES)
@pytest.mark.parametrize("preset", LEARNING)
def test_without_outcomes_a_preset_that_learns_answers_with_its_own_numbers(
    preset: str, task: str, learned: Learned
) -> None:
    learns = policy_spec(preset=preset)
    fixed = learns.model_copy(update={"learning": None})
    for billions, rows, hours in itertools.product((1, 8, 70), (None, 20_000, 900_000), (1, 12)):
        spec = spec_of(task_type=task, parameters=billions * BILLION, rows=rows, hours=hours)
        found, before = evaluate(spec, learns, "default", learned), evaluate(spec, fixed, "default")
        assert found.estimates == before.estimates
        assert found._replace(group=None) == before


# Concurrency and a full node


def verdicts(preset: str, pending: int, **world: Any) -> list[str]:
    made = cycle([task(f"o{i}", i) for i in range(pending)], policies=[ruled(preset)], **world)
    return [answers(made)[f"o{i}"][1] for i in range(pending)]


ROOMY = [h100_node(f"n{i}", 8) for i in range(8)]


def test_twelve_jobs_run_at_a_time_where_gpus_and_lanes_suffice() -> None:
    eleven = [claim(f"x{i}", f"n{i % 8}", 1, policy="rules") for i in range(11)]
    assert verdicts(H100, 2, nodes=ROOMY, claims=eleven) == ["Admitted", "WaitingForJobSlot"]


def test_two_jobs_run_at_a_time_for_maximum_accuracy_and_a_third_is_refused() -> None:
    assert verdicts(ACCURACY, 3, nodes=ROOMY) == ["Admitted", "Admitted", "CapacityFull"]


def test_four_jobs_run_at_a_time_in_the_four_job_column_and_a_fifth_waits() -> None:
    assert verdicts(BALANCED, 5, nodes=ROOMY) == ["Admitted"] * 4 + ["WaitingForJobSlot"]


FULL = [
    (H100, Verdict.WAIT, "WaitingForCapacity"),
    (ACCURACY, Verdict.REJECT, "CapacityFull"),
    (BALANCED, Verdict.WAIT, "WaitingForCapacity"),
    (MARKET, Verdict.WAIT, "WaitingForCapacity"),
    (EXPECTED, Verdict.WAIT, "WaitingForCapacity"),
    (SOUND, Verdict.WAIT, "WaitingForCapacity"),
]


@pytest.mark.parametrize(("preset", "verdict", "reason"), FULL)
def test_what_becomes_of_an_offer_when_all_gpus_are_booked(preset: str, verdict: Verdict, reason: str) -> None:
    made = cycle(
        [task("o", 0, 8, rows=10_000)], policies=[ruled(preset)], nodes=[h100_node()], claims=[claim("x", count=8)]
    )
    assert answers(made)["o"] == (verdict.value, reason)


@pytest.mark.parametrize("preset", WRITTEN)
def test_without_a_node_every_preset_waits(preset: str) -> None:
    made = cycle([task("o", 0, 8, rows=10_000)], policies=[ruled(preset)], nodes=[node(labels={"other": "node"})])
    assert answers(made)["o"] == ("Wait", "InventoryNotReady")


@pytest.mark.parametrize("preset", [H100, BALANCED, MARKET])
def test_paid_work_comes_before_tournaments_and_those_before_benchmarks(preset: str) -> None:
    pending = [
        task("bench", 0, priority_class="benchmark"),
        task("plain", 1),
        task("paid", 2, priority_class="organic"),
    ]
    # As many GPUs are free as the preset gives one such model.
    free = {H100: 2, BALANCED: 2, MARKET: 1}[preset]
    made = cycle(pending, policies=[ruled(preset)], nodes=[h100_node()], claims=[claim("x", count=8 - free)])
    admitted = [name for name, (verdict, _) in answers(made).items() if verdict == "Admit"]
    assert admitted == ["paid"]
    without = cycle(pending[:2], policies=[ruled(preset)], nodes=[h100_node()], claims=[claim("x", count=8 - free)])
    assert answers(without)["plain"] == ("Admit", "Admitted")


def test_a_task_of_eight_gpus_keeps_a_node_under_the_markets_table() -> None:
    large, ends = task("large", 0, 8, gpus=8), [Release("x", "node-a", 1, at(60))]
    booked = {"nodes": [h100_node()], "claims": [claim("x", count=1)], "releases": ends}
    made = cycle([large, task("small", 1)], policies=[ruled(MARKET)], **booked)
    assert answers(made)["large"] == ("Wait", "WaitingForCapacity")
    assert answers(made)["small"] == ("Wait", "WaitingBehindReservation")


# Training settings

FIRST_SETTINGS = [
    # Ranks x 1.4, 1.6 and 1.5, and alphas with them, rounded half up; rates x 1.2, 0.85 and 1.15. The document's
    # batches are those of text; 4 pictures in a step are ours.
    ("Small", "InstructText", 358, 90, 0.05, 4.8e-4, 16, 1),  # 256 x 1.4 = 358.4, 64 x 1.4 = 89.6
    ("Small", "GRPO", 410, 102, 0.05, 3.4e-4, 16, 1),  # 409.6, 102.4
    ("Small", "Image", 384, 96, 0.05, 4.6e-4, 4, 1),
    ("Medium", "InstructText", 717, 179, 0.1, 3.6e-4, 8, 2),  # 716.8, 179.2
    ("Medium", "GRPO", 819, 205, 0.1, 2.55e-4, 8, 2),  # 819.2, 204.8
    ("Medium", "Image", 768, 192, 0.1, 3.45e-4, 4, 1),
    ("Large", "InstructText", 1434, 358, 0.15, 2.4e-4, 4, 4),  # 1433.6, 358.4
    ("Large", "GRPO", 1638, 410, 0.15, 1.7e-4, 4, 4),  # 1638.4, 409.6
    ("Large", "Image", 1536, 384, 0.15, 2.3e-4, 4, 1),
    ("XLarge", "InstructText", 2867, 717, 0.2, 1.2e-4, 2, 8),  # 2867.2, 716.8
    ("XLarge", "GRPO", 3277, 819, 0.2, 8.5e-5, 2, 8),  # 3276.8, 819.2
    ("XLarge", "Image", 3072, 768, 0.2, 1.15e-4, 4, 1),
]


@pytest.mark.parametrize(("size", "kind", "r", "alpha", "dropout", "rate", "batch", "steps"), FIRST_SETTINGS)
def test_the_first_documents_settings_by_size_and_task_type(
    size: str, kind: str, r: int, alpha: int, dropout: float, rate: float, batch: int, steps: int
) -> None:
    found = requested_settings(spec_of(task_type=kind, parameters=OF_CLASS[size]), policy_spec(preset=H100))
    assert (found.lora.r, found.lora.lora_alpha, found.lora.lora_dropout) == (r, alpha, dropout)
    assert found.train.learning_rate == pytest.approx(rate, rel=1e-12)
    assert (found.train.per_device_train_batch_size, found.train.gradient_accumulation_steps) == (batch, steps)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "Image"])
@pytest.mark.parametrize("billions", [1, 8, 70])
def test_the_second_document_trains_every_task_of_text_alike(kind: str, billions: int) -> None:
    found = requested_settings(spec_of(task_type=kind, parameters=billions * BILLION), policy_spec(preset=ACCURACY))
    assert (found.lora.r, found.lora.lora_alpha, found.lora.lora_dropout) == (8192, 2048, 0.05)
    assert found.lora.target_modules == "q_proj,v_proj,k_proj,o_proj,gate_proj,up_proj,down_proj"
    assert (found.train.per_device_train_batch_size, found.train.gradient_accumulation_steps) == (128, 1)
    assert (found.train.max_length, found.train.bf16) == (8192, True)
    assert (found.train.torch_compile, found.train.gradient_checkpointing) == (True, True)


@pytest.mark.parametrize(
    ("preset", "kind", "billions", "r", "alpha", "batch", "steps", "rate"),
    [
        # "Batch size 16-32, LoRA rank 1024-2048, gradient accumulation 1-2"; alpha is a quarter in both documents.
        (BALANCED, "InstructText", 8, 1024, 256, 32, 1, 3e-4),
        (BALANCED, "DPO", 13, 2048, 512, 16, 2, 2e-4),
        # Ranks of 32 to 128 and alpha twice the rank, from 1e-4 to 8e-5 above 4B; a tenth of it for DPO and GRPO.
        (MARKET, "InstructText", 4, 32, 64, 16, 1, 2e-4),
        (MARKET, "Chat", 8, 64, 128, 8, 1, 1e-4),
        (MARKET, "GRPO", 8, 64, 128, 8, 1, 1e-5),
        (MARKET, "DPO", 30, 128, 256, 4, 1, 1e-5),
        (MARKET, "DPO", 70, 128, 256, 2, 2, 8e-6),
        (EXPECTED, "GRPO", 8, 64, 128, 8, 1, 1e-5),
    ],
)
def test_the_other_presets_settings(
    preset: str, kind: str, billions: int, r: int, alpha: int, batch: int, steps: int, rate: float
) -> None:
    found = requested_settings(spec_of(task_type=kind, parameters=billions * BILLION), policy_spec(preset=preset))
    assert (found.lora.r, found.lora.lora_alpha) == (r, alpha)
    assert (found.train.per_device_train_batch_size, found.train.gradient_accumulation_steps) == (batch, steps)
    assert found.train.learning_rate == pytest.approx(rate, rel=1e-12)


# Lint


@pytest.mark.parametrize(
    ("preset", "code"),
    [(H100, 1), (ACCURACY, 0), (BALANCED, 0), (MARKET, 0), (EXPECTED, 0), (SOUND, 0), ("lab", 0)],
)
def test_lint_ends_with_1_for_presets_that_give_a_size_class_too_few_gpus(
    preset: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preset", preset]) == 0
    path = tmp_path / "policy.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["lint", str(path)]) == code
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Error: ")]
    assert len(errors) == code
    assert all("no usual model of the class fits" in error for error in errors)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_printed_as_the_schema_takes_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The models read numbers from strings, which the API server does not: 8e-05 is a string to YAML 1.1.
    assert main(["preset", name]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert list(faults(schema_of("CapacityPolicy"), printed)) == []


def test_every_preset_but_the_labs_is_checked_here() -> None:
    assert sorted([*WRITTEN, "lab"]) == presets.names()
