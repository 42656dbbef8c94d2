"""Each of GRPO's losses is exact: how a step is cut changes nothing but rounding. All runs share one process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import merge
from .preloaded import Preloader
from .probing import tiny_mixture
from .test_grpo import SETTINGS

pytestmark = pytest.mark.trainer

SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from taskoffer.api.contract import RunConfig
from taskoffer_trainer.rank import run
from taskoffer_trainer.stop import Stop

base, cases, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])

def weights(name, case, per_device):
    place = folder / f"{name}-{per_device}"
    place.mkdir()
    case = dict(case)
    model = {**base["model"], **case.pop("model", {})}
    train = {**base["train"], **case, "perDeviceTrainBatchSize": per_device,
             "gradientAccumulationSteps": 16 // per_device}
    grpo = {**base["train"]["grpo"], **case.get("grpo", {})}
    config = {**base, "model": model, "train": {**train, "grpo": grpo}}
    config |= {"outputDir": f"{place}/out", "checkpointDir": f"{place}/ck"}
    (place / "ck").mkdir()
    end = run(RunConfig.model_validate(config), place, 0, Stop(None))
    assert end.exit_code == 0, end
    checkpoint = place / "ck" / "checkpoint-2"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return load_file(checkpoint / "adapter_model.safetensors"), losses

found = {}
for name, case in cases.items():
    (whole, losses), (pieces, others) = weights(name, case, 16), weights(name, case, 1)
    assert len(losses) == len(others) == 2
    found[name] = {"weights": max(float((whole[key] - pieces[key]).abs().max()) for key in whole),
                   "loss": max(abs(one - other) for one, other in zip(losses, others)),
                   "sum": float(sum(value.double().sum() for value in whole.values()))}
print(json.dumps(found))
"""
CASES: dict[str, dict[str, Any]] = {
    "dapo": {"grpo": {"lossType": "dapo"}},
    "grpo": {"grpo": {"lossType": "grpo"}},
    "bnpo": {"grpo": {"lossType": "bnpo"}},
    "dr_grpo, colder": {"grpo": {"lossType": "dr_grpo", "temperature": 0.7}},
    "without divergence and deviation": {"grpo": {"beta": 0.0, "scaleRewards": "none"}},
    "with gradient checkpointing": {"gradientCheckpointing": True},
}


@pytest.fixture
def model_of_few_words(base_config: dict[str, Any], tmp_path: Path) -> Path:
    """A model for which a quarter of all tokens end a completion, so that completions have unlike lengths."""
    folder = tmp_path / "model"
    shutil.copytree(base_config["model"]["path"], folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": list(range(0, 1024, 4))}))
    return folder


def test_every_loss_is_the_same_whole_and_in_pieces_of_one(
    base_config: dict[str, Any], model_of_few_words: Path, tmp_path: Path, libraries: Preloader
) -> None:
    rewards = [
        {"name": "short", "builtin": {"name": "LengthTarget", "words": 3}},
        {"name": "varied", "builtin": {"name": "VocabularyDiversity"}},
    ]
    changes = {
        "samplePrompts": None,
        "model": {"path": str(model_of_few_words)},
        "data": {"evalRowsMax": 2, "grpo": {"rewardFunctions": rewards}},
        "train": {"maxSteps": 2, "evalSteps": 2, "saveSteps": 2, "bf16": False, "grpo": {"numGenerations": 4}},
    }
    settings = merge(merge(base_config, SETTINGS), changes)
    mixture = str(tiny_mixture(model_of_few_words, tmp_path / "mixture", router_aux_loss_coef=0.5))
    shutil.copy(model_of_few_words / "generation_config.json", mixture)
    mixtures = {f"experts, {name}": {**CASES[name], "model": {"path": mixture}} for name in ("dapo", "grpo")}
    cases = {**CASES, **mixtures}
    command = ["-c", SCRIPT, json.dumps(settings), json.dumps(cases), str(tmp_path)]
    done = libraries.run(command, dict(os.environ))
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(cases)
    # Adam makes steps of the size of the learning rate, 4e-3, of whatever differs by more than rounding.
    assert {name: one for name, one in found.items() if one["weights"] > 1e-4 or one["loss"] > 1e-4} == {}
    # Over a whole step dapo and bnpo are one mean, and gradient checkpointing computes the same once more.
    sums = {name: one["sum"] for name, one in found.items()}
    assert [sums.pop("bnpo"), sums.pop("with gradient checkpointing")] == pytest.approx([sums["dapo"]] * 2, rel=1e-4)
    assert len(set(sums.values())) == len(sums)


COUNTS = """
from taskoffer_trainer.data import Split
from taskoffer_trainer.grpo import _Reinforcement

course = object.__new__(_Reinforcement)
course.split, course.train, course.held_out = Split([1, 2, 3], [4, 5], {"noText": 2}), [1, 2], [4]
assert course.counts() == {"train": 2, "held_out": 1, "noText": 2, "tooLong": 2}, course.counts()
course.split = Split([1, 2], [4])
assert course.counts() == {"train": 2, "held_out": 1}, course.counts()
print("counted")
"""


def test_prompts_that_are_left_out_are_counted_as_rows_of_other_tasks_are(libraries: Preloader) -> None:
    done = libraries.run(["-c", COUNTS], dict(os.environ))
    assert done.stdout.endswith("counted\n"), done.stdout[-3000:]
