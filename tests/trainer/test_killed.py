"""A training that is killed without warning leaves its best adapter, and the next attempt goes on to a verified one.

``TASKOFFER_TRAINER_KILLS`` sets how often the whole training is killed, at a step that is drawn each time (1).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

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
    run = attempt(training, KILLS + 1).start()
    run.wait_for_step(drawn.randrange(STEPS // 4, STEPS // 2))
    for rank in run.children():
        os.kill(rank, signal.SIGKILL)
    rank_killed = run.finish()
    report = json.loads((training.output / "report.json").read_text())
    assert_whole(provisional(training)[-1])
    return Killed(training, rank_killed, report, attempt(training, KILLS + 2).run(), first_report)


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
