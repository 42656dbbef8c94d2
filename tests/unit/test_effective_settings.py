"""How settings give way beside rank and micro-batch: layers, checkpoints, sharding, loaders, evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from taskoffer.api.contract import LoraSettings, RunConfig, TrainSettings
from taskoffer.api.quantity import cores
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.trainingjob import PodSettings, Settings
from taskoffer.decision import fit as fit_module
from taskoffer.decision.architecture import structure_of
from taskoffer.decision.effective import effective_settings, most_evaluated_rows
from taskoffer.decision.fit import Fit, Subject, fit
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.volume import checkpoints_that_fit

LLAMA_8B = Subject("meta-llama/Meta-Llama-3-8B", None, 8_030_000_000, TaskType.INSTRUCT_TEXT)
UNKNOWN_8B = Subject("someone/anonymous", None, 8_030_000_000, TaskType.INSTRUCT_TEXT)
LLAMA_13B = Subject("meta-llama/Llama-2-13b-hf", None, 13_016_000_000, TaskType.INSTRUCT_TEXT)
H100 = Estimation(gpu_memory="80G", memory_fraction="0.93")


def asked(*, lora: dict[str, Any] | None = None, **train: Any) -> Settings:
    adapter = LoraSettings.model_validate({"r": 64, "lora_alpha": 128, **(lora or {})})
    return Settings(lora=adapter, train=TrainSettings.model_validate({"max_length": 2048, **train}))


def told(found: Fit) -> list[tuple[str, str, str]]:
    return [(clamp.field, clamp.requested, clamp.effective) for clamp in found.clamps]


# The rows of a step

ROWS = [
    # Rows of a step, rows that fit; micro-batch and accumulation.
    (16, 16, 16, 1),
    (16, 7, 4, 4),
    (16, 15, 8, 2),
    (12, 7, 6, 2),
    (10, 4, 2, 5),  # two of four leave half unused, which is borne
    (13, 7, 7, 2),  # one of seven would leave more than half unused: 14 rows instead of 13
    (127, 10, 10, 13),  # 130 instead of 127
    (3, 2, 1, 3),
]


@pytest.mark.parametrize(("rows", "fitting", "micro_batch", "accumulation"), ROWS)
def test_the_rows_of_a_step_stay_unless_that_wastes_more_than_half_of_the_memory(
    rows: int, fitting: int, micro_batch: int, accumulation: int
) -> None:
    # As much memory as so many rows take.
    need = fit(LLAMA_8B, asked(per_device_train_batch_size=fitting), Estimation(gpu_memory="999G"), 1).peak
    just = Estimation(gpu_memory=str(round(need * 1.0001)), memory_fraction="1")
    train = fit(LLAMA_8B, asked(per_device_train_batch_size=rows), just, 1).effective.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (micro_batch, accumulation)


# Ranks by layer


def pattern(**ranks: int) -> list[dict[str, Any]]:
    return [{"module": module, "r": rank} for module, rank in ranks.items()]


def ranks_of(found: Fit) -> dict[str, int]:
    return {layer.module: layer.r for layer in found.effective.lora.rank_pattern}


def test_a_rank_of_a_layers_own_is_kept_and_counted() -> None:
    plain, more = (fit(LLAMA_8B, asked(lora={"rank_pattern": own}), H100, 1) for own in ([], pattern(down_proj=512)))
    assert more.clamps == ()
    assert ranks_of(more) == {"down_proj": 512}
    # 32 layers of (512 - 64) x (14336 + 4096), in two checkpoints and one being written.
    assert more.checkpoint_bytes - plain.checkpoint_bytes == 3 * 16 * 32 * 448 * (14336 + 4096)


def test_a_rank_of_a_layers_own_is_capped_by_what_the_layer_holds() -> None:
    found = fit(LLAMA_8B, asked(lora={"rank_pattern": pattern(k_proj=1000, q_proj=900)}), H100, 1)
    assert ranks_of(found) == {"k_proj": 409, "q_proj": 900}
    assert told(found) == [("lora.r", "64", "k 409")]


def test_ranks_of_layers_give_way_with_the_rank_for_all() -> None:
    settings = asked(lora={"r": 1024, "lora_alpha": 2048, "rank_pattern": pattern(down_proj=512, strange=8)})
    found = fit(LLAMA_13B, settings, Estimation(gpu_memory="48G"), 1)
    rank = found.effective.lora.r
    assert 8 <= rank < 1024
    assert ranks_of(found)["down_proj"] == 512 * rank // 1024
    assert fit(LLAMA_13B, found.effective, Estimation(gpu_memory="48G"), 1).effective == found.effective


# Checkpoints


@pytest.mark.parametrize(
    ("volume", "kept"),
    [
        # Of an 8B at rank 256 each takes 10.7 GB; one more is being written.
        ("97G", 8),
        ("96G", 7),
        ("33G", 2),
    ],
)
def test_as_many_checkpoints_are_kept_as_the_volume_holds(volume: str, kept: int) -> None:
    settings = asked(lora={"r": 256, "lora_alpha": 512}, save_total_limit=8)
    found = fit(LLAMA_8B, settings, H100.model_copy(update={"checkpoint_volume": volume}), 1)
    assert found.effective.train.save_total_limit == kept
    assert found.effective.lora.r == 256
    assert [reason for _, _, reason in told(found)] == ([] if kept == 8 else [str(kept)])


@pytest.mark.parametrize(("model", "grown"), [(LLAMA_8B, 1.0), (UNKNOWN_8B, 1.12)], ids=["known", "estimated"])
def test_the_rank_that_a_volume_takes_is_one_that_the_trainer_takes(
    model: Subject, grown: float, tmp_path: Path
) -> None:
    settings = asked(lora={"r": 256, "lora_alpha": 512}, save_total_limit=8)
    volume = 20 * 10**9
    found = fit(model, settings, H100.model_copy(update={"checkpoint_volume": "20G"}), 1)
    assert found.effective.lora.r < 256
    wire = {"jobName": "j", "taskID": "t", "taskType": "InstructText", "gpus": 1, "outputDir": "/o"}
    wire |= {"model": {"name": "m", "path": "/m"}, "data": {"path": "/d"}, "checkpointDir": str(tmp_path)}
    run = RunConfig.model_validate(wire | {"lora": found.effective.lora, "train": found.effective.train})
    shape = model.shape
    assert shape is not None
    # Of a shape that is only estimated the layers may turn out larger, by the policy's margin.
    trained = math.floor(grown * shape.adapter_parameters(found.effective.lora.r))
    assert checkpoints_that_fit(run, trained, volume) == (2, ())
    with pytest.raises(TrainerError, match="3 checkpoints"):
        checkpoints_that_fit(run, math.ceil(grown * shape.adapter_parameters(found.effective.lora.r + 1)), volume)


@pytest.mark.parametrize("volume", [None, "500G"])
def test_the_best_and_the_newest_checkpoint_are_kept_whatever_is_asked_for(volume: str | None) -> None:
    found = fit(LLAMA_8B, asked(save_total_limit=1), H100.model_copy(update={"checkpoint_volume": volume}), 1)
    assert found.effective.train.save_total_limit == 2
    assert told(found) == [("train.saveTotalLimit", "1", "2")]
    assert found.clamps[0].message == "the best and the newest checkpoint are kept in any case"
    assert found.checkpoint_bytes == 3 * 16 * 167_772_160


def test_where_the_fewest_checkpoints_have_no_room_the_rank_gives_way() -> None:
    settings = asked(lora={"r": 256, "lora_alpha": 512})
    found = fit(LLAMA_8B, settings, H100.model_copy(update={"checkpoint_volume": "10G"}), 1)
    assert found.fits
    assert found.checkpoint_bytes <= 10**10
    assert found.clamps[0].reason == "RankClamped"
    assert "the best checkpoint, the newest and one being written take 32 GB of 10" in found.clamps[0].message
    more = asked(lora={"r": found.effective.lora.r + 1, "lora_alpha": 512})
    assert fit(LLAMA_8B, more, H100.model_copy(update={"checkpoint_volume": "10G"}), 1).effective.lora.r < more.lora.r


def test_a_volume_that_holds_no_adapter_worth_training_is_no_fit() -> None:
    found = fit(LLAMA_8B, asked(), H100.model_copy(update={"checkpoint_volume": "1M"}), 1)
    assert not found.fits
    assert found.lacks_storage
    assert not fit(Subject("x/y", None, 10**12, TaskType.INSTRUCT_TEXT), asked(), H100, 1).lacks_storage


def test_a_volume_is_a_space() -> None:
    with pytest.raises(ValidationError, match=r"checkpointVolume 0\.5T is not a space: write a whole number"):
        Estimation(gpu_memory="80G", checkpoint_volume="0.5T")


# Sharding


def test_copies_of_the_model_are_taken_where_they_fit_with_the_rank_that_is_asked_for() -> None:
    found = fit(LLAMA_8B, asked(), H100, 2)
    assert (found.layout.name, found.effective.train.fsdp) == ("2 GPUs, DDP", False)


def test_the_model_is_shared_out_rather_than_trained_with_a_smaller_rank() -> None:
    settings = asked(lora={"r": 1024, "lora_alpha": 2048})
    found = fit(LLAMA_13B, settings, H100, 4)
    assert (found.layout.name, found.effective.train.fsdp, found.effective.lora.r) == ("4 GPUs, FSDP", True, 1024)
    assert ("train.fsdp", "false", "true") in told(found)
    assert fit(LLAMA_13B, settings, H100, 1).effective.lora.r < 1024


def test_who_asks_for_sharing_out_gets_it_on_several_gpus() -> None:
    assert fit(LLAMA_8B, asked(fsdp=True), H100, 2).layout.sharded
    alone = fit(LLAMA_8B, asked(fsdp=True), H100, 1)
    assert told(alone) == [("train.fsdp", "true", "false")]
    assert "one GPU has nobody to share with" in alone.clamps[0].message


def test_a_trainer_that_cannot_share_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "SHARDING_SERVED", False)
    found = fit.__wrapped__(LLAMA_8B, asked(fsdp=True), H100, 2)
    assert [(clamp.field, clamp.reason) for clamp in found.clamps] == [("train.fsdp", "ShardingNotServed")]
    assert found.effective.train.fsdp is False


# What a name says of a model's layers

NAMES = [
    ("mistralai/Mixtral-8x7B-v0.1", True, False),
    ("Qwen/Qwen1.5-MoE-A2.7B", True, False),
    ("Qwen/Qwen3-30B-A3B", True, False),
    ("ibm-granite/granite-3.1-3b-a800m-instruct", True, False),
    ("deepseek-ai/DeepSeek-V3", True, True),
    ("deepseek-ai/DeepSeek-R1", True, True),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", False, False),
    ("deepseek-ai/deepseek-llm-7b-base", False, False),
    ("microsoft/phi-4", False, True),
    ("microsoft/Phi-3.5-MoE-instruct", True, True),
    ("openai-community/gpt2-xl", False, True),
    ("EleutherAI/gpt-j-6b", False, True),
    ("EleutherAI/gpt-neo-2.7B", False, True),
    ("facebook/opt-6.7b", False, True),
    ("bigcode/starcoder2-7b", False, True),
    ("someone/adopt-7b", False, False),
    ("cognitive/dolphin-7b", False, False),
    ("Phind/Phind-CodeLlama-34B-v2", False, False),
    ("moebius/llama-8b", False, False),
    ("Qwen/Qwen2.5-7B-Instruct-1M", False, False),
]


@pytest.mark.parametrize(("name", "experts", "other_layers"), NAMES)
def test_a_name_tells_of_experts_and_of_layers_that_are_called_otherwise(
    name: str, experts: bool, other_layers: bool
) -> None:
    assert structure_of(name) == (experts, other_layers)


@pytest.mark.parametrize(
    ("name", "parameters", "targets", "used"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_000_000, "q_proj, v_proj", "q_proj, v_proj"),
        ("microsoft/phi-4", 14_660_000_000, "q_proj,o_proj", "all-linear"),
        ("microsoft/phi-4", 14_660_000_000, "qkv_proj,o_proj", "all-linear"),
        ("microsoft/phi-2", 2_780_000_000, "q_proj,o_proj", "all-linear"),
        ("x/anonymous", 2_780_000_000, "q_proj,o_proj", "q_proj,o_proj"),
    ],
)
def test_listed_layers_that_a_model_lacks_become_all_of_them(
    name: str, parameters: int, targets: str, used: str
) -> None:
    subject = Subject(name, None, parameters, TaskType.INSTRUCT_TEXT)
    found = fit(subject, asked(lora={"target_modules": targets}), H100, 1)
    assert found.effective.lora.target_modules == used
    assert [c.reason for c in found.clamps] == ([] if targets == used else ["TargetsClamped"])


@pytest.mark.parametrize(
    ("targets", "used"),
    [("q_proj,v_proj", "all-linear"), ("to_q,up_proj", "all-linear"), ("to_q,to_v", "to_q,to_v")],
)
@pytest.mark.parametrize("architecture", Architecture)
def test_the_layers_of_a_text_model_become_all_of_a_picture_models(
    architecture: Architecture, targets: str, used: str
) -> None:
    subject = Subject("someone/pictures", architecture, 2_600_000_000, TaskType.IMAGE)
    found = fit(subject, asked(lora={"target_modules": targets}), H100, 1)
    assert found.effective.lora.target_modules == used
    assert [(c.field, c.reason) for c in found.clamps] == (
        [] if targets == used else [("lora.targetModules", "TargetsClamped")]
    )


def test_memory_is_planned_for_all_layers_where_nobody_knows_whether_the_listed_ones_are_there() -> None:
    some, every = (
        fit(UNKNOWN_8B, asked(lora={"target_modules": targets}), H100, 1) for targets in ("q_proj", "all-linear")
    )
    assert (some.peak, some.checkpoint_bytes) == (every.peak, every.checkpoint_bytes)
    assert some.effective.lora.target_modules == "q_proj"


# Loaders and evaluations

POD = PodSettings(image="x")
LOADERS = [
    # CPUs per GPU, processes and batches ahead; what becomes of them.
    (None, 16, 4, 16, 4),
    (None, 24, 2, 16, 2),
    ("12", 16, 8, 12, 4),
    ("12", 4, None, 4, None),
    ("2500m", 4, 2, 2, 2),
    ("500m", 4, 2, 0, None),
    ("1k", 8, 2, 8, 2),
    ("12", 0, 8, 0, None),
]


@pytest.mark.parametrize(("cpus", "workers", "ahead", "left", "left_ahead"), LOADERS)
def test_loaders_have_a_cpu_each_and_few_batches_ahead(
    cpus: str | None, workers: int, ahead: int | None, left: int, left_ahead: int | None
) -> None:
    settings = asked(dataloader_num_workers=workers, dataloader_prefetch_factor=ahead)
    made = effective_settings(settings, None, POD.model_copy(update={"cpu_per_gpu": cpus}), 1, rows=10)
    train = made.settings.train
    assert (train.dataloader_num_workers, train.dataloader_prefetch_factor) == (left, left_ahead)
    changed = {"train.dataloaderNumWorkers"} if left != workers else set()
    changed |= {"train.dataloaderPrefetchFactor"} if left_ahead != ahead else set()
    assert {clamp.field for clamp in made.clamps} == changed
    assert {clamp.reason for clamp in made.clamps} <= {"LoadersClamped"}


@pytest.mark.parametrize(("quantity", "amount"), [("12", 12), ("1.5", 1.5), ("100m", 0.1), ("2k", 2000), ("1Ki", 1024)])
def test_cpus_are_read_as_kubernetes_writes_them(quantity: str, amount: float) -> None:
    assert float(cores(quantity)) == amount


@pytest.mark.parametrize("quantity", ["", "x", "-1", "2x", "1e3"])
def test_what_is_no_amount_of_cpu_is_refused(quantity: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of CPU"):
        cores(quantity)


EVALUATIONS = [
    # Rows of the data, asked for, GPUs; rows held out at most.
    (None, None, 1, 120),  # 0.1 x 25 steps x 16 rows x 3
    (1_000, None, 1, None),  # a tenth of them are 100
    (1_300, None, 1, 120),
    (100_000, None, 4, None),  # 480 would be few enough, and no more than 400 are held out anyway
    (100_000, 1000, 4, 480),
    (100_000, 50, 1, 50),
]


@pytest.mark.parametrize(("rows", "most", "gpus", "left"), EVALUATIONS)
def test_evaluations_take_a_tenth_of_the_time_at_most(
    rows: int | None, most: int | None, gpus: int, left: int | None
) -> None:
    settings = asked(per_device_train_batch_size=8, gradient_accumulation_steps=2, eval_rows_max=most)
    made = effective_settings(settings, None, POD, gpus, rows)
    assert made.settings.train.eval_rows_max == left
    assert [clamp.reason for clamp in made.clamps] == ([] if left == most else ["EvaluationClamped"])


def test_at_least_one_row_is_evaluated() -> None:
    assert most_evaluated_rows(TrainSettings(eval_steps=1, save_steps=1), 1) == 1


# Settings without sense

SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"stages": [{"share": 0.5, "factor": 1.0}]}, "stages: the shares sum to 0.5 and not to 1"),
    ({"attn_implementation": ["sdpa", "sdpa"]}, "attnImplementation names one twice"),
    ({"attn_implementation": ["flash"]}, "Input should be 'flash_attention_3'"),
    ({"ema_decay": 1.0}, "less than 1"),
    ({"adaptive_lr": {"decrease": 1.1}}, "less than or equal to 1"),
    ({"adaptive_lr": {"increase": 0.9}}, "greater than or equal to 1"),
    ({"optim": "adamw_bnb_8bit"}, "Input should be 'adamw_torch_fused'"),
]


@pytest.mark.parametrize(("fields", "words"), SENSELESS)
def test_techniques_without_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSettings(**fields)


def test_a_module_has_one_rank_of_its_own() -> None:
    with pytest.raises(ValidationError, match="rankPattern names a module twice"):
        LoraSettings.model_validate({"rankPattern": [{"module": "q_proj", "r": 1}, {"module": "q_proj", "r": 2}]})
