"""Small pieces that the operator reads: ranks, termination messages, metrics, which checkpoint is the best."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import (
    Clamp,
    LayerRank,
    LoraSettings,
    Metric,
    ProgressReport,
    RunConfig,
    RunState,
    Termination,
    rank_cap,
)
from taskoffer_trainer.checkpoints import Checkpoint, best_checkpoint, complete_checkpoints, rotate
from taskoffer_trainer.clock import Clock
from taskoffer_trainer.config import fingerprint
from taskoffer_trainer.lora import LinearShape, plan_ranks
from taskoffer_trainer.metrics import render_metrics
from taskoffer_trainer.progress import read_report, write_report
from taskoffer_trainer.termination import encode_termination, shorten, write_termination

pytestmark = pytest.mark.trainer

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
SHAPES = [
    LinearShape("model.layers.0.q_proj", 64, 64),
    LinearShape("model.layers.1.q_proj", 64, 64),
    LinearShape("model.layers.0.k_proj", 64, 16),
    LinearShape("model.layers.1.k_proj", 64, 32),
]


def test_a_rank_that_fits_is_left_alone() -> None:
    plan = plan_ranks(SHAPES, LoraSettings(r=6, lora_alpha=12))
    assert (plan.rank_pattern, plan.alpha_pattern, plan.clamps) == ({}, {}, ())


def test_layers_of_one_shape_share_a_pattern_and_others_get_their_own() -> None:
    plan = plan_ranks(SHAPES, LoraSettings(r=32, lora_alpha=64))
    assert plan.rank_pattern == {
        r"model\.layers\.0\.k_proj": rank_cap(64, 16),
        r"model\.layers\.1\.k_proj": rank_cap(64, 32),
        "q_proj": rank_cap(64, 64),
    }
    assert all(plan.alpha_pattern[name] / rank == 2 for name, rank in plan.rank_pattern.items())
    assert {clamp.reason for clamp in plan.clamps} == {"RankClamped"}


def test_with_rslora_the_scale_is_kept_over_the_root_of_the_rank() -> None:
    plan = plan_ranks(SHAPES[:2], LoraSettings(r=64, lora_alpha=32, use_rslora=True))
    assert plan.rank_pattern == {"q_proj": 16}
    assert plan.alpha_pattern["q_proj"] / 16**0.5 == pytest.approx(32 / 64**0.5)


def test_a_layer_takes_the_rank_of_its_own_and_keeps_its_scale() -> None:
    pattern = (LayerRank(module="q_proj", r=12), LayerRank(module="k_proj", r=2))
    plan = plan_ranks(SHAPES, LoraSettings(r=4, lora_alpha=8, rank_pattern=pattern))
    assert plan.rank_pattern == {"q_proj": 12, r"model\.layers\.0\.k_proj": 2, r"model\.layers\.1\.k_proj": 2}
    assert all(plan.alpha_pattern[name] / rank == 2 for name, rank in plan.rank_pattern.items())
    assert plan.clamps == ()


def test_a_rank_of_its_own_is_capped_and_one_that_goes_to_no_layer_is_told() -> None:
    pattern = (LayerRank(module="q_proj", r=99), LayerRank(module="qkv_proj", r=2))
    plan = plan_ranks(SHAPES[:2], LoraSettings(r=4, lora_alpha=8, rank_pattern=pattern))
    assert plan.rank_pattern == {"q_proj": 16}
    assert [(c.field, c.requested, c.effective) for c in plan.clamps] == [
        ("lora.r[q_proj]", "99", "16"),
        ("lora.rankPattern[qkv_proj]", "2", "none"),
    ]


def clamp(number: int) -> Clamp:
    return Clamp(field=f"lora.r[{number}]", requested="1", effective="2", reason="RankClamped", message="ü" * 300)


@pytest.mark.parametrize("clamps", [0, 3, 200])
@pytest.mark.parametrize("message", ["short", "ä" * 1024, '\n"\\' * 341])
def test_a_termination_message_is_never_longer_than_the_kubelet_takes(message: str, clamps: int) -> None:
    termination = Termination(
        exit_code=70,
        reason="InternalError",
        message=message,
        adapter_dir="/" + "d" * 1500,
        clamps=tuple(clamp(number) for number in range(clamps)),
    )
    data = encode_termination(termination)
    assert len(data) <= 4096
    back = Termination.model_validate_json(data)
    assert (back.exit_code, back.reason) == (70, "InternalError")
    if clamps == 200:
        assert "of 200 clamps left out" in back.message


def test_a_text_is_cut_in_its_middle() -> None:
    assert shorten("abc", 10) == "abc"
    cut = shorten("a" * 500 + "b" * 500, 101)
    assert len(cut) == 101
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")


def test_a_termination_is_written_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKOFFER_TERMINATION_LOG", str(tmp_path / "log"))
    assert write_termination(Termination(exit_code=0, reason="Completed")) == tmp_path / "log"
    assert json.loads((tmp_path / "log").read_text())["reason"] == "Completed"


def report(**changes: Any) -> ProgressReport:
    settings: dict[str, Any] = {"job_name": "job", "state": RunState.TRAINING, "last_updated_time": NOW}
    return ProgressReport(**{**settings, **changes})


def test_a_report_is_replaced_in_one_step_and_starting_before_the_first(
    tmp_path: Path, base_config: dict[str, Any]
) -> None:
    config = RunConfig.model_validate({**base_config, "outputDir": "/o", "checkpointDir": "/c"})
    path = tmp_path / "progress.json"
    assert read_report(path, config, Clock(NOW)).state is RunState.STARTING
    write_report(path, report(step=3))
    assert read_report(path, config, Clock(NOW)).step == 3
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_figures_that_are_not_finite_are_not_exposed() -> None:
    metrics = (Metric(name="loss", value="nan"), Metric(name="learning_rate", value="0.5"))
    text = render_metrics(report(metrics=metrics, step=1, total_steps=4), Clock(NOW))
    assert "taskoffer_trainer_loss" not in text
    assert "taskoffer_trainer_learning_rate 0.5\n" in text
    assert "taskoffer_trainer_progress_ratio 0.25\n" in text
    assert "job" not in text


def make_checkpoints(config: RunConfig, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        folder = Path(config.checkpoint_dir) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").write_text(json.dumps({"step": step, "eval_loss": loss, "files": {}}))


ROTATIONS = [
    ({10: 3.0, 20: 2.0, 30: 1.0}, 2, [20, 30]),
    ({10: 1.0, 20: 2.0, 30: 3.0, 100: 4.0}, 2, [10, 100]),
    ({10: 1.0, 20: 2.0, 30: 3.0, 100: 4.0}, 3, [10, 30, 100]),
    ({10: 1.0, 20: 2.0}, 1, [10, 20]),
    ({10: None, 20: None}, 1, [20]),
]


@pytest.mark.parametrize(("losses", "limit", "kept"), ROTATIONS)
def test_the_newest_and_the_best_checkpoints_stay(
    losses: dict[int, float | None], limit: int, kept: list[int], tmp_path: Path, base_config: dict[str, Any]
) -> None:
    train = {**base_config["train"], "saveTotalLimit": limit}
    wire = {**base_config, "train": train, "outputDir": "/o", "checkpointDir": str(tmp_path)}
    config = RunConfig.model_validate(wire)
    make_checkpoints(config, losses)
    unfinished = tmp_path / "checkpoint-999"
    unfinished.mkdir()
    rotate(config)
    assert sorted(one.step for one in complete_checkpoints(config)) == kept
    assert unfinished.exists()


BEST = [([(1, 2.0), (2, 1.0), (3, 1.5)], 2), ([(1, 1.0), (2, 1.0)], 2), ([(1, None), (2, 5.0), (3, None)], 2)]


@pytest.mark.parametrize(("found", "step"), BEST)
def test_the_best_checkpoint_has_the_smallest_loss_and_is_the_newest_of_equals(
    found: list[tuple[int, float | None]], step: int
) -> None:
    assert best_checkpoint([Checkpoint(Path("/x"), at, loss) for at, loss in found]).step == step


def test_the_fingerprint_counts_what_changes_the_weights_and_nothing_else(base_config: dict[str, Any]) -> None:
    wire = {**base_config, "outputDir": "/o", "checkpointDir": "/c"}
    first = fingerprint(RunConfig.model_validate(wire))
    same = {**wire, "attempt": 5, "outputDir": "/p", "samplePrompts": ["?"], "deadline": "2030-01-01T00:00:00Z"}
    assert fingerprint(RunConfig.model_validate(same)) == first
    stored = [{**wire, "data": {**wire["data"], "fileFormat": kind}} for kind in (None, "parquet", "hf")]
    # An operator of another version may leave out what is found all the same.
    assert {fingerprint(RunConfig.model_validate(one)) for one in stored} == {first}
    elsewhere = {"data": {**wire["data"], "path": "/elsewhere"}}
    for change in (elsewhere, {"gpus": 2}, {"lora": {"r": 9}}, {"train": {**wire["train"], "seed": 7}}):
        assert fingerprint(RunConfig.model_validate({**wire, **change})) != first
