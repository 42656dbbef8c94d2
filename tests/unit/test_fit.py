"""Which settings a training gets when those that the policy asks for do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from taskoffer.api.contract import LoraSettings, TrainSettings
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision import fit as module
from taskoffer.decision.fit import Fit, Subject, fit

LLAMA_8B = Subject("meta-llama/Meta-Llama-3-8B", None, 8_030_000_000, TaskType.INSTRUCT_TEXT)
LLAMA_70B = Subject("meta-llama/Meta-Llama-3-70B", None, 70_554_000_000, TaskType.INSTRUCT_TEXT)
H100 = Estimation(gpu_memory="80G", memory_fraction="0.93")


def asked(rank: int, rows: int, accumulation: int = 1, *, length: int = 8192, alpha: int | None = None) -> Settings:
    return Settings(
        lora=LoraSettings(r=rank, lora_alpha=alpha or rank * 2, lora_dropout=0.05),
        train=TrainSettings(
            per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_length=length
        ),
    )


def clamps(found: Fit) -> list[tuple[str, str, str]]:
    return [(clamp.reason, clamp.requested, clamp.effective) for clamp in found.clamps]


def test_settings_that_fit_are_kept_as_they_are() -> None:
    settings = asked(64, 4)
    found = fit(LLAMA_8B, settings, H100, 1)
    assert found.fits
    assert found.effective == settings
    assert found.clamps == ()
    assert found.largest_rows == 7
    assert found.peak <= found.limit


def test_too_many_rows_at_a_time_become_steps_of_accumulation() -> None:
    found = fit(LLAMA_8B, asked(64, 16, 3), H100, 1)
    train = found.effective.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (6, 8)
    assert clamps(found) == [("BatchClamped", "16", "6")]
    assert "6 at a time and gradientAccumulationSteps 8 keep 48 rows per step and GPU" in found.clamps[0].message


def test_a_rank_beyond_what_a_layer_can_hold_is_said_by_layer() -> None:
    found = fit(LLAMA_8B, asked(2048, 1, length=512, alpha=512), Estimation(gpu_memory="288G"), 1)
    assert clamps(found) == [("RankClamped", "2048", "1592, q/o 1024, k/v 409")]
    assert found.clamps[0].message == (
        "r 2048 → gate/up/down 1592, q/o 1024, k/v 409: half of what each layer can hold; "
        "8.03B at r 2048 would add 5.369B parameters"
    )
    assert found.effective.lora.r == 1592
    assert found.effective.lora.lora_alpha / 1592 == pytest.approx(512 / 2048, rel=0.01)


def test_the_second_strategys_settings_become_what_four_gpus_can_hold() -> None:
    found = fit(LLAMA_8B, asked(8192, 128, alpha=2048), H100, 4)
    assert found.fits
    assert [reason for reason, _, _ in clamps(found)] == ["RankClamped", "BatchClamped", "ParametersSharedOut"]
    assert "8.03B at r 8192 would add 21.47B parameters" in found.clamps[0].message
    assert found.clamps[0].effective == "1592, q/o 1024, k/v 409", "all that the layers can hold"
    train = found.effective.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 128
    assert found.peak <= found.limit


def test_the_largest_rank_that_fits_is_taken() -> None:
    found = fit(LLAMA_8B, asked(8192, 128, alpha=2048), H100, 1)
    assert "at r 1592 not even one row at a time fits" in found.clamps[0].message
    assert found.clamps[0].effective.startswith(f"{found.effective.lora.r}, ")
    one_more = asked(found.effective.lora.r + 1, 1)
    assert fit(LLAMA_8B, one_more, H100, 1).effective.lora.r == found.effective.lora.r


def test_a_model_whose_copy_fits_no_gpu_does_not_fit_without_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARDING_SERVED", False)
    found = fit.__wrapped__(LLAMA_70B, asked(64, 1), H100, 4)
    assert not found.fits
    assert found.clamps == () or found.largest_rows == 0
    assert "4 GPUs, DDP" in found.numbers


def test_with_sharding_it_fits() -> None:
    found = fit(LLAMA_70B, asked(64, 1), H100, 4)
    assert found.fits
    assert found.layout.name == "4 GPUs, FSDP"
    assert found.largest_rows == 1


def test_an_estimated_shape_needs_its_margin_and_says_so() -> None:
    unknown = Subject("someone/anonymous", None, 8_030_000_000, TaskType.INSTRUCT_TEXT)
    wide = Estimation(gpu_memory="80G", memory_fraction="0.93", unknown_shape_margin="0.5")
    narrow = wide.model_copy(update={"unknown_shape_margin": "0"})
    assert fit(unknown, asked(64, 1), wide, 1).peak > fit(unknown, asked(64, 1), narrow, 1).peak
    assert "layers estimated from the size" in fit(unknown, asked(64, 1), wide, 1).numbers


def test_the_ranks_of_an_estimated_shape_are_left_to_the_trainer() -> None:
    unknown = Subject("someone/anonymous", None, 1_200_000_000, TaskType.INSTRUCT_TEXT)
    found = fit(unknown, asked(1024, 1), H100, 1)
    assert found.effective.lora.r == 1024
    assert found.clamps == ()


def test_more_steps_of_accumulation_than_the_schema_has_lower_the_rows_per_step() -> None:
    found = fit(LLAMA_8B, asked(64, 128, 4096), H100, 1)
    train = found.effective.train
    assert train.gradient_accumulation_steps == 65_536
    assert train.per_device_train_batch_size == found.largest_rows
    assert "make 458752 of 524288 rows per step and GPU" in found.clamps[0].message


def test_an_alpha_that_cannot_follow_its_rank_is_told() -> None:
    found = fit(LLAMA_8B, asked(8192, 1, alpha=2), H100, 1)
    assert [clamp.field for clamp in found.clamps] == ["lora.r", "lora.loraAlpha"]
    assert found.effective.lora.lora_alpha == 1


def test_a_rank_below_the_least_is_not_raised() -> None:
    found = fit(LLAMA_70B, asked(4, 1), H100, 1)
    assert not found.fits
    assert found.effective.lora.r == 4


@pytest.mark.parametrize(("architecture", "rows"), [(Architecture.SDXL, 16), (Architecture.FLUX, 4)])
def test_an_image_model_is_fitted_by_its_pictures(architecture: Architecture, rows: int) -> None:
    subject = Subject("black-forest-labs/FLUX.1-dev", architecture, 12_000_000_000, TaskType.IMAGE, 1024)
    found = fit(subject, asked(64, 64), H100, 1)
    assert found.fits
    assert found.effective.train.per_device_train_batch_size == rows


@given(
    rank=st.integers(1, 8192),
    rows=st.integers(1, 256),
    accumulation=st.integers(1, 16),
    length=st.sampled_from([512, 2048, 8192]),
    parameters=st.integers(10**8, 10**11),
    gpus=st.sampled_from([1, 2, 4, 8]),
    task=st.sampled_from([TaskType.INSTRUCT_TEXT, TaskType.DPO]),
)
def test_what_is_said_to_fit_fits_and_keeps_rows_per_step_and_scale(
    rank: int, rows: int, accumulation: int, length: int, parameters: int, gpus: int, task: TaskType
) -> None:
    settings = asked(rank, rows, accumulation, length=length)
    found = fit(Subject("anonymous", None, parameters, task), settings, H100, gpus)
    if not found.fits:
        return
    train, lora = found.effective.train, found.effective.lora
    assert found.peak <= found.limit * (1 + 1e-9)
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    assert 0 <= per_step - rows * accumulation < train.gradient_accumulation_steps
    assert per_step == rows * accumulation or 2 * train.per_device_train_batch_size > found.largest_rows
    Settings.model_validate(found.effective.model_dump())
    assert lora.r <= rank
    assert lora.lora_alpha / lora.r == pytest.approx(2, abs=0.5 / lora.r)
    assert lora.r == rank or "RankClamped" in {clamp.reason for clamp in found.clamps}
    # Settings that fit once are not changed again.
    again = fit(Subject("anonymous", None, parameters, task), found.effective, H100, gpus)
    assert again.effective == found.effective


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gpu_memory": "80"}, "gpuMemory 80 is not the memory of a GPU"),
        ({"gpu_memory": "80G", "memory_fraction": "1.2"}, "memoryFraction 1.2 must be above 0 and at most 1"),
        ({"gpu_memory": "80G", "memory_fraction": "0"}, "must be above 0"),
        ({"gpu_memory": "79.6Gi"}, "write a whole number with a unit"),
        ({"gpu_memory": "80G", "unknown_shape_margin": "12"}, "0.12 is 12 %"),
    ],
)
def test_an_estimation_without_sense_is_refused(fields: dict[str, str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Estimation(**fields)
