"""A training that is killed without warning leaves its best adapter, and the next attempt goes on to a verified one.

``TASKOFFER_TRAINER_KILLS`` sets how often the whole training is killed, at a step that is drawn each time (1).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from taskoffer.api.contract import SubmitConfig, Termination
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit import submit

from .conftest import MakeTraining, Outcome, Training

pytestmark = pytest.mark.trainer

KILLS = int(os.environ.get("TASKOFFER_TRAINER_KILLS", "1"))
STEPS = 80
FIRST = 5
"""Step of the first checkpoint."""


def provisional(training: Training) -> list[Path]:
    return sorted((training.output / "provisional").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))


def assert_whole(folder: Path) -> dict[str, Any]:
    """Check an adapter as whoever finds it would: against its manifest, and by reading it."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    tensors = load_file(folder / "adapter_model.safetensors")
    # Two matrices for each of the seven linear layers in each of the two blocks.
    assert len(tensors) == 28
    assert all(bool((tensor == tensor).all()) and tensor.size for tensor in tensors.values())
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["base_model_name_or_path"]) == ("LORA", "acme/tiny-llama")
    return manifest


@dataclass
class Killed:
    """A training that was killed as a whole, then in its rank alone, and then came to its end."""

    training: Training
    rank_killed: Outcome
    report: dict[str, Any]
    handed_over: Termination
    place: Path
    done: Outcome
    first_report: dict[str, Any]


def attempt(training: Training, number: int) -> Training:
    training.config["attempt"] = number
    return Training(training.folder, training.config, training.preloader)


@pytest.fixture(scope="module")
def killed(shared_training: MakeTraining) -> Killed:
    drawn = random.Random(os.environ.get("TASKOFFER_TRAINER_KILL_SEED"))
    training = shared_training("killed", train={"maxSteps": STEPS, "saveTotalLimit": 8}, expectedSeconds=77)
    first_report: dict[str, Any] = {}
    for number in range(1, KILLS + 1):
        run = attempt(training, number).anew().start()
        first_report = first_report or run.progress()
        if not provisional(training):
            run.wait_for(lambda: provisional(training))
        run.wait_for_step(drawn.randrange(FIRST, STEPS // 4))
        run.kill()
        assert not training.adapter.exists()
        assert assert_whole(provisional(training)[-1])["provisional"] is True
    # As the operator says it of a container that the kernel has killed as a whole.
    training.config["lackedMemory"] = [KILLS]
    run = attempt(training, KILLS + 1).start()
    run.wait_for_step(drawn.randrange(STEPS // 4, STEPS // 2))
    for rank in run.children():
        os.kill(rank, signal.SIGKILL)
    rank_killed = run.finish()
    report = json.loads((training.output / "report.json").read_text())
    assert_whole(provisional(training)[-1])
    place = training.folder / "handed-over"
    with warnings.catch_warnings():
        # PEFT asks transformers for something by its older name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        handed_over = submit(best_of(training, place), Interrupt())
    done = attempt(training, KILLS + 2).run()
    return Killed(training, rank_killed, report, handed_over, place, done, first_report)


def best_of(training: Training, place: Path) -> SubmitConfig:
    """What the submit step is told when no attempt is left."""
    return SubmitConfig.model_validate(
        {
            "jobName": training.config["jobName"],
            "taskID": training.config["taskID"],
            "adapterDir": str(training.output / "provisional"),
            "baseModel": training.config["model"]["name"],
            "baseModelPath": training.config["model"]["path"],
            "target": {"folder": str(place)},
            "unverified": True,
            "provisional": True,
        }
    )


def test_the_end_is_predicted_before_anything_was_measured(killed: Killed) -> None:
    assert killed.first_report["state"] == "Starting"
    assert killed.first_report["estimatedRemainingSeconds"] == 77


def test_what_a_killed_rank_leaves_is_reported_as_provisional_and_worth_another_attempt(killed: Killed) -> None:
    assert killed.rank_killed.code == 137
    report = killed.report
    assert (report["result"], report["reason"]) == ("Provisional", "Killed")
    assert report["adapter"].startswith("provisional/step-")
    assert report["figures"][0]["name"] == "eval_loss"
    assert [one["attempt"] for one in report["attempts"]] == [KILLS + 1]


def test_a_lack_of_memory_that_only_the_operator_knows_of_makes_the_next_attempt_ask_for_less(killed: Killed) -> None:
    log = (killed.training.output / "log.txt").read_text()
    told = f"trainer: attempt {KILLS} was killed for lack of memory; going on with fallback profile"
    assert [line for line in log.splitlines() if line.startswith(told)] == [f"{told} 2"]
    lowered = [one for one in killed.rank_killed.termination["clamps"] if one["reason"] == "FallbackProfile"]
    assert ("train.perDeviceTrainBatchSize", "4", "smallest") in [
        (one["field"], one["requested"], one["effective"]) for one in lowered
    ]
    # The rank that was killed then is the reason for the one after, and the first one is not counted twice.
    last = [one for one in killed.done.termination["clamps"] if one["reason"] == "FallbackProfile"]
    assert "train.learningRate" in {one["field"] for one in last}


def test_its_end_says_where_the_best_adapter_so_far_lies_and_what_was_clamped(killed: Killed) -> None:
    said, folder = killed.rank_killed.termination["provisional"], killed.report["adapter"]
    assert said == {"path": str(killed.training.output / folder), "step": int(folder.split("-")[1])}
    assert "provisional" not in killed.done.termination
    assert {clamp["field"] for clamp in killed.rank_killed.termination["clamps"]} >= {"train.bf16"}


def test_the_best_adapter_so_far_can_be_handed_over_and_says_what_it_is(killed: Killed) -> None:
    folder = killed.report["adapter"].rpartition("/")[2]
    assert killed.handed_over.exit_code == 0
    assert killed.handed_over.adapter_dir == str(killed.training.output / "provisional" / folder)
    manifest = assert_whole(killed.place)
    step = int(folder.split("-")[1])
    assert (manifest["reason"], manifest["step"], manifest["provisional"]) == ("BestSoFar", step, False)
    card = (killed.place / "README.md").read_text()
    assert f"The training ended early, and this is its best checkpoint, of step {step}." in card


def test_the_next_attempt_ends_with_a_verified_adapter_in_place_of_the_provisional_one(killed: Killed) -> None:
    assert killed.done.code == 0, killed.done.log
    assert killed.done.termination["step"] == STEPS
    assert assert_whole(killed.training.adapter)["provisional"] is False
    assert {path.name for path in killed.training.output.iterdir()} == {
        "adapter",
        "report.json",
        "report.md",
        "log.txt",
    }


def test_the_report_has_the_losses_of_every_step_over_all_attempts(killed: Killed) -> None:
    report = json.loads((killed.training.output / "report.json").read_text())
    assert (report["result"], report["adapter"]) == ("Verified", "adapter")
    assert [point["step"] for point in report["history"] if "loss" in point["figures"]] == list(range(1, STEPS + 1))
    (figure,) = report["figures"]
    assert figure["after"] == pytest.approx(killed.done.termination["evalLossAfter"], rel=1e-4)
    assert figure["best"] == pytest.approx(figure["after"], rel=2e-2)
    assert figure["after"] < figure["before"]
    assert [one["exitCode"] for one in report["attempts"]] == [137, 0]


def test_the_log_has_every_attempt_also_those_that_were_killed(killed: Killed) -> None:
    log = (killed.training.output / "log.txt").read_text()
    headings = [line for line in log.splitlines() if line.startswith("--- job, attempt ")]
    assert [line.split(",")[1] for line in headings] == [f" attempt {number}" for number in range(1, KILLS + 3)]
    assert "train: going on from step" in log


def test_the_termination_has_the_methods_figures_before_and_after(killed: Killed) -> None:
    said = killed.done.termination
    (before,), (after,) = said["figuresBefore"], said["figuresAfter"]
    assert before["name"] == after["name"] == "eval_loss"
    assert float(after["value"]) == pytest.approx(said["evalLossAfter"], rel=1e-4)
