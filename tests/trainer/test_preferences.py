"""Preference pairs through the real entry point: margins rise on pairs that nobody trained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import MakeTraining, Outcome, Training, side_by_side

pytestmark = pytest.mark.trainer


STEPS = 16
ROUNDING = 2e-4
"""Single precision adds up in another order; see the tests of live tuning."""


def losses_of(training: Training) -> list[float]:
    state = json.loads((training.checkpoints / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == STEPS
    return losses


def weights(training: Training) -> bytes:
    return (training.adapter / "adapter_model.safetensors").read_bytes()


def dpo(fixtures_dir: Path, **train: Any) -> dict[str, Any]:
    return {
        "taskType": "DPO",
        "data": {
            "path": str(fixtures_dir / "preferences" / "train.jsonl"),
            "instruct": None,
            "dpo": {},
            "evalRowsMax": 20,
        },
        "train": {"maxSteps": STEPS, "learningRate": 0.002, "maxLength": 128, **train},
        "samplePrompts": None,
    }


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining, fixtures_dir: Path) -> dict[str, tuple[Training, Outcome]]:
    asked: dict[str, dict[str, Any]] = {
        "one": dpo(fixtures_dir),
        "two": {**dpo(fixtures_dir, perDeviceTrainBatchSize=1, gradientAccumulationSteps=2), "gpus": 2},
        "ipo": {
            **dpo(fixtures_dir, lossType="ipo", beta=0.2, labelSmoothing=0.1, packing=True),
            "lora": {"loraDropout": 0.1},
        },
    }
    trainings = {name: shared_training(name, **changes) for name, changes in asked.items()}
    outcomes = side_by_side(*trainings.values())
    return {name: (one, outcome) for (name, one), outcome in zip(trainings.items(), outcomes, strict=True)}


def manifest_of(training: Training) -> dict[str, Any]:
    value = json.loads((training.adapter / "manifest.json").read_text())
    assert isinstance(value, dict)
    return value


def test_margins_and_accuracy_rise_on_held_out_pairs(runs: dict[str, tuple[Training, Outcome]]) -> None:
    training, outcome = runs["one"]
    assert outcome.code == 0, outcome.log
    manifest = manifest_of(training)
    before, after = manifest["figuresBefore"], manifest["figuresAfter"]
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (before["eval_accuracy"], before["eval_margin"]) == (0.5, 0)
    assert after["eval_loss"] < 0.6
    assert after["eval_accuracy"] > 0.8
    assert after["eval_margin"] > 0.2
    assert after["eval_margin"] == pytest.approx(after["eval_reward_chosen"] - after["eval_reward_rejected"])
    assert outcome.termination["evalLossBefore"] == pytest.approx(math.log(2))
    assert outcome.termination["evalLossAfter"] == after["eval_loss"]
    assert manifest["rows"]["train"] + manifest["rows"]["held_out"] == 200


def test_no_second_adapter_is_kept_as_the_reference(runs: dict[str, tuple[Training, Outcome]]) -> None:
    training, _ = runs["one"]
    assert not list(training.checkpoints.rglob("ref"))
    manifest = manifest_of(training)
    assert set(manifest["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = (training.adapter / "README.md").read_text()
    assert "Direct preference optimisation" in card
    assert "- dpo" in card


def test_two_processes_with_other_micro_batches_learn_the_same(runs: dict[str, tuple[Training, Outcome]]) -> None:
    """The same pairs per step, one at a time in each of two processes instead of four at a time in one."""
    (one, _), (two, outcome) = runs["one"], runs["two"]
    assert outcome.code == 0, outcome.log
    assert losses_of(two) == pytest.approx(losses_of(one), rel=ROUNDING)
    alone, together = manifest_of(one)["figuresAfter"], manifest_of(two)["figuresAfter"]
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=5e-3, abs=5e-3), name


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(
    runs: dict[str, tuple[Training, Outcome]], tmp_path: Path
) -> None:
    whole, _ = runs["one"]
    place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / "checkpoints")}
    training = Training(tmp_path, {**whole.config, **place, "attempt": 2})
    gone = shutil.ignore_patterns("FINISHED.json", f"checkpoint-{STEPS}")
    shutil.copytree(whole.checkpoints, training.checkpoints, ignore=gone)
    outcome = training.run()
    assert (outcome.code, outcome.termination["resumedFromStep"]) == (0, 8), outcome.log
    assert weights(training) == weights(whole)


def test_settings_without_effect_are_reported(runs: dict[str, tuple[Training, Outcome]]) -> None:
    training, outcome = runs["ipo"]
    assert outcome.code == 0, outcome.log
    clamps = {clamp["field"]: clamp for clamp in outcome.termination["clamps"]}
    # The CPU has no bfloat16, and so few rows in a step are not worth as many in an evaluation.
    others = clamps.keys() - {"train.bf16", "data.evalRowsMax"}
    assert {name: (clamps[name]["requested"], clamps[name]["effective"]) for name in others} == {
        "lora.loraDropout": ("0.1", "0"),
        "train.packing": ("true", "false"),
        "train.labelSmoothing": ("0.1", "0"),
    }
    assert manifest_of(training)["figuresAfter"]["eval_accuracy"] > 0.8
