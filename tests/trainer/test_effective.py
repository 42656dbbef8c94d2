"""What an attempt makes of its settings before any model is loaded; nothing here needs torch."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import ExitCode, RunConfig, Termination, evaluated_rows_cap
from taskoffer_trainer import attention
from taskoffer_trainer.checkpoints import read_run, write_run
from taskoffer_trainer.config import fingerprint
from taskoffer_trainer.effective import effective
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import lowered, note_end, note_kills, profile_of
from taskoffer_trainer.pod import pod_cpus
from taskoffer_trainer.stream import SampleStream, StepBatches, StepPlan
from taskoffer_trainer.tuning import MicroBatch
from taskoffer_trainer.volume import checkpoints_that_fit

from .conftest import merge

pytestmark = pytest.mark.trainer


@pytest.fixture
def wire(base_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**base_config, "outputDir": "/o", "checkpointDir": str(tmp_path)}


def config(wire: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate(merge(wire, changes))


LOADERS = [
    # CPUs of the pod, GPUs, asked workers and prefetch, what is used of them, how many clamps
    (32, 1, 16, 8, 16, 4, 1),
    (8, 2, 16, 8, 4, 4, 2),
    (8, 2, 4, 2, 4, 2, 0),
    (64, 1, 32, None, 16, None, 1),
    (0.5, 1, 4, None, 1, None, 1),
    (2, 1, 0, 8, 0, None, 1),
    (2, 1, 0, None, 0, None, 0),
]


@pytest.mark.parametrize(("cpus", "gpus", "workers", "ahead", "used", "used_ahead", "clamps"), LOADERS)
def test_loading_processes_and_what_they_prepare_are_capped_by_the_pods_cpus(
    cpus: float, gpus: int, workers: int, ahead: int | None, used: int, used_ahead: int | None, clamps: int, wire: Any
) -> None:
    train = {"dataloaderNumWorkers": workers, "dataloaderPrefetchFactor": ahead}
    found = effective(config(wire, gpus=gpus, train=train), cpus)
    assert (found.config.train.dataloader_num_workers, found.config.train.dataloader_prefetch_factor) == (
        used,
        used_ahead,
    )
    assert [clamp.reason for clamp in found.clamps if "dataloader" in clamp.field] == ["LoadersClamped"] * clamps


QUOTAS = [
    ({"cpu.max": "150000 100000"}, 1.5),
    ({"cpu.max": "max 100000"}, None),
    ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ({}, None),
    ({"cpu.max": "nonsense"}, None),
]


@pytest.mark.parametrize(("files", "quota"), QUOTAS)
def test_the_pods_cpus_are_those_it_may_run_on_within_its_quota(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    allowed = len(os.sched_getaffinity(0))
    assert pod_cpus(tmp_path) == (allowed if quota is None else min(allowed, quota))


@pytest.mark.parametrize(("steps", "rows", "cap"), [(25, 8, 60), (25, 128, 960), (1, 1, 1), (8, 4, 9)])
def test_evaluations_have_as_many_rows_as_a_tenth_of_the_time_is_enough_for(steps: int, rows: int, cap: int) -> None:
    assert evaluated_rows_cap(steps, rows) == cap


def test_the_held_out_rows_are_capped_by_what_was_asked_for_and_by_their_cost(wire: dict[str, Any]) -> None:
    def held_out(**changes: Any) -> int:
        return effective(config(wire, **changes)).config.data.eval_rows_max

    assert held_out(data={"evalRowsMax": 400}, train={"evalSteps": 25, "saveSteps": 25}) == 30
    assert held_out(data={"evalRowsMax": 7}) == 7
    assert held_out(data={"evalRowsMax": 7}, train={"evalRowsMax": 5}) == 5


def test_profiles_add_up_and_leave_the_adapters_shape_alone(wire: dict[str, Any]) -> None:
    asked = config(
        wire,
        lora={"loraDropout": 0.1},
        train={
            "torchCompile": True,
            "dataloaderNumWorkers": 8,
            "attnImplementation": ["flash_attention_2", "sdpa"],
            "adaptiveLr": {},
            "emaDecay": 0.9999,
        },
    )
    changed = {
        0: set(),
        1: {"train.torchCompile", "lora.loraDropout", "train.dataloaderNumWorkers"},
        2: {"train.perDeviceTrainBatchSize", "train.attnImplementation"},
        3: {"train.learningRate", "train.adaptiveLr", "train.emaDecay"},
    }
    expected: set[str] = set()
    for profile, fields in changed.items():
        found, clamps = lowered(asked, profile)
        expected |= fields
        assert {clamp.field for clamp in clamps} == expected
        assert (found.lora.r, found.lora.target_modules, found.lora.rank_pattern) == (
            asked.lora.r,
            asked.lora.target_modules,
            asked.lora.rank_pattern,
        )
        assert found.train.gradient_accumulation_steps * found.train.per_device_train_batch_size == 4
    assert (found.train.learning_rate, found.train.attn_implementation) == (0.001, ("eager",))
    assert (found.train.dataloader_num_workers, found.train.ema_decay) == (2, None)


def test_a_lack_of_memory_does_not_lead_to_the_attention_that_takes_most_of_it(wire: dict[str, Any]) -> None:
    asked = config(wire, lora={"loraDropout": 0.1}, train={"attnImplementation": ["flash_attention_2", "sdpa"]})
    for end, profile, way in (
        (ExitCode.RESTART, 2, ("flash_attention_2", "sdpa")),
        # Now it may as well be a fault of the kernel.
        (ExitCode.INTERNAL, 3, ("eager",)),
    ):
        note_end(asked, Termination(exit_code=end, reason={138: "OutOfMemory", 70: "InternalError"}[end]))
        found = effective(asked, 64)
        assert (found.profile, found.config.train.attn_implementation) == (profile, way)
        said = {clamp.field for clamp in found.clamps}
        assert ("train.attnImplementation" in said) is (way == ("eager",))
        assert {"lora.loraDropout", "train.perDeviceTrainBatchSize"} <= said


def test_held_out_rows_that_are_measured_one_by_one_are_said_where_more_were_asked_for(wire: dict[str, Any]) -> None:
    found, clamps = lowered(config(wire, train={"perDeviceEvalBatchSize": 8}), 2)
    assert found.train.per_device_eval_batch_size == 1
    told = [(one.requested, one.effective) for one in clamps if one.field == "train.perDeviceEvalBatchSize"]
    assert told == [("8", "1")]


ENDS = [
    (ExitCode.RESTART, "OutOfMemory", 2),
    (ExitCode.KILLED, "Killed", 2),
    (ExitCode.RESTART, "CompileFailed", 1),
    (ExitCode.RESTART, "GradientsNotFinite", 3),
    (ExitCode.INTERNAL, "InternalError", 1),
    (128 + 11, "Killed", 1),
    # The settings have no part in these.
    (ExitCode.RESTART, "GPUMissing", 0),
    (ExitCode.RESTART, "TooManyRowsAtOnce", 0),
    (ExitCode.RESTART, "CheckpointBroken", 0),
    (ExitCode.STOPPED, "Stopped", 0),
    (ExitCode.STOPPED, "Killed", 0),
    (128 + 2, "Killed", 0),
    (ExitCode.BAD_DATA, "DataEmpty", 0),
    (ExitCode.DONE, "Completed", 0),
]


@pytest.mark.parametrize(("code", "reason", "profile"), ENDS)
def test_a_failure_goes_to_the_first_profile_that_may_mend_it_and_any_other_raises_none(
    code: int, reason: str, profile: int, wire: dict[str, Any]
) -> None:
    asked = config(wire, lora={"loraDropout": 0.1})
    assert note_end(asked, Termination(exit_code=code, reason=reason)) == (profile or None)
    assert profile_of(asked) == profile


def test_each_attempt_that_was_killed_for_lack_of_memory_raises_the_profile_once(wire: dict[str, Any]) -> None:
    asked = config(wire, lora={"loraDropout": 0.1}, attempt=2, lackedMemory=[1])
    kept = Path(asked.checkpoint_dir) / "checkpoint-40"
    kept.mkdir()
    (kept / "COMPLETE").write_text(json.dumps({"files": {}, "eval_loss": 2.5}))
    assert [note_kills(asked), note_kills(asked), profile_of(asked)] == [2, None, 2]
    assert read_run(asked)["fallbacks"] == [
        {"attempt": 1, "exitCode": 137, "reason": "OutOfMemory", "step": 40, "profile": 2}
    ]
    # Plain attention takes more memory, so that is not what lack of it leads to.
    assert effective(asked, 64).config.train.attn_implementation == asked.train.attn_implementation
    assert note_kills(asked.model_copy(update={"attempt": 3, "lacked_memory": (1, 2)})) == 3


def test_a_kill_that_the_trainer_has_noted_itself_is_not_counted_again(wire: dict[str, Any]) -> None:
    """The kernel may take a rank first, and the container after the launcher has noted it."""
    first = config(wire)
    note_end(first, Termination(exit_code=ExitCode.KILLED, reason="Killed"))
    assert note_kills(first.model_copy(update={"attempt": 2, "lacked_memory": (1,)})) is None
    assert profile_of(first) == 2


def test_without_a_kill_nothing_is_noted(wire: dict[str, Any]) -> None:
    asked = config(wire)
    assert note_kills(asked) is None
    assert read_run(asked) == {}


def test_profiles_that_would_change_nothing_are_left_out_and_the_last_one_stays(wire: dict[str, Any]) -> None:
    """Nothing is compiled here and there is no dropout, so the first profile is that of a failed one."""
    end = Termination(exit_code=ExitCode.RESTART, reason="CompileFailed", step=7)
    asked = config(wire)
    assert [note_end(asked, end) for _ in range(3)] == [2, 3, None]
    assert profile_of(asked) == 3
    assert [one["profile"] for one in read_run(asked)["fallbacks"]] == [2, 3]


def test_the_profile_outlives_what_else_is_written_and_keeps_the_checkpoints_of_the_run(wire: dict[str, Any]) -> None:
    asked = config(wire, lora={"loraDropout": 0.1})
    write_run(asked, {"figures_before": {"eval_loss": 8.0}})
    note_end(asked, Termination(exit_code=ExitCode.RESTART, reason="CompileFailed"))
    write_run(asked, {"prompts": []})
    known = read_run(asked)
    assert (known["profile"], known["figures_before"], known["prompts"]) == (1, {"eval_loss": 8.0}, [])
    # What a checkpoint belongs to is what was asked for, so the gentler attempt may go on from it.
    assert known["fingerprint"] == fingerprint(asked)
    assert json.loads(json.dumps(known["identity"]))["lora"]["loraDropout"] == 0.1


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "kept"),
    [(90 * 16, 8), (9 * 16, 8), (9 * 16 - 1, 7), (4 * 16, 3), (3 * 16, 2)],
)
def test_as_many_checkpoints_are_kept_as_have_room_beside_one_that_is_written(
    free: int, kept: int, wire: dict[str, Any]
) -> None:
    asked = config(wire, train={"saveTotalLimit": 8})
    limit, clamps = checkpoints_that_fit(asked, GIB, free * GIB)
    assert limit == kept
    assert [(one.field, one.effective) for one in clamps] == ([("train.saveTotalLimit", str(kept))] if kept < 8 else [])


def test_a_volume_without_room_for_two_checkpoints_and_one_that_is_written_is_refused(wire: dict[str, Any]) -> None:
    with pytest.raises(TrainerError, match=r"checkpointDir.*47 GiB free.*3 checkpoints of 16 GiB.*lora\.r") as error:
        checkpoints_that_fit(config(wire), GIB, 47 * GIB)
    assert (error.value.code, error.value.reason) == (ExitCode.BAD_CONFIG, "CheckpointVolumeTooSmall")


def test_earlier_checkpoints_give_way_to_new_ones(wire: dict[str, Any], tmp_path: Path) -> None:
    asked = config(wire, train={"saveTotalLimit": 8})
    # Half of what is free for each: too much, unless those that are there already count as free.
    parameters = shutil.disk_usage(tmp_path).free // 16 // 2
    with pytest.raises(TrainerError):
        checkpoints_that_fit(asked, parameters)
    (tmp_path / "checkpoint-1").mkdir()
    with (tmp_path / "checkpoint-1" / "optimizer.pt").open("wb") as file:
        file.truncate(16 * parameters * 9)
    assert checkpoints_that_fit(asked, parameters)[0] == 8


@pytest.mark.parametrize(
    ("wishes", "missing", "ways"),
    [
        (("flash_attention_2", "sdpa"), (), ["flash_attention_2", "sdpa", "eager"]),
        (("flash_attention_3", "flash_attention_2"), ("flash_attention_3",), ["flash_attention_2", "sdpa", "eager"]),
        (("flash_attention_2",), ("flash_attention_2",), ["sdpa", "eager"]),
        (("eager",), (), ["eager"]),
        (("eager", "sdpa"), (), ["eager", "sdpa"]),
    ],
)  # fmt: skip
def test_attention_is_tried_in_the_order_of_the_wishes_and_then_what_needs_no_package(
    wishes: Any, missing: tuple[str, ...], ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_missing", lambda way: "missing" if way in missing else None)
    assert attention.chain(wishes) == ways


def test_flash_kernels_are_not_tried_with_a_model_in_single_precision(
    wire: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would load it with them, and the first pass through the model would fail."""
    monkeypatch.setattr(attention, "_missing", lambda way: None)
    wishes = ("flash_attention_3", "flash_attention_2", "sdpa")
    tried: list[str | None] = []
    attention.load_with_attention(tried.append, wishes, half=False)
    attention.load_with_attention(tried.append, wishes, half=True)
    assert tried == ["sdpa", "flash_attention_3"]
    weights = [SimpleNamespace(device=SimpleNamespace(type="cpu"))]
    loaded = SimpleNamespace(_attn_implementation="sdpa")
    model = SimpleNamespace(config=loaded, dtype="torch.float32", parameters=lambda: iter(weights))
    (clamp,) = attention.attention_clamp(config(wire, train={"attnImplementation": list(wishes)}), model)
    assert (clamp.effective, clamp.message) == (
        "sdpa",
        "flash_attention_3 computes in half precision, and the model is in float32.",
    )


def test_a_model_that_cannot_be_loaded_with_a_way_is_loaded_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_missing", lambda way: None)
    tried = []

    def load(way: str | None) -> str | None:
        tried.append(way)
        if way == "flash_attention_2":
            raise ImportError("no kernel for this GPU")
        if way == "sdpa":
            raise ValueError("this model has no sdpa")
        return way

    assert attention.load_with_attention(load, ("flash_attention_2", "sdpa")) == "eager"
    assert tried == ["flash_attention_2", "sdpa", "eager"]


CUTS = [
    # rows at once, a unit, most tokens, lengths, the pieces' rows
    (4, 1, 100, [50, 40, 30, 20, 10], [2, 3]),
    (2, 1, 100, [50, 40, 30, 20, 10], [2, 2, 1]),
    # A row that is longer than the limit goes alone.
    (4, 1, 30, [50, 40, 10, 10, 10], [1, 1, 3]),
    # Rows that are not sorted count as long as the longest of their piece.
    (4, 1, 60, [10, 30, 10, 10], [2, 2]),
    (4, 2, 10, [50, 40, 30, 20], [2, 2]),
    (4, 1, 100, [], []),
]


@pytest.mark.parametrize(("size", "unit", "tokens", "lengths", "rows"), CUTS)
def test_a_piece_has_no_more_tokens_than_asked_for_and_one_row_at_least(
    size: int, unit: int, tokens: int, lengths: list[int], rows: list[int]
) -> None:
    pieces = MicroBatch(size, unit, most_tokens=tokens).cuts(len(lengths), lengths=lengths)
    assert [len(piece) for piece in pieces] == rows
    assert [row for piece in pieces for row in piece] == list(range(len(lengths)))


def test_pieces_within_a_limit_of_tokens_are_cut_finer_where_other_ranks_have_more_of_them() -> None:
    cuts = MicroBatch(8, 2, most_tokens=1000).cuts
    assert [len(piece) for piece in cuts(8, 3, [10] * 8)] == [2, 2, 4]
    assert [len(piece) for piece in cuts(4, 9, [10] * 4)] == [2, 2]


def padding(grouped: bool) -> float:
    """Return the share of padding in the pieces of an epoch of rows whose lengths differ widely."""
    lengths = [8 + row * row % 193 for row in range(512)]
    plan = StepPlan.of(len(lengths), 16, 1.0, -1)
    stream = SampleStream(len(lengths), 5, lengths if grouped else None)
    padded = used = 0
    for rows in StepBatches(stream, plan):
        for piece in MicroBatch(4).cuts(len(rows)):
            members = [lengths[row] for row in rows[piece.start : piece.stop]]
            padded += max(members) * len(members)
            used += sum(members)
    return 1 - used / padded


def test_grouping_by_length_lowers_the_share_of_padding() -> None:
    assert padding(grouped=True) < 0.15 < 0.3 < padding(grouped=False)
