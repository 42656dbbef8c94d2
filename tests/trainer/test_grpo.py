"""A reinforcement through the real entry point: the reward rises, however the work is cut, and rewards may fail."""

from __future__ import annotations

import json
import os
import platform
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from taskoffer_trainer.seccomp import ARCHITECTURES

from .conftest import MakeTraining, Outcome, Training, merge

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.skipif(
        platform.machine() not in ARCHITECTURES,
        reason=f"THE SANDBOX HAS NO LIST OF SYSTEM CALLS FOR {platform.machine()}",
    ),
]

HERE = Path(__file__).parent
STEPS = 12
VOWELS = (
    "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in t) / max(1, len(t)) for t in completions]\n"
)
BROKEN = """
calls = []
def reward(completions, prompts, extra_data):
    calls.append(1)
    if len(calls) > 9:
        raise RuntimeError("the reward is worn out")
    return [float(len(one)) for one in extra_data]
"""
SETTINGS: dict[str, Any] = {
    "taskType": "GRPO",
    "data": {
        "instruct": None,
        "evalRowsMax": 8,
        "grpo": {
            "fieldPrompt": "instruction",
            "extraColumn": "output",
            "rewardFunctions": [
                {"name": "vowels", "source": VOWELS, "weight": "3"},
                {"name": "brief", "builtin": {"name": "LengthTarget", "words": 1}, "weight": "0"},
            ],
        },
    },
    "train": {
        "maxSteps": STEPS,
        "perDeviceTrainBatchSize": 32,
        "learningRate": 0.004,
        "lrSchedulerType": "constant",
        "evalSteps": 6,
        "saveSteps": 6,
        "grpo": {"numGenerations": 8, "maxCompletionLength": 8, "beta": 0.005},
    },
}
"""Four prompts a step with eight completions each; no dropout, so that nothing but rounding may differ."""


def failing(source: str) -> dict[str, Any]:
    return merge(SETTINGS, {"data": {"grpo": {"rewardFunctions": [{"name": "worn", "source": source}]}}})


@dataclass
class Runs:
    """The same training whole, in pieces of another size, by two processes, and in two attempts; and one that fails."""

    whole: tuple[Training, Outcome]
    pieces: tuple[Training, Outcome]
    pair: tuple[Training, Outcome]
    stopped: Outcome
    resumed: tuple[Training, Outcome]
    broken: Outcome


def stop_and_go_on(first: Training) -> list[Outcome]:
    """Stop a training after some steps, and start it again."""
    first.start().wait_for_step(3)
    first.signal(signal.SIGTERM)
    return [first.finish(), Training(first.folder, first.config).run()]


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining) -> Runs:
    whole = shared_training("whole", **SETTINGS)
    pieces = shared_training("pieces", **SETTINGS)
    (pieces.folder / "tuning").write_text('{"generation": 1, "microBatch": 7}')
    pieces.environment["TASKOFFER_TUNING_PATH"] = str(pieces.folder / "tuning")
    pair = shared_training("pair", **merge(SETTINGS, {"gpus": 2, "train": {"perDeviceTrainBatchSize": 15}}))
    # The second rank finds room for five completions at once, which parts the groups of eight, and the first one for
    # three in an evaluation.
    path = os.pathsep.join([str(HERE / "little_memory"), *filter(None, [os.environ.get("PYTHONPATH")])])
    pair.environment.update(TEST_ROWS_THAT_FIT="1:5", TEST_HELD_OUT_ROWS_THAT_FIT="0:3", PYTHONPATH=path)
    twice = shared_training("twice", **SETTINGS)
    broken = shared_training("broken", **failing(BROKEN))
    with ThreadPoolExecutor(2) as pool:
        attempts = pool.submit(stop_and_go_on, twice)
        ends = list(pool.map(Training.run, (whole, pieces, pair, broken)))
        stopped, resumed = attempts.result()
    return Runs((whole, ends[0]), (pieces, ends[1]), (pair, ends[2]), stopped, (twice, resumed), ends[3])


def history(training: Training) -> list[dict[str, float]]:
    state = json.loads((training.checkpoints / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def manifest_of(training: Training) -> dict[str, Any]:
    value = json.loads((training.adapter / "manifest.json").read_text())
    assert isinstance(value, dict)
    return value


def test_the_reward_rises_in_training_and_on_held_out_prompts(runs: Runs) -> None:
    training, outcome = runs.whole
    assert (outcome.code, outcome.termination["reason"]) == (0, "Completed"), outcome.log
    manifest = manifest_of(training)
    before, after = manifest["figuresBefore"], manifest["figuresAfter"]
    assert after["reward"] > before["reward"] + 0.1
    assert history(training)[-1]["reward"] > history(training)[0]["reward"] + 0.1
    # Weights are scaled to a sum of 1; what has none is measured and adds nothing.
    assert after["reward"] == pytest.approx(after["reward_vowels"])
    assert after["reward_brief"] != after["reward"]


def test_the_score_is_the_reward_less_the_divergence_from_the_base(runs: Runs) -> None:
    training, outcome = runs.whole
    manifest = manifest_of(training)
    before, after = manifest["figuresBefore"], manifest["figuresAfter"]
    assert (before["kl"], before["eval_loss"]) == (pytest.approx(0.0, abs=1e-6), pytest.approx(-before["reward"]))
    assert after["kl"] > 0.1
    assert after["eval_loss"] == pytest.approx(0.005 * after["kl"] - after["reward"])
    assert outcome.termination["evalLossAfter"] == pytest.approx(after["eval_loss"])


def test_what_confines_source_text_is_said_in_the_log_and_in_the_manifest(runs: Runs) -> None:
    training, outcome = runs.whole
    rewards = manifest_of(training)["rewards"]
    assert f"reward: source text is confined: network kept away by {rewards['sandbox']['network']}" in outcome.log
    assert "seccomp" in rewards["sandbox"]["inForce"]
    vowels, brief = rewards["functions"]
    assert (vowels["name"], vowels["weight"], vowels["failedCalls"], vowels["sandboxed"]) == ("vowels", 1.0, 0, True)
    assert (brief["name"], brief["weight"], brief["sandboxed"]) == ("brief", 0.0, False)


def test_the_end_is_told_in_rewards(runs: Runs) -> None:
    assert "verified: held-out reward 0." in runs.whole[1].termination["message"]


@pytest.mark.parametrize("name", ["pieces", "pair"])
def test_neither_pieces_nor_processes_nor_lack_of_memory_change_what_is_learned(name: str, runs: Runs) -> None:
    training, outcome = getattr(runs, name)
    assert outcome.code == 0, outcome.log
    whole, other = history(runs.whole[0]), history(training)
    assert len(whole) == len(other) == STEPS
    for field in ("loss", "reward", "completion_length"):
        assert [entry[field] for entry in other] == pytest.approx([entry[field] for entry in whole], abs=1e-3), field
    assert [entry["loss"] for entry in other] != [entry["loss"] for entry in whole]


def test_a_step_has_whole_groups_and_says_so(runs: Runs) -> None:
    (clamp,) = [one for one in runs.pair[1].termination["clamps"] if one["field"] == "globalBatch"]
    assert (clamp["requested"], clamp["effective"], clamp["reason"]) == ("30", "32", "WholeGroups")


def test_the_changes_took_place(runs: Runs) -> None:
    assert "tuning: generation 1 from step 1 on: 7 row(s) at once" in runs.pieces[1].log
    assert "the step is repeated with 4 row(s) at once instead of 15" in runs.pair[1].log


def test_a_run_that_goes_on_after_a_stop_ends_with_the_same_weights(runs: Runs) -> None:
    training, outcome = runs.resumed
    assert (runs.stopped.code, runs.stopped.termination["reason"]) == (143, "Stopped"), runs.stopped.log
    assert outcome.code == 0, outcome.log
    assert 0 < outcome.termination["resumedFromStep"] < STEPS
    last = f"checkpoint-{STEPS}/adapter_model.safetensors"
    whole, again = load_file(runs.whole[0].checkpoints / last), load_file(training.checkpoints / last)
    assert whole.keys() == again.keys()
    assert all((whole[name] == again[name]).all() for name in whole)


def test_a_reward_that_fails_again_and_again_ends_the_run_with_its_name(runs: Runs) -> None:
    outcome = runs.broken
    assert (outcome.code, outcome.termination["reason"]) == (64, "RewardFailed"), outcome.log
    said = outcome.termination["message"]
    assert "worn failed 3 times in a row" in said
    assert "RuntimeError in line 6: the reward is worn out" in said
    assert "a call of worn failed (1 in a row)" in outcome.log


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "a reward of the network": (
        failing("import requests\ndef reward(completions): return []"),
        64,
        "RewardInvalid",
        "only Python's standard library is in the sandbox",
    ),
    "a reward without a function": (failing("reward = 1"), 64, "RewardInvalid", "write def reward(completions"),
    "no room for a prompt": (
        merge(SETTINGS, {"train": {"grpo": {"maxCompletionLength": 160}}}),
        64,
        "ConfigInvalid",
        "leave no room for a prompt in train.maxLength, which is 160",
    ),
    "no rewards": (merge(SETTINGS, {"data": {"grpo": None}}), 64, "ConfigInvalid", "data.grpo: a task of type GRPO"),
}


@pytest.mark.parametrize(("settings", "code", "reason", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    settings: dict[str, Any], code: int, reason: str, said: str, training: MakeTraining
) -> None:
    outcome = training(**settings).run()
    assert (outcome.code, outcome.termination["reason"]) == (code, reason), outcome.log
    assert said in outcome.termination["message"]
    assert "model:" not in outcome.log
