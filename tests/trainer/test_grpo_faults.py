"""Rewards that fail now and then, that are never the same, and that teach nothing: what a run makes of them."""

from __future__ import annotations

import json
import platform
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from taskoffer_trainer.seccomp import ARCHITECTURES

from .conftest import MakeTraining, Outcome, Training, side_by_side

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.skipif(
        platform.machine() not in ARCHITECTURES,
        reason=f"THE SANDBOX HAS NO LIST OF SYSTEM CALLS FOR {platform.machine()}",
    ),
]

FAILS_AT = """
calls = 0
def reward(completions, **_):
    global calls
    calls += 1
    if calls in {calls}:
        raise ValueError("a passing fault")
    return [len(text) / 100 for text in completions]
"""
# The calls: 1 to try it out, 2 for the base model, 3 and 4 in steps, 5 in an evaluation, 6 and 7 in steps, 8 in an
# evaluation, 9 in that of the average where there is one, or in the verification. A call that is repeated moves those
# that follow.
REWARDS = {
    "random": "import random\ndef reward(completions, **_):\n    return [random.random() for _ in completions]\n",
    "fails once": FAILS_AT.replace("{calls}", "(2, 6)"),
    "fails twice": FAILS_AT.replace("{calls}", "(5, 6)"),
    "fails at last": FAILS_AT.replace("{calls}", "range(8, 99)"),
    "all alike": "def reward(completions, **_):\n    return [0.5 for _ in completions]\n",
}
STEPS = 4


def settings(source: str, **train: Any) -> dict[str, Any]:
    columns = {"fieldPrompt": "instruction", "rewardFunctions": [{"name": "mine", "source": source}]}
    drawn = {"numGenerations": 4, "maxCompletionLength": 12}
    fixed = {"maxSteps": STEPS, "evalSteps": 2, "saveSteps": 2, "lrSchedulerType": "constant", "grpo": drawn}
    data = {"instruct": None, "evalRowsMax": 2, "grpo": columns}
    return {"taskType": "GRPO", "data": data, "train": {**fixed, **train}}


Runs = dict[str, tuple[Training, Outcome]]


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining) -> Runs:
    made = {name: shared_training(name.replace(" ", "-"), **settings(source)) for name, source in REWARDS.items()}
    made["fails at last"].config["train"] |= {"emaDecay": 0.9}
    # Long enough for the early checkpoint, which there is not.
    made["all alike"].config["train"] |= {"maxSteps": 7, "evalSteps": 7, "saveSteps": 7}
    return dict(zip(made, zip(made.values(), side_by_side(*made.values()), strict=True), strict=True))


def record_of(training: Training, step: int) -> dict[str, Any]:
    value = json.loads((training.checkpoints / f"checkpoint-{step}" / "COMPLETE").read_text())
    assert isinstance(value, dict)
    return value


def test_a_reward_that_is_never_the_same_does_not_cost_the_adapter(runs: Runs) -> None:
    training, outcome = runs["random"]
    assert (outcome.code, outcome.termination["reason"]) == (0, "Completed"), outcome.log
    assert (training.adapter / "adapter_model.safetensors").is_file()
    manifest = json.loads((training.adapter / "manifest.json").read_text())
    best = min(record_of(training, step)["eval_loss"] for step in (2, 4))
    after = manifest["figuresAfter"]
    assert after["eval_loss"] != best
    # That of the training is told beside it.
    assert -manifest["rewards"]["rewardInTraining"] + 0.04 * after["kl"] == pytest.approx(best, abs=1e-3)


def test_an_adapter_of_which_a_part_is_lost_is_found_by_what_it_said(runs: Runs, shared_training: MakeTraining) -> None:
    source, _ = runs["random"]
    training = shared_training("another", **settings(REWARDS["random"]))
    shutil.copytree(source.checkpoints, training.checkpoints, ignore=shutil.ignore_patterns("FINISHED.json"))
    for folder in training.checkpoints.glob("checkpoint-*"):
        kept, marker = folder / "completions.json", folder / "COMPLETE"
        said = json.loads(kept.read_text())
        kept.write_text(json.dumps({**said, "logProb": said["logProb"] - 1}))
        record = json.loads(marker.read_text())
        record["files"][kept.name] = [kept.stat().st_size, sha256(kept.read_bytes()).hexdigest()]
        marker.write_text(json.dumps(record))
    outcome = training.run()
    assert (outcome.code, outcome.termination["reason"]) == (74, "VerifyFailed"), outcome.log
    assert "the mean log-probability of 4 completions is" in outcome.termination["message"]
    assert {path.name for path in training.output.iterdir()} == {"report.json", "report.md", "log.txt"}


def test_a_call_that_fails_in_an_evaluation_is_made_once_more(runs: Runs) -> None:
    training, outcome = runs["fails once"]
    assert outcome.code == 0, outcome.log
    assert outcome.log.count("a call of mine failed (1 in a row)") == 2
    assert all(record_of(training, step)["eval_loss"] is not None for step in (2, 4))


def test_an_evaluation_that_fails_is_none_and_no_checkpoint_is_the_best_by_it(runs: Runs) -> None:
    training, outcome = runs["fails twice"]
    assert outcome.code == 0, outcome.log
    assert "a call of mine failed (2 in a row)" in outcome.log
    assert "mine gave no value, so this evaluation counts as not made" in outcome.log
    assert [record_of(training, step)["eval_loss"] is None for step in (2, 4)] == [True, False]
    assert outcome.termination["message"].startswith("adapter of step 4 verified")


def test_rewards_that_fail_from_the_last_evaluation_on_do_not_cost_the_adapter(runs: Runs) -> None:
    """Neither there, nor when the average of the weights is measured, nor in the verification."""
    training, outcome = runs["fails at last"]
    assert outcome.code == 0, outcome.log
    assert "a call of mine failed (6 in a row)" in outcome.log
    assert "averaged inf; exported: the weights of step 2" in outcome.log
    assert "the rewards fail in the verification; reported is what they gave in training" in outcome.log
    assert record_of(training, 4)["eval_loss"] is None
    assert outcome.termination["evalLossAfter"] == pytest.approx(record_of(training, 2)["eval_loss"])


def test_rewards_that_are_all_alike_teach_nothing_and_nothing_is_handed_over(runs: Runs) -> None:
    training, outcome = runs["all alike"]
    assert (outcome.code, outcome.termination["reason"]) == (74, "NothingLearned"), outcome.log
    said = outcome.termination["message"]
    assert said.startswith("after 7 of 7 steps, at a peak learning rate of 0.002, ")
    assert "of the 14 pairs of the adapter is still zero, so that it changes nothing" in said
    assert "give rewards that tell them apart (data.grpo.rewardFunctions)" in said
    assert said.endswith("the mean reward of the last step was 0.5")
    weights = load_file(training.checkpoints / "checkpoint-7" / "adapter_model.safetensors")
    assert not any(value.any() for name, value in weights.items() if ".lora_B." in name)
    assert {path.name for path in training.output.iterdir()} == {"report.json", "report.md", "log.txt"}
    assert [path.name for path in Path(training.checkpoints).glob("checkpoint-*")] == ["checkpoint-7"]
