"""LoRA adapters for SDXL and Flux through the real entry point, on tiny pipelines and drawn shapes."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from .conftest import MakeTraining, Outcome, Training, merge, side_by_side

pytestmark = pytest.mark.trainer

HERE = Path(__file__).parent
STEPS, EVERY = 12, 4
PROMPT = "sks, a cyan box on a red ground"


def pictures(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """What a picture training has instead of a text training's settings."""
    settings = {
        "taskType": "Image",
        "model": {"name": f"acme/tiny-{kind}", "path": str(folder / kind), "architecture": kind},
        "data": {
            "path": str(folder / "data" / "shapes.zip"),
            "fileFormat": "zip",
            "instruct": None,
            "image": {"resolution": 64, "triggerWord": "sks"},
        },
        "train": {
            "maxSteps": STEPS,
            "evalSteps": EVERY,
            "saveSteps": EVERY,
            "saveTotalLimit": 8,
            "maxLength": 32,
            "learningRate": 0.01,
        },
        "samplePrompts": [PROMPT],
    }
    return merge(settings, changes)


@dataclass
class Runs:
    """The same training in several forms.

    Four pictures at once; two at once, asked for while it goes on; two processes of which the second has memory for
    one picture at a time; a second attempt that goes on from the first checkpoint; and one that has all of them, each
    of which is said to have had a loss that was 1 % smaller.
    """

    whole: tuple[Training, Outcome]
    tuned: tuple[Training, Outcome]
    starved: tuple[Training, Outcome]
    resumed: tuple[Training, Outcome]
    another: tuple[Training, Outcome]
    provisional: dict[str, torch.Tensor]
    """What the resumed one had to hand over in diffusers' format while it still trained."""


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def runs(request: pytest.FixtureRequest, shared_training: MakeTraining, pipelines_dir: Path) -> Runs:
    kind = request.param
    whole = shared_training(f"{kind}-whole", **pictures(pipelines_dir, kind))
    tuned = shared_training(
        f"{kind}-tuned",
        **pictures(
            pipelines_dir,
            kind,
            train={"perDeviceTrainBatchSize": 1, "gradientAccumulationSteps": 4, "gradientCheckpointing": True},
        ),
    )
    asked = tuned.folder / "tuning"
    asked.write_text('{"generation": 1, "microBatch": 3}')
    tuned.environment["TASKOFFER_TUNING_PATH"] = str(asked)
    first = side_by_side(whole, tuned)
    starved = shared_training(
        f"{kind}-starved", **pictures(pipelines_dir, kind, gpus=2, train={"perDeviceTrainBatchSize": 2})
    )
    path = os.pathsep.join([str(HERE / "little_memory"), os.environ.get("PYTHONPATH", "")])
    starved.environment.update(TEST_ROWS_THAT_FIT="1:1", TEST_HELD_OUT_ROWS_THAT_FIT="0:1", PYTHONPATH=path)
    resumed = shared_training(f"{kind}-resumed", **pictures(pipelines_dir, kind, attempt=2)).anew()
    shutil.copytree(whole.checkpoints, resumed.checkpoints)
    (resumed.checkpoints / "FINISHED.json").unlink()
    for later in range(2 * EVERY, STEPS + 1, EVERY):
        shutil.rmtree(resumed.checkpoints / f"checkpoint-{later}")
    another = shared_training(f"{kind}-another", **pictures(pipelines_dir, kind, attempt=2))
    shutil.copytree(whole.checkpoints, another.checkpoints)
    (another.checkpoints / "FINISHED.json").unlink()
    for path in another.checkpoints.glob("checkpoint-*/COMPLETE"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "eval_loss": 0.99 * record["eval_loss"]}))
    resumed.start()
    starved.start()
    pattern = "provisional/step-*/pytorch_lora_weights.safetensors"
    (exported,) = resumed.wait_for(lambda: list(resumed.output.glob(pattern)))
    provisional = load_file(exported)
    second = starved.finish(), resumed.finish()
    (third,) = side_by_side(another)
    return Runs(
        (whole, first[0]),
        (tuned, first[1]),
        (starved, second[0]),
        (resumed, second[1]),
        (another, third),
        provisional,
    )


def losses(training: Training) -> list[float]:
    """The loss of every step and of every evaluation."""
    state = json.loads((training.checkpoints / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    found = [entry.get("loss", entry.get("eval_loss")) for entry in state["log_history"]]
    return [loss for loss in found if loss is not None]


def test_learning_lowers_the_held_out_loss(runs: Runs) -> None:
    _, outcome = runs.whole
    assert outcome.code == 0, outcome.log
    assert outcome.termination["step"] == STEPS
    assert outcome.termination["evalLossAfter"] < 0.98 * outcome.termination["evalLossBefore"]


def test_how_a_step_is_cut_changes_nothing_that_is_learned(runs: Runs) -> None:
    training, outcome = runs.tuned
    assert outcome.code == 0, outcome.log
    # Four pictures in pieces of at most three are two pieces of two.
    assert "tuning: generation 1 from step 1 on: 3 row(s) at once" in outcome.log
    assert losses(training) == pytest.approx(losses(runs.whole[0]), abs=1e-5)


def test_two_processes_learn_what_one_learns_also_when_one_of_them_runs_out_of_memory(runs: Runs) -> None:
    training, outcome = runs.starved
    assert outcome.code == 0, outcome.log
    assert "the step is repeated with 1 row(s) at once instead of 2" in outcome.log
    assert losses(training) == pytest.approx(losses(runs.whole[0]), abs=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_bits(runs: Runs) -> None:
    training, outcome = runs.resumed
    assert outcome.code == 0, outcome.log
    assert outcome.termination["resumedFromStep"] == EVERY
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "before-1.png", "after-1.png"):
        assert (training.adapter / name).read_bytes() == (runs.whole[0].adapter / name).read_bytes()


def test_an_adapter_whose_loss_is_one_percent_off_after_loading_is_refused(runs: Runs) -> None:
    training, outcome = runs.another
    assert outcome.code == 74, outcome.log
    assert "in training with the same noise, off by" in outcome.termination["message"]
    assert not training.adapter.exists()


def test_the_adapter_changes_the_picture_and_both_are_kept(runs: Runs) -> None:
    training, _ = runs.whole
    with Image.open(training.adapter / "before-1.png") as before, Image.open(training.adapter / "after-1.png") as after:
        assert before.size == after.size == (64, 64)
        assert ImageChops.difference(before, after).getbbox() is not None
    manifest = json.loads((training.adapter / "manifest.json").read_text())
    assert manifest["sampleAnswers"] == [{"prompt": PROMPT, "before": "before-1.png", "after": "after-1.png"}]
    assert {"before-1.png", "after-1.png", "pytorch_lora_weights.safetensors"} <= set(manifest["files"])
    assert "diffusers" in manifest["versions"]
    card = (training.adapter / "README.md").read_text()
    for line in ("library_name: diffusers", 'instance_prompt: "sks"', "![before-1.png](before-1.png)"):
        assert line in card


def test_the_exported_file_needs_no_scale_and_names_every_layer(runs: Runs) -> None:
    training, _ = runs.whole
    own = load_file(training.adapter / "adapter_model.safetensors")
    exported = load_file(training.adapter / "pytorch_lora_weights.safetensors")
    assert len(own) == len(exported)
    scale = training.config["lora"]["loraAlpha"] / training.config["lora"]["r"]
    prefix = "unet." if "unet" in next(iter(exported)) else "transformer."
    for name, tensor in own.items():
        factor = scale if ".lora_B." in name else 1.0
        assert torch.equal(exported[prefix + name.removeprefix("base_model.model.")], factor * tensor)


def test_what_a_kill_would_leave_is_the_checkpoint_in_the_format_of_the_result(runs: Runs) -> None:
    training, _ = runs.whole
    own = load_file(training.checkpoints / f"checkpoint-{EVERY}" / "adapter_model.safetensors")
    scale = training.config["lora"]["loraAlpha"] / training.config["lora"]["r"]
    assert set(runs.provisional) == set(load_file(training.adapter / "pytorch_lora_weights.safetensors"))
    prefix = "unet." if "unet" in next(iter(runs.provisional)) else "transformer."
    for name, tensor in own.items():
        factor = scale if ".lora_B." in name else 1.0
        assert torch.equal(runs.provisional[prefix + name.removeprefix("base_model.model.")], factor * tensor)


def test_a_training_needs_a_pipeline_of_its_architecture(training: MakeTraining, pipelines_dir: Path) -> None:
    wrong = training("wrong", **pictures(pipelines_dir, "sdxl", model={"path": str(pipelines_dir / "flux")}))
    none = training("none", **pictures(pipelines_dir, "sdxl", model={"architecture": None}))
    for outcome, word in zip(
        side_by_side(wrong, none), ("set model.architecture to flux", "sdxl or flux"), strict=True
    ):
        assert outcome.code == 64
        assert word in outcome.termination["message"]
