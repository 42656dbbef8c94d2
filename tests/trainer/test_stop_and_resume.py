"""A stopped run goes on exactly where it stopped, and never from a checkpoint that cannot be trusted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from .conftest import RUN_SECONDS, MakeTraining, Outcome, Training, side_by_side
from .preloaded import Preloader

pytestmark = pytest.mark.trainer

# Two epochs and a bit, with what makes an exact resume hard: dropout, accumulation, shuffling in every epoch.
STEPS = 50
STOP_AT = 26
SETTINGS: dict[str, Any] = {
    "lora": {"loraDropout": 0.1},
    "train": {
        "maxSteps": STEPS,
        "perDeviceTrainBatchSize": 4,
        "gradientAccumulationSteps": 2,
        "evalSteps": 10,
        "saveSteps": 10,
        "groupByLength": True,
    },
}


@dataclass
class Stopped:
    """A run that was stopped in its second epoch, and the same run without a stop."""

    whole: Training
    whole_outcome: Outcome
    stopped: Training
    outcome: Outcome
    report: dict[str, Any]
    metrics: str

    def resumed(self, make: MakeTraining, name: str) -> Training:
        """A new attempt with a copy of what the stopped one left."""
        training = make(name, **self.stopped.config, attempt=2)
        place = {"outputDir": str(training.folder / "out"), "checkpointDir": str(training.folder / "checkpoints")}
        training.config.update(place)
        shutil.copytree(self.stopped.checkpoints, training.checkpoints)
        return training


def stop_and_compare(make: MakeTraining, processes: int) -> Stopped:
    settings = {**SETTINGS, "gpus": processes}
    settings["train"] = {**SETTINGS["train"], "gradientAccumulationSteps": 2 // processes}
    whole = make(f"whole-{processes}", **settings).start()
    if processes > 1:
        whole.finish()
    stopped = make(f"stopped-{processes}", **settings).start()
    report = stopped.wait_for_step(STOP_AT)
    metrics = stopped.get("/metrics")
    stopped.signal(signal.SIGTERM)
    outcome, whole_outcome = stopped.finish(), whole.finish()
    assert whole_outcome.code == 0, whole_outcome.log
    return Stopped(whole, whole_outcome, stopped, outcome, report, metrics)


@pytest.fixture(scope="module")
def alone(shared_training: MakeTraining) -> Stopped:
    return stop_and_compare(shared_training, 1)


def weights(training: Training) -> bytes:
    return (training.adapter / "adapter_model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_sigterm_leaves_a_complete_checkpoint_and_exit_code_143(alone: Stopped) -> None:
    assert alone.outcome.code == 143, alone.outcome.log
    termination = alone.outcome.termination
    assert (termination["exitCode"], termination["reason"]) == (143, "Stopped")
    assert STOP_AT <= termination["step"] < STEPS
    newest = alone.stopped.checkpoints / f"checkpoint-{termination['step']}"
    record = json.loads((newest / "COMPLETE").read_text())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(record["files"])
    assert not alone.stopped.adapter.exists()


def test_the_termination_of_a_stopped_run_says_what_was_learned_from_and_what_is_kept(alone: Stopped) -> None:
    termination, train = alone.outcome.termination, alone.stopped.config["train"]
    rows = train["perDeviceTrainBatchSize"] * train["gradientAccumulationSteps"]
    assert termination["samples"] == termination["step"] * rows
    assert termination["checkpoint"] == f"checkpoint-{termination['step']}"
    records = [json.loads(path.read_text()) for path in alone.stopped.checkpoints.glob("checkpoint-*/COMPLETE")]
    losses = [record["eval_loss"] for record in records if record["eval_loss"] is not None]
    assert termination["bestEvalLoss"] == min(losses)
    assert "checkpoint" not in alone.whole_outcome.termination


@dataclass
class Resumed:
    """Two attempts to go on: from what the stopped run left, and from the same with damage done to it."""

    plain: tuple[Training, Outcome]
    damaged: tuple[Training, Outcome]
    newest: int
    older: int


@pytest.fixture(scope="module")
def resumed(alone: Stopped, shared_training: MakeTraining) -> Resumed:
    # A new process has another order of sets and other numbers that nobody seeded, as after a stop in a pod.
    plain, damaged = alone.resumed(shared_training, "resumed").anew(), alone.resumed(shared_training, "damaged")
    *_, older, newest = steps_of(damaged.checkpoints)
    optimizer = damaged.checkpoints / f"checkpoint-{newest}" / "optimizer.pt"
    data = bytearray(optimizer.read_bytes())
    data[len(data) // 2] ^= 0xFF
    optimizer.write_bytes(data)
    unfinished = damaged.checkpoints / f"checkpoint-{STEPS - 1}"
    shutil.copytree(damaged.checkpoints / f"checkpoint-{older}", unfinished)
    (unfinished / "COMPLETE").unlink()
    outcomes = side_by_side(plain, damaged)
    return Resumed((plain, outcomes[0]), (damaged, outcomes[1]), newest, older)


def test_a_stopped_run_resumes_to_bit_equal_weights(alone: Stopped, resumed: Resumed) -> None:
    training, outcome = resumed.plain
    assert outcome.code == 0, outcome.log
    assert outcome.termination["resumedFromStep"] == alone.outcome.termination["step"]
    assert weights(training) == weights(alone.whole)
    for figure in ("evalLossBefore", "evalLossAfter", "trainLoss", "step"):
        assert outcome.termination[figure] == alone.whole_outcome.termination[figure]


def test_damaged_and_unfinished_checkpoints_are_skipped_and_removed(alone: Stopped, resumed: Resumed) -> None:
    training, outcome = resumed.damaged
    assert outcome.code == 0, outcome.log
    left_out = "is left out and removed"
    assert f"checkpoint-{resumed.newest} {left_out}: the content of optimizer.pt has changed" in outcome.log
    assert f"checkpoint-{STEPS - 1} {left_out}: it was not finished" in outcome.log
    assert outcome.termination["resumedFromStep"] == resumed.older
    assert weights(training) == weights(alone.whole)


def test_no_more_checkpoints_are_kept_than_asked_for_beside_the_best(alone: Stopped) -> None:
    complete = alone.whole.checkpoints.glob("checkpoint-*/COMPLETE")
    losses = {json.loads(path.read_text())["step"]: json.loads(path.read_text())["eval_loss"] for path in complete}
    assert set(losses) >= {STEPS - 10, STEPS}
    assert len(losses) <= 3
    assert alone.whole_outcome.termination["evalLossAfter"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_the_progress_report_tells_step_percentage_time_and_loss(alone: Stopped) -> None:
    report = alone.report
    assert report["state"] == "Training"
    assert report["totalSteps"] == STEPS
    assert report["progressPercentage"] == 100 * report["step"] // STEPS
    assert 0 < report["estimatedRemainingSeconds"] < RUN_SECONDS
    values = {metric["name"]: float(metric["value"]) for metric in report["metrics"]}
    assert {"loss", "eval_loss", "learning_rate", "tokens_per_second"} <= set(values)
    assert 0 < values["loss"] < 20
    assert values["tokens_per_second"] > 0


def test_a_running_training_serves_what_is_known_of_it_as_metrics(alone: Stopped) -> None:
    families = {family.name: family for family in text_string_to_metric_families(alone.metrics)}
    samples = {one.name: one.value for family in families.values() for one in family.samples if not one.labels}
    values = {name.removeprefix("taskoffer_trainer_"): value for name, value in samples.items()}
    assert values["total_steps"] == STEPS
    states = {one.labels["state"] for one in families["taskoffer_trainer_state"].samples if one.value == 1}
    assert states in ({"Training"}, {"Evaluating"})
    assert round(STOP_AT / STEPS, 6) <= values["progress_ratio"] < 1
    assert values["loss"] > 0
    # Eight rows in each step; the report is a little older than the file with the step times, or younger.
    assert values["samples_total"] >= 8 * (STOP_AT - 1)
    assert values["tokens_total"] > values["samples_total"]
    assert 1 <= values["step_seconds_count"] <= STEPS
    assert 0 < values["step_seconds_sum"] < RUN_SECONDS
    assert 0 <= values["checkpoint_age_seconds"] < RUN_SECONDS
    assert (values["micro_batch"], values["duty_cycle"], values["tuning_generation"]) == (4, 1, 0)
    assert (values["out_of_memory_total"], values["skipped_steps_total"]) == (0, 0)
    assert "seconds_to_deadline" not in values
    assert ("taskoffer_trainer_gpu_reserved_bytes" in families) is torch.cuda.is_available()


def test_checkpoints_of_another_run_are_refused_with_what_differs(alone: Stopped, training: MakeTraining) -> None:
    other = alone.resumed(training, "other")
    other.config["lora"] = {**other.config["lora"], "r": 4}
    outcome = other.run()
    assert (outcome.code, outcome.termination["reason"]) == (64, "CheckpointsOfAnotherRun")
    assert "lora.r (8 then, 4 now)" in outcome.termination["message"]


def test_two_processes_stop_together_and_resume_to_equal_weights(training: MakeTraining) -> None:
    pair = stop_and_compare(training, 2)
    assert pair.outcome.code == 143, pair.outcome.log
    again = pair.resumed(training, "resumed")
    outcome = again.run()
    assert outcome.code == 0, outcome.log
    assert outcome.termination["resumedFromStep"] == pair.outcome.termination["step"]
    assert weights(again) == weights(pair.whole)


PARTING = """
import gc, os, weakref
import torch
import torch.distributed as dist
from taskoffer_trainer.world import World

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = World()
world.total(1.0)
groups = [weakref.ref(dist.group.WORLD), weakref.ref(world._numbers)]
world.part()
del world
gc.collect()
print("parted" if not dist.is_initialized() else "still there", *(group() is not None for group in groups), flush=True)
os._exit(0)
"""


def test_a_process_group_that_was_left_is_never_freed_for_its_threads_may_want_what_freeing_holds(
    libraries: Preloader,
) -> None:
    said = libraries.run(["-c", PARTING], {**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    assert (said.returncode, said.stdout.split()) == (0, ["parted", "True", "True"])


def test_a_signal_before_the_training_begins_ends_with_143(training: MakeTraining) -> None:
    run = training().anew().start()
    run.wait_for(run.children)
    assert run.progress()["state"] == "Starting"
    assert run.get("/healthz") == "ok\n"
    run.signal(signal.SIGTERM)
    outcome = run.finish()
    assert (outcome.code, outcome.termination["reason"]) == (143, "Stopped")
