"""The report beside the adapter: what happened over all attempts, for machines, for people, and as a picture."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taskoffer.api.contract import Clamp, HistoryPoint, Metric, Report, RunConfig, Termination
from taskoffer_trainer import plot, reporting
from taskoffer_trainer.clock import Clock
from taskoffer_trainer.reporting import has_report, history_of, report_end, text_of, thinned

pytestmark = pytest.mark.trainer

CLOCK = Clock(datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC))
LOG: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "learning_rate": 0.1, "epoch": 0.1},
    {"step": 2, "loss": 2.5, "learning_rate": 0.1, "epoch": 0.2},
    {"step": 2, "eval_loss": 2.75, "eval_accuracy": 0.5},
    {"step": 3, "loss": float("nan"), "learning_rate": 0.1},
    {"step": 4, "loss": 2.0, "learning_rate": 0.1},
    {"step": 4, "eval_loss": 2.5, "eval_accuracy": 0.625},
    {"step": 4, "train_runtime": 1.0, "train_loss": 2.5, "total_flos": 0.0, "train_steps_per_second": 4.0},
]
BEFORE = (Metric(name="eval_loss", value="3.25"), Metric(name="eval_accuracy", value="0.25"))
AFTER = (Metric(name="eval_loss", value="2.5"), Metric(name="eval_accuracy", value="0.625"))
DONE = Termination(
    exit_code=0,
    reason="Completed",
    message="adapter of step 4 verified",
    step=4,
    total_steps=4,
    figures_before=BEFORE,
    figures_after=AFTER,
    adapter_dir="/anywhere/adapter",
    tokens_per_second=1234.5,
    clamps=(Clamp(field="lora.r", requested="512", effective="21", reason="RankClamped"),),
)
STOPPED = Termination(exit_code=143, reason="Stopped", step=2, total_steps=4, figures_before=BEFORE)


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("TASKOFFER_LOSS_PLOT", "0")
    place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / "checkpoints")}
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (folder / "COMPLETE").write_text(json.dumps({"step": 4, "eval_loss": 2.5, "files": {}}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return RunConfig.model_validate({**base_config, **place})


def report_of(config: RunConfig) -> Report:
    return Report.model_validate_json((Path(config.output_dir) / "report.json").read_bytes())


def test_the_history_has_one_point_for_each_step_with_what_is_finite() -> None:
    points = history_of(LOG)
    assert [(point.step, point.figures) for point in points] == [
        (1, {"loss": 3.0, "learning_rate": 0.1}),
        (2, {"loss": 2.5, "learning_rate": 0.1, "eval_loss": 2.75, "eval_accuracy": 0.5}),
        (3, {"learning_rate": 0.1}),
        (4, {"loss": 2.0, "learning_rate": 0.1, "eval_loss": 2.5, "eval_accuracy": 0.625}),
    ]


@pytest.mark.parametrize(("count", "every", "most"), [(10, 2, 2000), (10_000, 100, 2000), (10_000, 2, 50), (7, 1, 3)])
def test_a_long_history_keeps_its_ends_and_as_many_evaluations_as_there_is_room_for(
    count: int, every: int, most: int
) -> None:
    points = [
        HistoryPoint(step=step, figures={"loss": 1.0, **({"eval_loss": 1.0} if step % every == 0 else {})})
        for step in range(1, count + 1)
    ]
    kept = thinned(points, most)
    assert len(kept) == min(count, most)
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert kept[-1] == points[-1]
    evaluated = [point for point in points if "eval_loss" in point.figures]
    assert sum("eval_loss" in point.figures for point in kept) >= min(len(evaluated), most // 2)


def test_a_finished_run_is_reported_with_its_figures_before_best_and_after(config: RunConfig) -> None:
    assert not has_report(config)
    report_end(config, CLOCK, DONE)
    report = report_of(config)
    assert has_report(config)
    assert (report.result, report.adapter, report.step, report.reason) == ("Verified", "adapter", 4, "Completed")
    figures = {one.name: (one.before, one.best, one.after) for one in report.figures}
    assert figures == {"eval_loss": (3.25, 2.5, 2.5), "eval_accuracy": (0.25, 0.625, 0.625)}
    assert [point.step for point in report.history] == [1, 2, 3, 4]
    assert report.clamps[0].effective == "21"


def test_a_run_that_is_stopped_and_goes_on_keeps_each_attempts_end(config: RunConfig) -> None:
    report_end(config, CLOCK, STOPPED)
    assert (report_of(config).result, report_of(config).adapter) == ("Nothing", None)
    assert not has_report(config)
    for _ in range(2):
        # The same attempt is there once, however often its end is told.
        report_end(config.model_copy(update={"attempt": 2}), CLOCK, DONE)
    ends = [(one.attempt, one.exit_code, one.reason) for one in report_of(config).attempts]
    assert ends == [(1, 143, "Stopped"), (2, 0, "Completed")]


def test_the_report_of_another_job_or_form_is_not_taken_over(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report_end(config.model_copy(update={"job_name": "another"}), CLOCK, STOPPED)
    report_end(config.model_copy(update={"attempt": 2}), CLOCK, DONE)
    assert [one.attempt for one in report_of(config).attempts] == [2]
    (Path(config.output_dir) / "report.json").write_text('{"version": "v9"}')
    report_end(config.model_copy(update={"attempt": 3}), CLOCK, DONE)
    assert [one.attempt for one in report_of(config).attempts] == [3]
    assert "is no report of this version" in capsys.readouterr().out


def test_people_read_the_figures_the_changes_and_the_attempts(config: RunConfig) -> None:
    report_end(config, CLOCK, DONE)
    text = (Path(config.output_dir) / "report.md").read_text()
    assert "InstructText on acme/tiny-llama: **Completed** after 4 of 4 steps." in text
    assert "| eval loss | 3.2500 | 2.5000 | 2.5000 |" in text
    assert "* `lora.r`: 512 → 21 (RankClamped)" in text
    assert "| 1 | 2026-05-04 03:02:01Z | 0 | Completed | 4 |" in text
    assert "1,234" in text
    assert text == text_of(report_of(config))


def picture(config: RunConfig) -> Image.Image:
    with Image.open(Path(config.output_dir) / "loss.png") as image:
        image.load()
        return image


def test_the_picture_shows_losses_and_what_else_the_method_measures(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKOFFER_LOSS_PLOT", "1")
    report_end(config, CLOCK, DONE)
    with_accuracy = picture(config)
    assert with_accuracy.format == "PNG"
    # Blue for training, orange for held out, green for other figures: matplotlib's first three colours.
    colours = {colour[:3] for _, colour in with_accuracy.getcolors(1 << 24)}  # type: ignore[union-attr, index]
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours
    state = Path(config.checkpoint_dir) / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [entry for entry in LOG if "eval_accuracy" not in entry]}))
    report_end(config, CLOCK, DONE)
    assert picture(config).size[1] < with_accuracy.size[1]


def test_after_a_stop_nobody_waits_for_a_picture(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKOFFER_LOSS_PLOT", "1")
    report_end(config, CLOCK, STOPPED)
    assert not (Path(config.output_dir) / "loss.png").exists()


def refuse(*_: object) -> None:
    raise OSError("No space left on device")


def test_a_picture_that_cannot_be_drawn_is_said_and_the_report_goes_without_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASKOFFER_LOSS_PLOT", "1")
    monkeypatch.setattr(plot, "draw", refuse)
    report_end(config, CLOCK, DONE)
    said = capsys.readouterr()
    assert "loss.png could not be drawn" in said.out
    assert "No space left on device" in said.err
    assert has_report(config)


def test_a_report_that_cannot_be_written_fails_no_run_and_is_said(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting, "write_json", refuse)
    report_end(config, CLOCK, DONE)
    said = capsys.readouterr()
    assert "could not be written" in said.out
    assert "No space left on device" in said.err
    assert not has_report(config)
