"""A model that is shared out over its processes learns what one that is copied into them learns.

This is the real thing on CPUs: FSDP2 of torch over gloo, with nothing forced.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import MakeTraining, Outcome, Training, merge, side_by_side
from .preloaded import Preloader

pytestmark = pytest.mark.trainer

HERE = Path(__file__).parent
ROWS, STEPS = 161, 21
"""Twenty steps of eight rows and one of a single row, in which the second process has none."""
ALONE: dict[str, Any] = {
    "train": {
        "maxSteps": -1,
        "numTrainEpochs": ROWS / 189,
        "perDeviceTrainBatchSize": 4,
        "gradientAccumulationSteps": 2,
        "evalSteps": 10,
        "saveSteps": 10,
        "saveTotalLimit": 3,
        "gradientCheckpointing": True,
    }
}
SHARED: dict[str, Any] = merge(ALONE, {"gpus": 2, "train": {"gradientAccumulationSteps": 1, "fsdp": True}})
ROUNDING = 2e-4
"""Single precision adds up in another order."""


FIGURES = ("loss", "grad_norm", "eval_loss")


def state_of(training: Training, step: int) -> list[dict[str, float]]:
    """What a run has said of its steps and evaluations, without times."""
    state = json.loads((training.checkpoints / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in state["log_history"]]


def losses_of(training: Training) -> list[float]:
    return [entry["loss"] for entry in state_of(training, STEPS) if "loss" in entry]


def weights(training: Training) -> bytes:
    return (training.checkpoints / f"checkpoint-{STEPS}" / "adapter_model.safetensors").read_bytes()


def resumed(make: MakeTraining, name: str, before: Training, settings: dict[str, Any]) -> Training:
    """A new attempt with what a former one left after its tenth step."""
    training = make(name, **settings, attempt=2)
    shutil.copytree(before.checkpoints, training.checkpoints)
    (training.checkpoints / "FINISHED.json").unlink()
    for step in (20, STEPS):
        shutil.rmtree(training.checkpoints / f"checkpoint-{step}")
    return training


@dataclass
class Runs:
    """Runs with the same rows: of one process, and shared out over two, the second of which has little memory."""

    alone: Training
    failed: Outcome
    shared: Training
    outcome: Outcome


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining) -> Runs:
    alone, shared = shared_training("alone", **ALONE), shared_training("shared", **SHARED)
    shared.environment.update(
        TEST_ROWS_THAT_FIT="1:2", PYTHONPATH=f"{HERE / 'little_memory'}:{os.environ.get('PYTHONPATH', '')}"
    )
    one, failed = side_by_side(alone, shared)
    assert one.code == 0, one.log
    outcome = shared.run()
    assert outcome.code == 0, outcome.log
    return Runs(alone, failed, shared, outcome)


def test_the_losses_are_those_of_one_process(runs: Runs) -> None:
    losses = losses_of(runs.shared)
    assert len(losses) == STEPS
    assert losses == pytest.approx(losses_of(runs.alone), rel=ROUNDING)
    assert "model: shared out over 2 processes, 0.4 of 0.9 MB on this one" in runs.outcome.log


def test_the_base_model_and_the_result_are_measured_as_in_one_process(runs: Runs) -> None:
    alone = json.loads((runs.alone.adapter / "manifest.json").read_text())
    shared = json.loads((runs.shared.adapter / "manifest.json").read_text())
    for figure in ("evalLossBefore", "evalLossAfter"):
        assert shared[figure] == pytest.approx(alone[figure], rel=ROUNDING)
    assert shared["evalLossAfter"] < shared["evalLossBefore"]
    assert shared["sampleAnswers"][0]["before"] == alone["sampleAnswers"][0]["before"]


def test_out_of_memory_ends_the_attempt_and_the_next_one_takes_fewer_rows_at_once(runs: Runs) -> None:
    assert (runs.failed.code, runs.failed.termination["reason"]) == (138, "TooManyRowsAtOnce"), runs.failed.log
    said = "4 row(s) at once do not fit into memory, the next attempt takes 2"
    assert runs.failed.termination["message"] == said
    kept = json.loads((runs.shared.checkpoints / f"checkpoint-{STEPS}" / "steps.json").read_text())
    assert (kept["fits"], kept["out_of_memory"], kept["samples"]) == (2, 1, ROWS)


def test_a_checkpoint_is_the_one_of_a_run_with_copies(runs: Runs) -> None:
    folders = [one.checkpoints / f"checkpoint-{STEPS}" for one in (runs.alone, runs.shared)]
    alone, shared = ({path.name for path in folder.iterdir()} for folder in folders)
    assert alone - shared == {"rng_state.pth"}
    assert shared - alone == {"rng_state_0.pth", "rng_state_1.pth"}
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        sizes = [(folder / name).stat().st_size for folder in folders]
        assert sizes[0] == sizes[1] > 10_000


def test_a_resumed_run_is_bit_equal_and_one_process_can_go_on_as_well(
    runs: Runs, shared_training: MakeTraining
) -> None:
    again = resumed(shared_training, "again", runs.shared, SHARED).anew()
    fewer = resumed(shared_training, "fewer", runs.shared, ALONE)
    outcomes = side_by_side(again, fewer)
    assert [one.code for one in outcomes] == [0, 0], outcomes
    assert [one.termination["resumedFromStep"] for one in outcomes] == [10, 10]
    assert weights(again) == weights(runs.shared)
    assert losses_of(fewer) == pytest.approx(losses_of(runs.alone), rel=ROUNDING)


def test_what_a_run_with_copies_left_is_gone_on_from_and_tuned_meanwhile(
    runs: Runs, shared_training: MakeTraining
) -> None:
    training = resumed(shared_training, "tuned", runs.alone, SHARED)
    file = training.folder / "tuning"
    file.write_text('{"generation": 1, "microBatch": 3}')
    training.environment["TASKOFFER_TUNING_PATH"] = str(file)
    outcome = training.run()
    assert outcome.code == 0, outcome.log
    assert outcome.termination["resumedFromStep"] == 10
    assert "tuning: generation 1 from step 11 on: 3 row(s) at once" in outcome.log
    assert losses_of(training) == pytest.approx(losses_of(runs.alone), rel=ROUNDING)


PAIRS = {"fieldPrompt": "instruction", "fieldChosen": "output", "fieldRejected": "input"}
REWARDS = {
    "fieldPrompt": "instruction",
    "rewardFunctions": [{"name": "three", "builtin": {"name": "LengthTarget", "words": 3}}],
}
METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DPO", {"dpo": PAIRS}, {}),
    # Completions end at different tokens, so that one process has to go on drawing for the other's.
    ("GRPO", {"grpo": REWARDS}, {"grpo": {"numGenerations": 2, "numGenerationsEval": 2, "maxCompletionLength": 16}}),
]


@pytest.mark.parametrize(("task", "data", "train"), METHODS, ids=[row[0] for row in METHODS])
def test_every_method_of_text_learns_what_it_learns_in_one_process(
    task: str, data: dict[str, Any], train: dict[str, Any], training: MakeTraining
) -> None:
    short = {"maxSteps": 3, "numTrainEpochs": 1, "evalSteps": 3, "saveSteps": 3, **train}
    changes = {"taskType": task, "data": {"instruct": None, "evalRowsMax": 5, **data}, "train": short}
    pair = [training(name, **merge(base, changes)) for name, base in (("alone", ALONE), ("shared", SHARED))]
    outcomes = side_by_side(*pair)
    assert [one.code for one in outcomes] == [0, 0], outcomes
    alone, shared = (state_of(one, 3) for one in pair)
    assert len(alone) == len(shared) > 3
    for one, other in zip(alone, shared, strict=True):
        assert other == pytest.approx(one, rel=ROUNDING, abs=1e-6)


def test_every_process_has_as_many_pieces_as_the_one_that_needs_the_most() -> None:
    from taskoffer_trainer.tuning import MicroBatch

    assert [len(piece) for piece in MicroBatch(2).cuts(4)] == [2, 2]
    assert [len(piece) for piece in MicroBatch(2).cuts(4, least=3)] == [1, 1, 2]
    assert [len(piece) for piece in MicroBatch(1).cuts(2, least=3)] == [1, 1]  # There are no more rows.
    assert [len(piece) for piece in MicroBatch(4, unit=2).cuts(4, least=2)] == [2, 2]


def test_a_process_has_as_many_held_out_batches_as_the_others_and_none_counts_twice() -> None:
    from taskoffer_trainer.held_out import turns

    for count, world in ((1, 2), (5, 4), (8, 4), (3, 2)):
        shares = [turns([[number] for number in range(count)], rank, world, True) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-count // world)}
        counted = [batch[0] for share in shares for batch, weight in share if weight]
        assert sorted(counted) == list(range(count))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 1}, "train.fsdp: there is nobody to share the parameters with; set gpus to 2 or more"),
        ({"gpus": 2, "taskType": "Image"}, "train.fsdp: a model of pictures is not shared out"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    base_config: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskoffer_trainer import config as module
    from taskoffer_trainer.failures import TrainerError

    monkeypatch.setattr(module, "_check_task", lambda _: None)
    path = tmp_path / "run.json"
    settings = {"outputDir": str(tmp_path), "checkpointDir": str(tmp_path), "train": {"fsdp": True}, **changes}
    path.write_text(json.dumps(merge(base_config, settings)))
    with pytest.raises(TrainerError) as caught:
        module.load_config(path)
    assert caught.value.message.startswith(said)


GRADIENTS = """
import os, sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DeepseekV3Config
from taskoffer.api.contract import RunConfig
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.models import Device, load_model
from taskoffer_trainer.sharding import gathered, share_out
from taskoffer_trainer.world import World

rank, folder = int(os.environ["RANK"]), sys.argv[1]
config = RunConfig.model_validate({
    "jobName": "j", "taskID": "t", "taskType": "InstructText", "gpus": 2, "model": {"name": "a/b", "path": folder},
    "data": {"path": "/data"}, "lora": {"r": 8, "loraAlpha": 16}, "train": {"fsdp": True},
    "outputDir": "/out", "checkpointDir": "/checkpoints",
})
if rank == 0:
    AutoModelForCausalLM.from_config(DeepseekV3Config(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, n_shared_experts=1,
    )).save_pretrained(folder)
dist.init_process_group("gloo")
world = World()
device = Device(False, torch.bfloat16, "bfloat16")


def model(rank):
    torch.manual_seed(1)
    base = load_model(config, device, rank)
    found = get_peft_model(base, lora_config(base, config.lora)[0])
    for name, parameter in found.named_parameters():
        if "lora_B" in name and not parameter.is_meta:
            torch.nn.init.normal_(parameter, std=0.05)
    return found.eval()


def learn(model, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=rows, labels=rows).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


world.wait()
whole, shared = model(0), model(rank)
empty = sum(one.is_meta for one in shared.parameters()) / len(list(shared.parameters()))
share_out(shared, world, torch.device("cpu"))
rows = torch.arange(24).view(2, 12) + 5
with shared.disable_adapter(), torch.no_grad():
    shared(input_ids=rows[:1])
parts = gathered(learn(shared, rows[rank : rank + 1]))
kinds = sorted({str(one.dtype) for one in shared.base_model.model.model.parameters()})
for row in rows.split(1):
    wanted = learn(whole, row)
same = all(torch.allclose(part * 2, wanted[name], rtol=1e-5, atol=1e-7) for name, part in parts.items())
print("said", rank, empty, len(parts), same, *kinds, flush=True)
dist.barrier()
os._exit(0)
"""


def test_only_the_first_process_reads_weights_and_mixed_types_have_the_same_gradients(
    tmp_path: Path, libraries: Preloader
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
    }
    command = ["-c", GRADIENTS, str(tmp_path)]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda rank: libraries.run(command, {**common, "RANK": rank}), ("0", "1")))
    assert [end.returncode for end in ends] == [0, 0], ends
    said = [next(line.split() for line in end.stdout.splitlines() if line.startswith("said")) for end in ends]
    assert said[0] == ["said", "0", "0.0", "26", "True", "torch.bfloat16", "torch.float32"]
    assert said[1] == ["said", "1", "1.0", "0", "True", "torch.bfloat16", "torch.float32"]
