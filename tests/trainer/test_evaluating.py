"""An evaluation that runs out of memory goes on with fewer rows at once, and measures the same."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import MakeTraining, Outcome, Training, merge, side_by_side

pytestmark = pytest.mark.trainer

HERE = Path(__file__).parent
STEPS = 8
SETTINGS: dict[str, Any] = {
    "data": {"evalRowsMax": 9},
    "train": {"maxSteps": STEPS, "evalSteps": STEPS, "saveSteps": STEPS, "perDeviceEvalBatchSize": 4},
}
ROUNDING = 2e-4
"""Single precision adds up in another order."""


def eval_losses(training: Training) -> list[float]:
    state = json.loads((training.checkpoints / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    manifest = json.loads((training.adapter / "manifest.json").read_text())
    logged = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    return [manifest["evalLossBefore"], *logged, manifest["evalLossAfter"]]


@dataclass
class Runs:
    """Runs with the same rows: with memory enough, of two ranks of which one has too little, and shared out over both.

    The last one needs two attempts, the second with fewer rows at once than the first.
    """

    whole: tuple[Training, Outcome]
    pair: tuple[Training, Outcome]
    shared: tuple[Training, Outcome]
    failed: Outcome


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining) -> Runs:
    whole = shared_training("whole", **SETTINGS)
    halves = {"gpus": 2, "train": {"perDeviceTrainBatchSize": 2}}
    pair = shared_training("pair", **merge(SETTINGS, halves))
    few = {"train": {"fsdp": True, "perDeviceEvalBatchSize": 2}}
    shared = shared_training("shared", **merge(SETTINGS, merge(halves, few)))
    path = os.pathsep.join([str(HERE / "little_memory"), os.environ.get("PYTHONPATH", "")])
    for training in (pair, shared):
        training.environment.update(TEST_HELD_OUT_ROWS_THAT_FIT="1:1", PYTHONPATH=path)
    ends = side_by_side(whole, pair, shared)
    second = shared.run()
    assert [one.code for one in (*ends[:2], second)] == [0, 0, 0], [one.log for one in (*ends, second)]
    return Runs((whole, ends[0]), (pair, ends[1]), (shared, second), ends[2])


@pytest.mark.parametrize("name", ["pair", "shared"])
def test_what_is_measured_is_what_a_run_with_memory_enough_measures(name: str, runs: Runs) -> None:
    measured = eval_losses(getattr(runs, name)[0])
    assert len(measured) == 3
    assert measured == pytest.approx(eval_losses(runs.whole[0]), rel=ROUNDING)


def test_all_ranks_go_on_with_what_the_one_with_the_least_memory_can_do(runs: Runs) -> None:
    training, outcome = runs.pair
    # Four do not fit and two neither, once each; the rank that has memory enough says nothing.
    assert "do not fit" not in outcome.log
    kept = json.loads((training.checkpoints / "evaluation-did-not-fit-1.json").read_text())
    assert kept == {"fits": 1}
    (clamp,) = [one for one in outcome.termination["clamps"] if one["field"] == "train.perDeviceEvalBatchSize"]
    assert (clamp["requested"], clamp["effective"], clamp["reason"]) == ("4", "1", "BatchClamped")
    manifest = json.loads((training.adapter / "manifest.json").read_text())
    assert clamp in manifest["clamps"]


def test_an_attempt_of_a_model_that_is_shared_out_ends_and_the_next_one_takes_fewer_rows_at_once(runs: Runs) -> None:
    assert (runs.failed.code, runs.failed.termination["reason"]) == (138, "TooManyRowsAtOnce"), runs.failed.log
    said = "2 held-out row(s) at once do not fit into memory, the next attempt takes 1"
    assert runs.failed.termination["message"] == said


class Model:
    """A model that is not shared out."""

    training = True

    def eval(self) -> None:
        self.training = False

    def train(self, training: bool) -> None:
        self.training = training


def limited(fits: int, tried: list[int]) -> Any:
    import torch

    def work(rows: Sequence[int]) -> tuple[float, float]:
        tried.append(len(rows))
        if len(rows) > fits:
            raise torch.OutOfMemoryError("no memory")
        return float(sum(rows)), float(len(rows))

    return work


@pytest.mark.parametrize(
    ("asked", "fits", "tried"),
    [
        (4, 9, [4, 4, 1]),
        (4, 3, [4, 2, 2, 2, 2, 1]),
        (9, 2, [9, 4, 2, 2, 2, 2, 1]),
        (3, 1, [3, *[1] * 9]),
    ],
)
def test_no_row_is_left_out_or_measured_twice(asked: int, fits: int, tried: list[int], tmp_path: Path) -> None:
    from taskoffer_trainer.evaluating import Evaluation
    from taskoffer_trainer.world import World

    model, calls = Model(), list[int]()
    told: list[tuple[int, int]] = []
    evaluation = Evaluation(asked, World(), tmp_path, lambda one: told.append((one.size, one.repeated)))
    assert evaluation.over(model, range(9), limited(fits, calls), 2, True, lambda: None) == [36, 9]
    assert calls == tried
    assert model.training
    assert [size for size, _ in told] == sorted((size for size, _ in told), reverse=True)
    calls.clear()
    again = Evaluation(asked, World(), tmp_path)
    assert again.over(model, range(9), limited(fits, calls), 2, True, lambda: None) == [36, 9]
    # What did not fit is not tried again by a later attempt.
    assert max(calls) <= fits
    assert again.repeated == 0


def test_a_row_that_does_not_fit_alone_ends_the_attempt(tmp_path: Path) -> None:
    from taskoffer_trainer.evaluating import Evaluation
    from taskoffer_trainer.failures import TrainerError
    from taskoffer_trainer.world import World

    evaluation = Evaluation(2, World(), tmp_path)
    with pytest.raises(TrainerError, match="a held-out row alone does not fit into memory") as error:
        evaluation.over(Model(), range(3), limited(0, []), 2, False, lambda: None)
    assert (error.value.code, error.value.reason) == (138, "OutOfMemory")
