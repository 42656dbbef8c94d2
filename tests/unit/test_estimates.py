"""Memory and time of a training, against figures that were simulated or counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.decision.architecture import ModelShape, shape_of, shape_of_size
from taskoffer.decision.compute import Speed, Work, image_seconds, text_seconds
from taskoffer.decision.memory import (
    GIB,
    IMAGE_MODELS,
    Layout,
    Load,
    image_need,
    text_need,
)

SIZES = {
    "meta-llama/Llama-3.2-1B": 1_236_000_000,
    "meta-llama/Llama-3.2-3B": 3_213_000_000,
    "mistralai/Mistral-7B-v0.1": 7_242_000_000,
    "Qwen/Qwen2.5-7B-Instruct": 7_616_000_000,
    "meta-llama/Meta-Llama-3-8B": 8_030_000_000,
    "google/gemma-7b": 8_538_000_000,
    "meta-llama/Llama-2-13b-hf": 13_016_000_000,
    "microsoft/phi-4": 14_660_000_000,
    "Qwen/Qwen2.5-14B": 14_770_000_000,
    "Qwen/Qwen2.5-32B": 32_764_000_000,
    "codellama/CodeLlama-34b-hf": 33_744_000_000,
    "meta-llama/Meta-Llama-3-70B": 70_554_000_000,
    "Qwen/Qwen2.5-72B": 72_706_000_000,
}
"""Exact sizes, counted on the meta device."""
ALIASES = {
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "meta-llama/Llama-3.2-3B",
    "8B": "meta-llama/Meta-Llama-3-8B",
    "13B": "meta-llama/Llama-2-13b-hf",
    "32B": "Qwen/Qwen2.5-32B",
    "70B": "meta-llama/Meta-Llama-3-70B",
    "phi-4": "microsoft/phi-4",
}
ONE, TWO, TWO_SHARDED, FOUR_SHARDED = Layout(1), Layout(2), Layout(2, sharded=True), Layout(4, sharded=True)
H100 = 80e9
"""Bytes of an 80 GB card."""


def known(name: str) -> tuple[ModelShape, int]:
    model = ALIASES[name]
    return shape_of(model, SIZES[model]), SIZES[model]


def load(
    shape: ModelShape, rank: int, length: int, *, task: TaskType = TaskType.INSTRUCT_TEXT, drop: bool = True
) -> Load:
    # What the figures were simulated with: ranks as they were asked for.
    return Load(task, length, rank, shape.adapter_parameters(rank, capped=False), dropout=drop)


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_the_shape_of_a_known_model_accounts_for_its_size(name: str, parameters: int) -> None:
    shape = shape_of(name, parameters)
    assert shape.known
    assert shape.parameters == pytest.approx(parameters, rel=0.001)


@pytest.mark.parametrize(
    ("name", "rank", "billions"),
    [
        ("1B", 256, 0.18),
        ("1B", 8192, 5.8),
        ("3B", 1024, 1.56),
        ("8B", 64, 0.17),
        ("8B", 2048, 5.4),
        ("8B", 8192, 21.5),
        ("13B", 512, 2.0),
        ("32B", 256, 2.1),
        ("70B", 2048, 26.5),
        ("70B", 8192, 106),
        ("phi-4", 64, 0.22),
        ("phi-4", 1024, 3.6),
    ],
)
def test_an_adapter_has_as_many_parameters_as_peft_makes(name: str, rank: int, billions: float) -> None:
    made = known(name)[0].adapter_parameters(rank, capped=False) / 10**9
    assert made == pytest.approx(billions, abs=0.05 if billions > 1 else 0.005)


def test_only_the_layers_that_are_named_are_adapted() -> None:
    shape, _ = known("8B")
    assert shape.adapter_parameters(64, "q_proj, v_proj") == 64 * 32 * (4096 + 4096 + 4096 + 1024)
    assert shape.rank_caps("k_proj") == {409: ("k_proj",)}
    assert shape.adapter_parameters(64, "named_otherwise") == shape.adapter_parameters(64)


def test_without_bfloat16_everything_but_the_adapter_is_twice_as_wide() -> None:
    shape, parameters = known("8B")
    made = load(shape, 64, 2048)
    half, full = (text_need(shape, parameters, replace(made, bf16=bf16), ONE) for bf16 in (True, False))
    assert (full.weights, full.per_row, full.adapter) == (2 * half.weights, 2 * half.per_row, half.adapter)


def test_a_margin_is_added_to_what_is_guessed_and_not_to_what_is_known() -> None:
    shape, parameters = known("8B")
    made = load(shape, 64, 2048)
    plain, wide = (text_need(shape, parameters, made, TWO, margin) for margin in (0.0, 0.5))
    assert (wide.weights, wide.fixed) == (plain.weights, plain.fixed)
    assert wide.adapter == 1.5 * plain.adapter
    assert (wide.buffers, wide.per_row) == (1.5 * plain.buffers, 1.5 * plain.per_row)


def test_ranks_are_capped_at_half_of_what_a_layer_can_hold() -> None:
    shape, _ = known("8B")
    assert list(shape.rank_caps().items()) == [
        (1592, ("gate_proj", "up_proj", "down_proj")),
        (1024, ("q_proj", "o_proj")),
        (409, ("k_proj", "v_proj")),
    ]
    assert shape.adapter_parameters(8192) < shape.linear_parameters / 2


@pytest.mark.parametrize(
    ("name", "rank", "one", "two", "two_sharded", "four_sharded"),
    [
        ("1B", 64, (164, 82, 20), (161, 80, 20), (165, 82, 20), (167, 83, 20)),
        ("1B", 256, (158, 79, 19), (154, 77, 19), (161, 80, 20), (165, 82, 20)),
        ("3B", 64, (106, 53, 13), (103, 51, 12), (110, 55, 13), (113, 56, 14)),
        ("3B", 256, (97, 48, 12), (93, 46, 11), (106, 53, 13), (111, 55, 13)),
        ("8B", 64, (56, 28, 7), (55, 27, 6), (65, 32, 8), (70, 35, 8)),
        ("8B", 256, (47, 23, 5), (43, 21, 5), (60, 30, 7), (68, 34, 8)),
        ("8B", 1024, (11, 5, 1), (0, 0, 0), (41, 20, 5), (58, 29, 7)),
        ("13B", 64, (35, 17, 4), (33, 16, 4), (47, 23, 5), (53, 26, 6)),
        ("13B", 256, (24, 12, 3), (19, 9, 2), (41, 20, 5), (51, 25, 6)),
        ("32B", 64, (0, 0, 0), (0, 0, 0), (17, 8, 2), (28, 14, 3)),
        ("32B", 1024, (0, 0, 0), (0, 0, 0), (0, 0, 0), (9, 4, 1)),
        ("70B", 64, (0, 0, 0), (0, 0, 0), (0, 0, 0), (10, 5, 1)),
        ("70B", 256, (0, 0, 0), (0, 0, 0), (0, 0, 0), (6, 3, 0)),
    ],
)
def test_the_largest_micro_batch_is_the_simulated_one(
    name: str,
    rank: int,
    one: tuple[int, ...],
    two: tuple[int, ...],
    two_sharded: tuple[int, ...],
    four_sharded: tuple[int, ...],
) -> None:
    shape, parameters = known(name)
    for layout, wanted in zip(
        (ONE, TWO, TWO_SHARDED, FOUR_SHARDED), (one, two, two_sharded, four_sharded), strict=True
    ):
        for length, rows in zip((1024, 2048, 8192), wanted, strict=True):
            need = text_need(shape, parameters, load(shape, rank, length), layout)
            assert need.largest_rows(0.93 * H100) == rows, (layout.name, length)


@pytest.mark.parametrize(
    ("name", "rank", "rows", "layout", "gib"),
    [
        ("1B", 358, 16, TWO, 61),
        ("3B", 358, 16, TWO_SHARDED, 83),
        ("8B", 358, 16, TWO, 148),
        ("8B", 358, 16, FOUR_SHARDED, 122),
        ("13B", 717, 8, TWO_SHARDED, 108),
        ("70B", 2867, 2, FOUR_SHARDED, 227),
    ],
)
def test_the_settings_of_the_first_strategy_need_what_was_simulated(
    name: str, rank: int, rows: int, layout: Layout, gib: float
) -> None:
    shape, parameters = known(name)
    need = text_need(shape, parameters, load(shape, rank, 8192), layout)
    assert need.at(rows) / GIB == pytest.approx(gib, abs=0.6)


@given(
    parameters=st.integers(10**7, 10**12),
    rank=st.integers(1, 4096),
    length=st.sampled_from([512, 2048, 8192]),
    layout=st.sampled_from([ONE, TWO, TWO_SHARDED, FOUR_SHARDED]),
    task=st.sampled_from([TaskType.INSTRUCT_TEXT, TaskType.DPO, TaskType.GRPO]),
    dropout=st.booleans(),
    checkpointing=st.booleans(),
)
def test_the_largest_micro_batch_fits_and_one_more_row_does_not(
    parameters: int, rank: int, length: int, layout: Layout, task: TaskType, dropout: bool, checkpointing: bool
) -> None:
    shape = shape_of_size(parameters)
    made = Load(task, length, rank, shape.adapter_parameters(rank), dropout, checkpointing)
    need, limit = text_need(shape, parameters, made, layout), 0.85 * H100
    rows = need.largest_rows(limit)
    assert rows == 0 or need.at(rows) <= limit * (1 + 1e-9)
    assert need.at(rows + 1) > limit * (1 - 1e-9)


@given(parameters=st.integers(10**8, 10**12))
def test_the_shape_of_an_unknown_model_accounts_for_its_size(parameters: int) -> None:
    shape = shape_of_size(parameters)
    assert not shape.known
    assert shape.parameters == pytest.approx(parameters, rel=0.25 if parameters < 10**9 else 0.05)


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_an_estimated_shape_needs_about_as_much_as_the_real_one(name: str, parameters: int) -> None:
    def rows(shape: ModelShape) -> float:
        made = Load(TaskType.INSTRUCT_TEXT, 2048, 64, shape.adapter_parameters(64), dropout=True)
        return text_need(shape, parameters, made, FOUR_SHARDED).at(2)

    assert rows(shape_of_size(parameters)) == pytest.approx(rows(shape_of(name, parameters)), rel=0.12)


@pytest.mark.parametrize(
    ("name", "size", "known_shape"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct", 8_030_000_000, True),
        ("someone/Llama-3-8B-pruned", 4_500_000_000, False),
        ("someone/anonymous-1234", 8_030_000_000, False),
        ("Qwen/Qwen2.5-Coder-7B", 7_616_000_000, True),
    ],
)
def test_a_name_is_believed_as_long_as_the_size_agrees(name: str, size: int, known_shape: bool) -> None:
    assert shape_of(name, size).known is known_shape


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        shape_of("x", 0)


MFU = {"1B": 0.25, "8B": 0.35, "13B": 0.35, "32B": 0.32, "70B": 0.30}


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "length", "tokens_per_second"),
    [
        ("1B", 256, 1, 1024, 27_000),
        ("1B", 256, 1, 8192, 21_900),
        ("8B", 64, 1, 1024, 7_300),
        ("8B", 64, 1, 8192, 6_200),
        ("8B", 256, 2, 1024, 13_400),
        ("13B", 256, 2, 8192, 6_900),
        ("32B", 128, 4, 1024, 6_200),
        ("70B", 64, 4, 8192, 2_500),
    ],
)
def test_a_gpu_trains_as_many_tokens_as_were_counted(
    name: str, rank: int, gpus: int, length: int, tokens_per_second: float
) -> None:
    shape, parameters = known(name)
    work = Work(TaskType.INSTRUCT_TEXT, 1000, length, shape.adapter_parameters(rank, capped=False))
    seconds = text_seconds(shape, parameters, work, Speed(989e12, MFU[name]), gpus)
    assert 1000 * length / seconds == pytest.approx(tokens_per_second, rel=0.01)


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "instruct", "preference"),
    [("1B", 256, 1, 0.3, 0.8), ("8B", 64, 1, 1.2, 3.1), ("8B", 256, 2, 0.6, 1.6), ("70B", 64, 4, 3.1, 8.2)],
)
def test_ten_thousand_rows_three_times_take_the_known_hours(
    name: str, rank: int, gpus: int, instruct: float, preference: float
) -> None:
    shape, parameters = known(name)
    for task, hours in ((TaskType.INSTRUCT_TEXT, instruct), (TaskType.DPO, preference)):
        work = Work(task, 30_000, 1024, shape.adapter_parameters(rank, capped=False))
        seconds = text_seconds(shape, parameters, work, Speed(989e12, MFU[name]), gpus)
        assert seconds / 3600 == pytest.approx(hours, rel=0.04, abs=0.05)


def test_generating_text_dominates_a_reinforcement_task() -> None:
    shape, parameters = known("8B")
    adapter = shape.adapter_parameters(64)
    speed = Speed(989e12, 0.35)
    work = Work(TaskType.GRPO, 8000, 256, adapter, generated_tokens_per_row=256, rows_per_generation=8)
    trained = Work(TaskType.INSTRUCT_TEXT, 8000, 512, adapter)
    generation = text_seconds(shape, parameters, work, speed, 1) - text_seconds(shape, parameters, trained, speed, 1)
    # 1,000 rounds of 256 tokens, 25.6 ms each: 32 layers of 0.8 ms.
    assert generation == pytest.approx(1000 * 256 * 32 * 0.8e-3)
    assert generation > 5 * text_seconds(shape, parameters, trained, speed, 1)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        # 8B: 32 layers, hidden 4096, intermediate 14336, keys and values 1024, rank 64. Trained: 2 x 4096 x 32 stored,
        # 30 x 4096 + 16 x 14336 + 2.3 x 1024 + 10 x 64 in a layer, 8 x 4096 in the head. Drawn: 4 x 4 x 1024 x 32.
        ("8B", 262_144 + 355_251.2 + 32_768),
        # 13B, whose heads share no keys and values: 40 layers of 5120. Four that are drawn need the most.
        ("13B", 4 * 4 * 5120 * 40),
    ],
)
def test_a_reinforcement_task_needs_what_it_draws_or_what_it_trains(name: str, per_token: float) -> None:
    shape, parameters = known(name)
    made = load(shape, 64, 1000, task=TaskType.GRPO, drop=False)
    assert text_need(shape, parameters, made, ONE).per_row == pytest.approx(1000 * per_token)


@pytest.mark.parametrize(("model", "seconds"), [(Architecture.SDXL, 0.08), (Architecture.FLUX, 0.86)])
def test_a_picture_takes_the_known_seconds(model: Architecture, seconds: float) -> None:
    assert image_seconds(IMAGE_MODELS[model], 1024, 1, Speed(989e12, 0.35), 1) == pytest.approx(seconds, abs=0.005)


@pytest.mark.parametrize(
    ("model", "weights", "states"), [(Architecture.SDXL, 4.8, 15.0), (Architecture.FLUX, 22.2, 23.4)]
)
def test_an_image_model_needs_what_was_counted(model: Architecture, weights: float, states: float) -> None:
    image = IMAGE_MODELS[model]
    made = Load(TaskType.IMAGE, 0, 384, 384 * image.adapter_parameters_per_rank)
    need = image_need(image, 1024, made, ONE)
    assert need.weights / GIB == pytest.approx(weights, abs=0.05)
    assert need.adapter / GIB == pytest.approx(states, abs=0.1)
    assert image_need(image, 512, made, ONE).per_row == need.per_row / 4
