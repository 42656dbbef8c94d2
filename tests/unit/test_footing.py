"""What offers that train the same share is what each of them would have been told on its own."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_builders import policy_spec, spec_of
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicySpec
from taskoffer.api.v1alpha1.learning import Learning
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.decision.compute import Speed, Work, image_seconds, text_seconds
from taskoffer.decision.facts import gather, traits_of
from taskoffer.decision.fit import Fit, Subject, fit, fit_by_copies
from taskoffer.decision.footing import footings_of
from taskoffer.decision.memory import IMAGE_MODELS
from taskoffer.decision.outcomes import NOTHING, Estimate, Kind, Learned, group_of
from taskoffer.decision.prediction import Prediction, outlook_of
from taskoffer.decision.recipe import estimation_of, requested_settings
from taskoffer.decision.sizing import family_of, parameters_of, size_class_of

COUNTS = (1, 2, 4, 8)
POLICIES = [
    policy_spec(preset="expected-value"),
    policy_spec(preset="market-table"),
    policy_spec(preset="strategy-8xh100", estimation={"gpuMemory": "40G", "duration": {"startSeconds": 40}}),
    policy_spec(preset="lab", filters={"unknownParameters": 10**9}, estimation={"gpuMemory": "80G"}),
    policy_spec(
        preset="strategy-8xh100",
        resources=[{"name": "nvidia.com/gpu.shared", "counts": [1], "unitsPerGpu": 2}],
        size_classes=[{"name": "All", "minParameters": 0, "gpus": 1, "sizeEfficiency": "1", "lora": {}, "train": {}}],
        lanes=[],
        estimation={"gpuMemory": "80G", "duration": {"prepareSeconds": 50, "submitSeconds": 70}},
    ),
]
OFFERS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(
            ["meta-llama/Llama-3.1-8B", "somebody/llama-3.1-8b", "LLAMA-3.1-8B", "a/Qwen2.5-0.5B", "b/c", "x/own-8b"]
        ),
        "parameters": st.sampled_from([None, 494_032_768, 8_030_261_248, 8_030_261_249, 70 * 10**9]),
        "task_type": st.sampled_from([kind.value for kind in TaskType]),
        "rows": st.sampled_from([None, 1, 999, 10_000, 77_777_777]),
        "tokens": st.sampled_from([None, None, 1, 1_000_000, 40_000_001]),
        "seconds": st.sampled_from([200, 3600, 71_000]),
        "spec": st.sampled_from([{}, {"clockMode": "Training"}]),
    }
).map(lambda fields: {**fields, "tokens": None} if fields["task_type"] == "Image" else fields)
FACTORS = st.sampled_from(["1", "1.00", "1.07", "3.5"])


def fits_alone(spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, factor: Decimal) -> tuple[Fit, Fit | None]:
    """Return the fit of one offer, from its own name and settings, without a look at anything kept.

    Where it is shared out for the sake of its rank, the second one is that by copies.
    """
    parameters, estimation, image = parameters_of(spec.model, None), estimation_of(policy), spec.dataset.image
    parameters = parameters or policy.filters.unknown_parameters
    assert parameters is not None
    assert estimation is not None
    subject = Subject.of(spec.model, parameters, spec.task_type, image.resolution if image else None)
    asked = requested_settings(spec, policy)
    found = fit.__wrapped__(subject, asked, estimation, gpus, factor)
    return found, fit_by_copies(subject, asked, estimation, gpus, factor) if found.layout.sharded else None


def training_alone(spec: TaskOfferSpec, policy: CapacityPolicySpec, fits: Fit, gpus: int) -> float:
    """Return the seconds of an offer's training and evaluation, straight from the formulas."""
    estimation, train, lora = estimation_of(policy), fits.effective.train, fits.effective.lora
    parameters = parameters_of(spec.model, policy.filters.unknown_parameters)
    assert estimation is not None
    assert estimation.duration is not None
    assert parameters is not None
    duration, rows = estimation.duration, round((spec.dataset.rows or 0) * train.num_train_epochs)
    if train.max_steps > 0:
        rows = train.max_steps * train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    peak = duration.peak_teraflops * 1e12 / (1 if train.bf16 else 2)
    speed = Speed(peak, float(duration.mfu_of(parameters)))
    if spec.dataset.image is not None:
        model = IMAGE_MODELS[spec.model.architecture or Architecture.SDXL]
        seconds = image_seconds(model, spec.dataset.image.resolution, rows, speed, gpus)
    else:
        shape = Subject.of(spec.model, parameters, spec.task_type, None).shape
        assert shape is not None
        tokens, generated, together = float(duration.tokens_per_row), 0, 1.0
        if spec.dataset.tokens is not None and spec.dataset.rows is not None:
            tokens = max(1, spec.dataset.tokens / spec.dataset.rows)
        tokens = min(tokens, train.max_length)
        if spec.task_type is TaskType.GRPO:
            # The trainer's defaults: 4 completions of at most 256 tokens; a step is drawn 4 times as fast as trained.
            assert train.grpo is None
            rows *= 4
            tokens, generated = max(1, min(tokens, train.max_length - 256)), min(256, duration.generated_tokens_per_row)
            at_once = train.per_device_train_batch_size * gpus
            step = math.ceil(at_once * train.gradient_accumulation_steps / 4) * 4
            together = step / math.ceil(step / (4 * at_once))
        work = Work(
            task=spec.task_type,
            rows=rows,
            tokens_per_row=tokens,
            adapter_parameters=shape.adapter_parameters(lora.r, lora.target_modules),
            checkpointing=train.gradient_checkpointing,
            generated_tokens_per_row=generated,
            rows_per_generation=together,
            compared=spec.task_type is TaskType.GRPO,
        )
        seconds = text_seconds(shape, parameters, work, speed, gpus)
    return seconds * (1 + float(duration.evaluation_share))


def check(found: Prediction | None, spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int) -> None:
    """Hold a prediction against the long way."""
    assert found is not None
    alone, by_copies = fits_alone(spec, policy, gpus, found.known.memory_factor)
    estimation = estimation_of(policy)
    assert estimation is not None
    steps = alone.effective.train.max_steps
    if estimation.duration is None or not alone.fits or (spec.dataset.rows is None and steps <= 0):
        assert found.fit == alone
        assert found.finish is None
        return
    assert found.finish is not None
    if by_copies is not None and found.fit == by_copies:
        # Only where the larger rank would end too late.
        assert found.finish.in_time
        larger = training_alone(spec, policy, alone, gpus) * float(found.known.duration_factor)
        assert larger + found.finish.counted - found.finish.training > found.finish.budget
        alone = by_copies
    assert found.fit == alone
    training = training_alone(spec, policy, alone, gpus) * float(found.known.duration_factor)
    before, duration = estimation.duration.start_seconds, estimation.duration
    assert found.finish.training == pytest.approx(training, rel=1e-12)
    around = duration.prepare_seconds + duration.submit_seconds
    assert found.finish.seconds == pytest.approx(before + training + around, rel=1e-12)
    own_clock = spec.clock_mode is ClockMode.TRAINING
    assert found.finish.counted == (found.finish.training if own_clock else found.finish.seconds)
    assert found.finish.limit == spec.time_limit_seconds
    assert found.finish.gpus == gpus
    by_rows = f"{spec.dataset.rows} rows, {alone.effective.train.num_train_epochs:g} epoch"
    assert found.finish.basis.startswith(f"{steps} steps of" if steps > 0 else by_rows)


def learned(spec: TaskOfferSpec, policy: CapacityPolicySpec, gpus: int, known: Estimate) -> Learned:
    group = group_of(spec, policy)
    assert group is not None
    return Learned(Decimal(5), {Kind(*group, gpus): known})


@given(
    st.lists(st.tuples(OFFERS, st.sampled_from(POLICIES), st.permutations(COUNTS), FACTORS, FACTORS), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_each_offer_is_told_what_it_would_be_told_alone(asked: list[tuple[Any, Any, list[int], str, str]]) -> None:
    for fields, policy, counts, memory, duration in asked:
        spec = spec_of(**fields)
        known = Estimate(memories=4, memory_factor=Decimal(memory), durations=4, duration_factor=Decimal(duration))
        if footings_of(spec, policy) is None:
            assert outlook_of(spec, policy).on(counts[0]) is None
            continue
        if group_of(spec, policy) is None:
            with pytest.raises(ValueError, match=f"no settings for {spec.task_type.value} on {spec.model.name}"):
                outlook_of(spec, policy).on(counts[0])
            continue
        outlook = outlook_of(spec, policy, learned(spec, policy, counts[0], known))
        assert outlook.on(counts[0]) is not None
        assert outlook.known(counts[0]) is known
        for gpus in counts:
            check(outlook.on(gpus), spec, policy, gpus)
            check(outlook_of(spec, policy).on(gpus), spec, policy, gpus)
        gathered = gather(spec, policy, "default", learned(spec, policy, counts[0], known))
        assert gathered.outlook is not None
        assert [gathered.outlook.on(gpus) for gpus in counts] == [outlook.on(gpus) for gpus in counts]


@pytest.mark.parametrize(
    ("hours", "layout", "rank", "in_time"),
    [
        # 1868 is half of what the widest layer can hold (0.5 * 5120 * 13824 / 18944); a copy has room for 285.
        (10, "4 GPUs, FSDP", 1868, True),
        (2, "4 GPUs, DDP", 285, True),
        # Nothing helps: the rank that was asked for counts.
        (1, "4 GPUs, FSDP", 1868, False),
    ],
)
def test_a_rank_that_costs_the_deadline_gives_way(hours: float, layout: str, rank: int, in_time: bool) -> None:
    spec = spec_of(model="Qwen/Qwen2.5-14B-Instruct", rows=160_000, hours=hours)
    found = outlook_of(spec, policy_spec(preset="strategy-maximum-accuracy")).on(4)
    assert found is not None
    assert (found.fit.layout.name, found.fit.effective.lora.r, found.holds) == (layout, rank, in_time)
    said = next(clamp.message for clamp in found.fit.clamps if clamp.field == "lora.r")
    assert said.endswith("in shares (FSDP) a larger one fits, and ends too late") == (hours == 2)


@given(st.lists(st.tuples(OFFERS, st.sampled_from(POLICIES)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_what_a_policy_knows_of_an_offer_is_what_its_name_and_size_say(asked: list[tuple[Any, Any]]) -> None:
    for fields, policy in asked:
        spec = spec_of(**fields)
        found, parameters = traits_of(spec, policy), parameters_of(spec.model, policy.filters.unknown_parameters)
        assert found.parameters == parameters
        assert found.family is family_of(spec.model.name, policy.families)
        assert found.size is (size_class_of(parameters, policy.size_classes) if parameters else None)
        assert found.group == group_of(spec, policy)
        assert found.task is next((task for task in policy.task_types if task.name is spec.task_type), None)
        assert found.footings is footings_of(spec, policy)


def test_offers_that_train_the_same_share_their_footings_and_others_do_not() -> None:
    policy, other = POLICIES[0], POLICIES[0].model_copy()
    one = footings_of(spec_of(model="a/Llama-3.1-8B", rows=5), policy)
    assert one is not None
    assert footings_of(spec_of(model="b/llama-3.1-8b-instruct", rows=7_000, hours=9), policy) is one
    assert footings_of(spec_of(model="a/Llama-3.1-8B", task_type="DPO"), policy) is not one
    assert footings_of(spec_of(model="a/Mistral-8B"), policy) is not one
    assert footings_of(spec_of(model="a/Llama-3.1-8B"), other) is not one


def test_offers_that_train_the_same_share_their_footings_and_not_the_length_of_their_rows() -> None:
    policy = POLICIES[0]
    silent, short, long = (
        spec_of(model="a/Llama-3.1-8B", rows=100_000, hours=9, tokens=tokens) for tokens in (None, 10**7, 10**8)
    )
    assert footings_of(silent, policy) is footings_of(short, policy) is footings_of(long, policy)
    for spec, said in ((short, "100 tokens (declared)"), (long, "1000 tokens (declared)"), (silent, "400 tokens")):
        found = outlook_of(spec, policy).on(2)
        assert found is not None
        assert found.finish is not None
        assert f"epoch(s) of {said}, MFU" in found.finish.basis
        gathered = gather(spec, policy, "default", NOTHING).prediction
        assert gathered is not None
        assert gathered.finish is not None
        assert f"epoch(s) of {said}, MFU" in gathered.finish.basis


def test_what_outcomes_correct_leaves_the_plan_as_it_was() -> None:
    footings = footings_of(spec_of(model="a/Llama-3.1-8B"), policy_spec(preset="expected-value", learning=Learning()))
    assert footings is not None
    planned, corrected = footings.on(1), footings.on(1, Decimal(2))
    assert planned is not None
    assert corrected is not None
    assert corrected.fit.peak != planned.fit.peak
    assert footings.on(1) is planned
    assert footings.on(1, Decimal(2)) is corrected
