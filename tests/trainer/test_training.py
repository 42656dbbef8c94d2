"""A training through the real entry point: it learns, verifies what it made, and leaves a complete adapter."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import MakeTraining, Outcome, Training, side_by_side

pytestmark = pytest.mark.trainer


@dataclass
class Runs:
    """Two trainings that were run side by side, and one that got a deadline from how long they took."""

    one: tuple[Training, Outcome]
    plain_text: tuple[Training, Outcome]
    deadline: tuple[Training, Outcome]
    deadline_seconds: float


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining, fixtures_dir: Path) -> Runs:
    one = shared_training("one").anew()
    plain_text = shared_training(
        "plain-text",
        model={"name": "acme/tiny-phi3", "path": str(fixtures_dir / "phi3")},
        data={"instruct": {"fieldInstruction": "output", "fieldInput": None, "fieldOutput": None}},
        lora={"r": 512, "loraAlpha": 1024},
    )
    outcomes = side_by_side(one, plain_text)
    # A machine under load takes long to load a model; the deadline must leave time for that and some training.
    seconds = math.ceil(2 * outcomes[1].seconds) + 5
    deadline = shared_training("deadline", timeLimitSeconds=seconds, train={"maxSteps": 100000})
    return Runs((one, outcomes[0]), (plain_text, outcomes[1]), (deadline, deadline.run()), seconds)


@pytest.fixture(scope="module")
def one_process(runs: Runs) -> tuple[Training, Outcome]:
    return runs.one


def manifest_of(training: Training) -> dict[str, Any]:
    value = json.loads((training.adapter / "manifest.json").read_text())
    assert isinstance(value, dict)
    return value


def test_learning_lowers_the_held_out_loss(one_process: tuple[Training, Outcome]) -> None:
    _, outcome = one_process
    assert outcome.code == 0, outcome.log
    assert outcome.termination["reason"] == "Completed"
    assert outcome.termination["step"] == outcome.termination["totalSteps"] == 24
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"] - 0.3


def test_the_termination_says_what_the_training_took(one_process: tuple[Training, Outcome]) -> None:
    _, outcome = one_process
    said = outcome.termination
    assert 0 < said["trainingSeconds"] < outcome.seconds
    tokens = said["tokensPerSecond"]
    assert tokens > 0
    # At this rate the steps alone cannot have taken longer than the whole; a tiny row has at least one token.
    assert said["totalSteps"] / tokens < said["trainingSeconds"]
    assert said["peakHostBytes"] > 50 << 20
    assert ("peakGpuBytes" in said) is torch.cuda.is_available()


def test_the_manifest_names_every_file_with_its_hash(one_process: tuple[Training, Outcome]) -> None:
    training, outcome = one_process
    manifest = manifest_of(training)
    files = {path.name for path in training.adapter.iterdir()} - {"manifest.json"}
    assert files == set(manifest["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name, entry in manifest["files"].items():
        data = (training.adapter / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert outcome.termination["adapterSha256"] == manifest["files"]["adapter_model.safetensors"]["sha256"]
    assert outcome.termination["adapterDir"] == str(training.adapter)


def test_the_adapter_names_the_public_base_model_and_not_a_path(one_process: tuple[Training, Outcome]) -> None:
    training, _ = one_process
    settings = json.loads((training.adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "acme/tiny-llama"
    assert str(training.folder.parent.parent) not in json.dumps(settings)
    assert 'base_model: "acme/tiny-llama"' in (training.adapter / "README.md").read_text()


def test_answers_before_and_after_are_recorded_and_differ(one_process: tuple[Training, Outcome]) -> None:
    training, _ = one_process
    (sample,) = manifest_of(training)["sampleAnswers"]
    assert sample["prompt"] == "Quote the Python reference on Modules."
    assert sample["after"]
    assert sample["before"] != sample["after"]


def test_only_the_output_and_checkpoint_folders_are_written(one_process: tuple[Training, Outcome]) -> None:
    training, _ = one_process
    assert {path.name for path in training.output.iterdir()} == {"adapter", "report.json", "report.md", "log.txt"}
    assert list(training.tmp.iterdir()) == []
    known = {"run.json", "FINISHED.json"}
    assert {path.name for path in training.checkpoints.iterdir()} - known == {"checkpoint-16", "checkpoint-24"}


def test_a_finished_run_is_reported_at_once(one_process: tuple[Training, Outcome]) -> None:
    training, first = one_process
    # As when the attempt that finished it was killed before it had tidied up and reported.
    (training.output / "report.json").unlink()
    (training.output / "provisional" / "step-5-0123").mkdir(parents=True)
    again = Training(training.folder, training.config).run()
    assert json.loads((training.output / "report.json").read_text())["result"] == "Verified"
    assert not (training.output / "provisional").exists()
    assert (again.code, again.termination) == (0, first.termination)
    assert again.seconds < first.seconds / 2
    assert "nothing to do" in again.log


def test_an_adapter_that_does_not_do_what_it_did_in_training_fails_verification(
    one_process: tuple[Training, Outcome], shared_training: MakeTraining
) -> None:
    """The checkpoint says another loss than its weights give, as when the export had lost a part of them."""
    source, _ = one_process
    training = shared_training("unverified")
    shutil.copytree(source.checkpoints, training.checkpoints, ignore=shutil.ignore_patterns("FINISHED.json"))
    for marker in training.checkpoints.glob("checkpoint-*/COMPLETE"):
        record = json.loads(marker.read_text())
        marker.write_text(json.dumps({**record, "eval_loss": record["eval_loss"] - 1}))
    outcome = training.run()
    assert (outcome.code, outcome.termination["reason"]) == (74, "VerifyFailed")
    assert "after loading" in outcome.termination["message"]
    # What is there as the best so far is the same adapter, so it is not left either.
    assert {path.name for path in training.output.iterdir()} == {"report.json", "report.md", "log.txt"}
    # Started again it ends the same way.
    again = Training(training.folder, training.config).run()
    assert (again.code, again.termination["reason"]) == (74, "VerifyFailed")
    assert {path.name for path in training.output.iterdir()} == {"report.json", "report.md", "log.txt"}


def test_where_the_best_checkpoint_fails_verification_the_next_best_is_handed_over(
    one_process: tuple[Training, Outcome], shared_training: MakeTraining
) -> None:
    source, _ = one_process
    training = shared_training("second-best")
    shutil.copytree(source.checkpoints, training.checkpoints, ignore=shutil.ignore_patterns("FINISHED.json"))
    marker = training.checkpoints / "checkpoint-24" / "COMPLETE"
    record = json.loads(marker.read_text())
    marker.write_text(json.dumps({**record, "eval_loss": record["eval_loss"] - 1}))
    outcome = training.run()
    assert (outcome.code, outcome.termination["reason"]) == (0, "Completed"), outcome.log
    assert "the adapter of step 24 is not published: the adapter did not pass verification" in outcome.log
    said = outcome.termination["message"]
    assert said.startswith("adapter of step 16 verified")
    assert said.endswith("; 1 better by its evaluation did not pass")
    weights = "adapter_model.safetensors"
    kept = training.checkpoints / "checkpoint-16" / weights
    assert (training.adapter / weights).read_bytes() == kept.read_bytes()
    assert not (training.output / "provisional").exists()


def test_a_run_of_one_step_with_a_warm_up_learns_something(training: MakeTraining) -> None:
    made = training(train={"maxSteps": 1, "warmupSteps": 0.03})
    outcome = made.run()
    assert outcome.code == 0, outcome.log
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"]


@pytest.mark.parametrize("processes", [2, 4])
def test_more_processes_learn_the_same_from_the_same_global_batch(
    processes: int, one_process: tuple[Training, Outcome], training: MakeTraining
) -> None:
    """Rows of a step and their order do not depend on how many processes share them."""
    _, alone = one_process
    made = training(gpus=processes, train={"perDeviceTrainBatchSize": 4 // processes})
    # One of the two shows that processes which were started apart find together.
    together = (made.anew() if processes == 2 else made).run()
    assert together.code == 0, together.log
    assert together.termination["evalLossBefore"] == pytest.approx(alone.termination["evalLossBefore"], rel=1e-5)
    assert together.termination["evalLossAfter"] == pytest.approx(alone.termination["evalLossAfter"], rel=2e-3)
    assert f"{processes} process(es)" in together.log


def test_text_without_an_output_column_is_trained_as_plain_text(runs: Runs) -> None:
    _, outcome = runs.plain_text
    assert outcome.code == 0, outcome.log
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"] - 0.3


def test_every_layer_gets_the_rank_that_it_can_use_and_the_clamps_are_reported(runs: Runs) -> None:
    """Phi-3 names its layers differently (qkv_proj, gate_up_proj); each gets the rank that it can use."""
    training, outcome = runs.plain_text
    clamps = {clamp["field"]: clamp for clamp in outcome.termination["clamps"] if clamp["reason"] == "RankClamped"}
    # Hidden size 64, feed-forward 128, 4 heads of 16 with 2 key-value heads.
    effective = {"qkv_proj": 21, "o_proj": 16, "gate_up_proj": 25, "down_proj": 21}
    assert {name: (clamp["requested"], clamp["effective"]) for name, clamp in clamps.items()} == {
        f"lora.r[{name}]": ("512", str(rank)) for name, rank in effective.items()
    }
    settings = json.loads((training.adapter / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == effective
    for name, rank in effective.items():
        assert settings["alpha_pattern"][name] / rank == pytest.approx(1024 / 512)


def test_the_deadline_ends_the_training_in_time_with_the_best_so_far(runs: Runs) -> None:
    training, outcome = runs.deadline
    assert (outcome.code, outcome.termination["reason"]) == (0, "DeadlineReached"), outcome.log
    assert outcome.seconds < runs.deadline_seconds
    assert 0 < outcome.termination["step"] < outcome.termination["totalSteps"] == 100000
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"]
    assert (training.adapter / "adapter_model.safetensors").is_file()
