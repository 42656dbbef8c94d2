"""What cannot be trained ends with its own exit code and a message that names the thing and the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import DataConfig
from taskoffer_trainer.__main__ import main as command
from taskoffer_trainer.data import split_rows
from taskoffer_trainer.instruct_data import build_examples

from .conftest import MakeTraining, Outcome, Training, merge, side_by_side

pytestmark = pytest.mark.trainer

WRONG_CONFIGS = [
    ({"gpus": 0}, "ConfigInvalid", ["gpus", "greater than or equal to 1", "given: 0"]),
    ({"train": {"saveSteps": 7}}, "ConfigInvalid", ["train", "saveSteps (7) must be a multiple of evalSteps (8)"]),
    ({"train": {"learningRate": "fast"}}, "ConfigInvalid", ["train.learningRate", '"fast"']),
    (
        {"lora": {"rank": 8}},
        "ConfigInvalid",
        ["lora.rank", "not permitted", "(podTemplate.image of the policy) older"],
    ),
    ({"model": None}, "ConfigInvalid", ["model: Field required"]),
    ({"taskType": "Chat"}, "ConfigInvalid", ["data.chat", "chatColumn"]),
    ({"taskType": "DPO"}, "ConfigInvalid", ["data.dpo", "fieldRejected"]),
    ({"data": {"instruct": None}}, "ConfigInvalid", ["data.instruct", "fieldInstruction"]),
    ({"data": {"fileFormat": "zip"}}, "ConfigInvalid", ["data.fileFormat"]),
    ({"deadline": "2026-01-01T00:00:00"}, "ConfigInvalid", ["deadline", "time zone"]),
    ({"outputDir": "/proc/nowhere"}, "FolderNotWritable", ["outputDir", "/proc/nowhere"]),
]


@pytest.mark.parametrize(("change", "reason", "words"), WRONG_CONFIGS, ids=[str(case[0]) for case in WRONG_CONFIGS])
def test_a_bad_configuration_is_refused_by_the_name_of_its_field(
    change: dict[str, Any], reason: str, words: list[str], training: MakeTraining
) -> None:
    outcome = training(**change).run()
    assert (outcome.code, outcome.termination["exitCode"], outcome.termination["reason"]) == (64, 64, reason)
    for word in words:
        assert word in outcome.termination["message"]
    assert outcome.termination["message"] in outcome.log


def test_a_configuration_that_is_not_there_or_not_json_is_refused(training: MakeTraining, tmp_path: Path) -> None:
    run = training()
    missing = run.run("--config", str(tmp_path / "nothing.json"))
    assert (missing.code, missing.termination["reason"]) == (64, "ConfigUnreadable")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    outcome = run.run("--config", str(broken))
    assert (outcome.code, outcome.termination["reason"]) == (64, "ConfigInvalid")


MISSING = [
    ({"model": {"path": "/nowhere/model"}}, 66, "ModelMissing", ["/nowhere/model does not exist", "acme/tiny-llama"]),
    ({"model": {"path": "/etc"}}, 66, "ModelMissing", ["/etc has no config.json"]),
    ({"data": {"path": "/nowhere/data.jsonl"}}, 65, "DataMissing", ["/nowhere/data.jsonl", "volume"]),
    (
        {"data": {"instruct": {"fieldOutput": "answer"}}},
        65,
        "ColumnMissing",
        ["'answer'", "its columns are input, instruction, output"],
    ),
    ({"data": {"fileFormat": "csv"}}, 65, "ColumnMissing", ["column 'instruction'"]),
    ({"data": {"fileFormat": "parquet"}}, 65, "DataUnreadable", ["not Parquet"]),
    ({"deadline": "2026-01-01T00:00:00Z"}, 64, "DeadlinePassed", ["2026-01-01T00:00:00Z"]),
]


@pytest.mark.parametrize(("change", "code", "reason", "words"), MISSING, ids=[case[2] for case in MISSING])
def test_a_missing_or_unfit_input_has_its_own_exit_code(
    change: dict[str, Any], code: int, reason: str, words: list[str], training: MakeTraining
) -> None:
    outcome = training(**change).run()
    assert (outcome.code, outcome.termination["reason"]) == (code, reason), outcome.log
    for word in words:
        assert word in outcome.termination["message"]


def copy_of_model(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


POISON = "☃"


def poisoned_model(fixtures_dir: Path, target: Path) -> Path:
    """A model that turns every row with a snowman into NaN."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer

    model = copy_of_model(fixtures_dir / "llama", target)
    token = Tokenizer.from_file(str(model / "tokenizer.json")).encode(POISON).ids[-1]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def poisoned(make: MakeTraining, name: str, model: Path, fixtures_dir: Path, clean: int, bad: int) -> Training:
    """A training with clean rows and rows with a snowman, none of which is held out."""
    run = make(name, model={"path": str(model)})
    run.config["data"] = {**run.config["data"], "path": str(run.folder / "rows.jsonl")}
    rows = [json.loads(line) for line in (fixtures_dir / "data" / "train.jsonl").read_text().splitlines()]
    good = rows[:clean]
    spoilt = [{**row, "instruction": f"{POISON} {row['instruction']}"} for row in rows[clean:]][:bad]
    data = DataConfig.model_validate(run.config["data"])
    assert data.instruct is not None
    while True:
        held_out = split_rows(build_examples(good + spoilt, data.instruct), data, seed=42).held_out
        answers = {example.answer for example in held_out if POISON in example.user}
        if not answers:
            break
        spoilt = [row for row in spoilt if row["output"] not in answers]
    assert spoilt
    (run.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good + spoilt))
    return run


@pytest.fixture(scope="module")
def slow(
    shared_training: MakeTraining, fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Runs whose trouble shows only once the heavy libraries are loaded, two at a time."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("slow")
    model = copy_of_model(fixtures_dir / "llama", folder / "holes")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    poison = poisoned_model(fixtures_dir, folder / "poisoned")
    trainings = {
        "holes": shared_training("holes", model={"path": str(model)}),
        "names": shared_training("names", lora={"targetModules": "q_proj,w_proj"}),
        "some": poisoned(shared_training, "some", poison, fixtures_dir, clean=120, bad=8),
        "all": poisoned(shared_training, "all", poison, fixtures_dir, clean=30, bad=170),
    }
    return dict(zip(trainings, side_by_side(*trainings.values()), strict=True))


def test_a_model_with_missing_weights_is_refused_instead_of_filled_with_random_numbers(
    slow: dict[str, Outcome],
) -> None:
    outcome = slow["holes"]
    assert (outcome.code, outcome.termination["reason"]) == (66, "ModelUnusable"), outcome.log
    assert "1 weights are missing, the first is model.layers.1.mlp.up_proj.weight" in outcome.termination["message"]


def test_where_the_model_lacks_a_listed_layer_all_of_them_are_adapted_and_it_is_said(slow: dict[str, Outcome]) -> None:
    outcome = slow["names"]
    assert outcome.code == 0, outcome.log
    (told,) = [clamp for clamp in outcome.termination["clamps"] if clamp["field"] == "lora.targetModules"]
    assert (told["requested"], told["effective"], told["reason"]) == ("q_proj,w_proj", "all-linear", "TargetsClamped")
    assert told["message"] == (
        "No linear layer is called w_proj; this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
        "v_proj."
    )
    assert "28 adapter tensors" in outcome.log


def test_steps_with_gradients_that_are_not_finite_are_left_out(slow: dict[str, Outcome]) -> None:
    outcome = slow["some"]
    assert outcome.code == 0, outcome.log
    assert "are not finite, the step is left out" in outcome.log
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"] - 0.2


def test_nothing_but_gradients_that_are_not_finite_asks_for_a_restart(slow: dict[str, Outcome]) -> None:
    outcome = slow["all"]
    assert (outcome.code, outcome.termination["reason"]) == (138, "GradientsNotFinite"), outcome.log
    assert "train.learningRate" in outcome.termination["message"]


def test_a_failure_says_how_far_the_attempt_came_and_so_do_its_report_and_what_is_noted_of_it(
    slow: dict[str, Outcome], shared_training: MakeTraining
) -> None:
    termination, run = slow["all"].termination, shared_training("all")
    step = termination["step"]
    assert f"10 steps in a row up to step {step + 1} are not finite" in termination["message"]
    assert (step >= 9, termination["totalSteps"], termination["samples"]) == (True, 24, 4 * step)
    newest = max(int(path.parent.name.partition("-")[2]) for path in run.checkpoints.glob("checkpoint-*/COMPLETE"))
    assert termination["checkpoint"] == f"checkpoint-{newest}"
    report = json.loads((run.output / "report.json").read_text())
    assert [(one["exitCode"], one["step"]) for one in report["attempts"]] == [(138, step)]
    kept = json.loads((run.checkpoints / "run.json").read_text())
    assert [(one["reason"], one["step"]) for one in kept["fallbacks"]] == [("GradientsNotFinite", step)]


def test_help_explains_exit_codes_and_variables() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "taskoffer_trainer", "--help"], check=True, capture_output=True, text=True
    )
    for word in ("--print-config", "--check", "143", "TASKOFFER_PROGRESS_PORT", "/etc/taskoffer/run.json"):
        assert word in answer.stdout


def test_print_config_fills_in_every_default_and_is_itself_valid(training: MakeTraining, tmp_path: Path) -> None:
    printed = training().run("--print-config")
    assert printed.code == 0
    config = json.loads(printed.log)
    assert config["train"]["maxGradNorm"] == 1.0
    (tmp_path / "again.json").write_text(printed.log)
    again = training("again").run("--print-config", "--config", str(tmp_path / "again.json"))
    assert json.loads(again.log) == config


def test_check_looks_at_paths_without_training(training: MakeTraining) -> None:
    good = training().run("--check")
    assert good.code == 0
    assert "ready to train acme/tiny-llama" in good.log
    bad = training("bad", model={"path": "/nowhere"}).run("--check")
    assert bad.code == 66


def test_an_end_that_cannot_be_written_down_keeps_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASKOFFER_TERMINATION_LOG", str(tmp_path / "nowhere" / "end.json"))
    assert command(["--config", str(tmp_path / "absent.json")]) == 64
    assert "end.json could not be written: [Errno 2]" in capsys.readouterr().out


def test_merge_removes_what_is_none() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}) == {"a": {"c": 2}}
