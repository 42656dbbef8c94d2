"""What changes while a run goes on changes nothing of what is learned: the same losses, step by step."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import POD_UID_VARIABLE

from .conftest import MakeTraining, Outcome, Training, merge, side_by_side

pytestmark = pytest.mark.trainer

HERE = Path(__file__).parent
STEPS = 40
SETTINGS: dict[str, Any] = {
    "train": {
        "maxSteps": STEPS,
        "perDeviceTrainBatchSize": 4,
        "gradientAccumulationSteps": 2,
        "evalSteps": 20,
        "saveSteps": 20,
    }
}
"""Eight rows a step, four at once; no dropout, so that nothing but rounding may differ."""
ROUNDING = 2e-4
"""Single precision adds up in another order; 40 steps of it stay well below this share of a loss."""


def losses_of(training: Training) -> list[float]:
    state = json.loads((training.checkpoints / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def finished(training: Training, outcome: Outcome) -> list[float]:
    assert outcome.code == 0, outcome.log
    losses = losses_of(training)
    assert len(losses) == STEPS
    return losses


@dataclass
class Tuned:
    """A run whose settings were changed again and again, and what it said of it."""

    losses: list[float]
    acknowledged: list[dict[str, Any]]
    metrics: str
    log: str


def tune(training: Training, *requests: dict[str, Any]) -> Tuned:
    """Ask for one change after the other, each once the one before was acknowledged."""
    file = training.folder / "tuning"
    training.environment.update({"TASKOFFER_TUNING_PATH": str(file), POD_UID_VARIABLE: "uid-of-the-pod"})
    training.start()
    acknowledged = []
    metrics = ""
    for generation, request in enumerate(requests, 1):
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps({"generation": generation, **request}))
        partial.replace(file)

        def there(generation: int = generation) -> dict[str, Any] | None:
            report = training.progress()
            assert report, f"ended before generation {generation} was applied:\n{training.log}"
            assert report["state"] == "Starting" or report["podUid"] == "uid-of-the-pod"
            tuning = report.get("tuning")
            return tuning if isinstance(tuning, dict) and tuning["generation"] == generation else None

        found = training.wait_for(there)
        acknowledged.append(found)
        metrics = training.get("/metrics")
    outcome = training.finish()
    return Tuned(finished(training, outcome), acknowledged, metrics, outcome.log)


REQUESTS: tuple[dict[str, Any], ...] = (
    {"microBatch": 1, "dutyCycle": 0.2},
    {"microBatch": 3, "dutyCycle": 0.2},
    {"microBatch": 64, "dutyCycle": 0.2},
    {"microBatch": 2},
)


@pytest.fixture(scope="module")
def unchanged(shared_training: MakeTraining) -> list[float]:
    """A run that nobody asked for anything."""
    training = shared_training("unchanged", **SETTINGS)
    return finished(training, training.run())


@pytest.fixture(scope="module")
def tuned(shared_training: MakeTraining) -> Tuned:
    return tune(shared_training("tuned", **SETTINGS), *REQUESTS)


def test_the_losses_are_those_of_the_run_that_was_left_alone(tuned: Tuned, unchanged: list[float]) -> None:
    assert tuned.losses == pytest.approx(unchanged, rel=ROUNDING)
    assert tuned.losses != unchanged  # The pieces were others, so the last digits are.


def test_every_request_is_acknowledged_with_what_is_in_force(tuned: Tuned) -> None:
    # A step has eight rows, so more cannot go through at once.
    assert [one["microBatch"] for one in tuned.acknowledged] == [1, 3, 8, 2]
    assert [one["dutyCycle"] for one in tuned.acknowledged] == [0.2, 0.2, 0.2, 1.0]
    steps = [one["step"] for one in tuned.acknowledged]
    assert steps == sorted(steps)
    assert "tuning: generation 3 from step" in tuned.log


def test_two_processes_change_together(shared_training: MakeTraining, unchanged: list[float]) -> None:
    settings = merge(SETTINGS, {"gpus": 2, "train": {"gradientAccumulationSteps": 1}})
    both = tune(shared_training("tuned-2", **settings), *REQUESTS[:3])
    assert both.losses == pytest.approx(unchanged, rel=ROUNDING)
    assert [one["microBatch"] for one in both.acknowledged] == [1, 3, 4]


DRAWING: dict[str, Any] = {
    "taskType": "GRPO",
    "samplePrompts": ["Hi"],
    "data": {
        "instruct": None,
        "evalRowsMax": 1,
        "grpo": {
            "fieldPrompt": "instruction",
            "rewardFunctions": [
                {"name": "brief", "builtin": {"name": "LengthTarget", "words": 4}},
                {"name": "says", "builtin": {"name": "PatternMatch", "pattern": "[xzq]"}},
            ],
        },
    },
    "train": {
        "maxSteps": 2,
        "perDeviceTrainBatchSize": 32,
        # Too small to move a weight in half precision: so nothing but the draws can make the rewards differ.
        "learningRate": 1e-9,
        "grpo": {"numGenerations": 8, "numGenerationsEval": 1, "maxCompletionLength": 24},
    },
}


def test_completions_in_half_precision_are_those_of_the_run_that_was_left_alone(training: MakeTraining) -> None:
    alone, changed = training("drawn", **DRAWING), training("drawn-tuned", **DRAWING)
    (changed.folder / "tuning").write_text('{"generation": 1, "microBatch": 2}')
    changed.environment["TASKOFFER_TUNING_PATH"] = str(changed.folder / "tuning")
    for one in (alone, changed):
        one.environment["TASKOFFER_CPU_BF16"] = "1"
    outcomes = side_by_side(alone, changed)
    assert [one.code for one in outcomes] == [0, 0], [one.log for one in outcomes]
    assert "generation 1 from step 1 on: 2 row(s) at once" in outcomes[1].log
    rewards = []
    for one in (alone, changed):
        state = json.loads((one.checkpoints / "checkpoint-2" / "trainer_state.json").read_text())
        rewards.append([entry["reward"] for entry in state["log_history"] if "loss" in entry])
        # What later attempts draw at once as well.
        assert json.loads((one.checkpoints / "run.json").read_text())["drawn_at_once"] == 4 * 32
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) == 2


@pytest.mark.parametrize(
    ("request_text", "said"),
    [
        ("{nonsense", "is left aside"),
        ('{"generation": 1, "microBatch": 0}', "microBatch: Input should be greater than or equal to 1"),
        ('{"generation": 1, "dutyCycle": 0}', "dutyCycle: Input should be greater than or equal to 0.05"),
        ('{"microBatch": 2}', "generation: Field required"),
    ],
)
def test_a_request_that_cannot_be_read_is_said_once_and_changes_nothing(
    request_text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from taskoffer_trainer.tuning import TuningFile

    file = tmp_path / "request"
    file.write_text(request_text)
    requests = TuningFile(file)
    assert requests.read() is requests.read() is None
    assert capsys.readouterr().out.count(said) == 1
    file.write_text('{"generation": 2, "microBatch": 2}')
    asked = requests.read()
    assert asked is not None
    assert (asked.generation, asked.micro_batch, requests.read()) == (2, 2, None)
    file.write_text('{"generation": 1, "microBatch": 4}')
    assert requests.read() is None


def test_pieces_cover_the_rows_evenly_and_never_exceed_the_size_in_force() -> None:
    from taskoffer_trainer.tuning import MicroBatch

    for rows, asked, unit in itertools.product(range(25), range(1, 13), (1, 2, 3)):
        if rows % unit:
            continue
        micro_batch = MicroBatch(asked, unit)
        pieces = micro_batch.cuts(rows)
        assert [row for piece in pieces for row in piece] == list(range(rows))
        sizes = [len(piece) for piece in pieces]
        assert all(0 < size <= micro_batch.size and size % unit == 0 for size in sizes)
        assert len(pieces) == -(-rows // micro_batch.size)
        assert max(sizes, default=0) - min(sizes, default=0) <= unit


@dataclass
class Starved:
    """Runs that had no memory for the rows that they were to take at once."""

    losses: list[float]
    outcome: Outcome


@pytest.fixture(scope="module")
def starved(shared_training: MakeTraining) -> tuple[Starved, Starved]:
    """One run alone, and one of two ranks of which only the second has too little memory."""
    alone = shared_training(
        "starved", **merge(SETTINGS, {"train": {"perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 1}})
    )
    pair = shared_training("starved-2", **merge(SETTINGS, {"gpus": 2, "train": {"gradientAccumulationSteps": 1}}))
    for training, rows in ((alone, "3"), (pair, "1:1")):
        training.environment.update(TEST_ROWS_THAT_FIT=rows, PYTHONPATH=str(HERE / "little_memory"))
    first, second = side_by_side(alone, pair)
    return Starved(finished(alone, first), first), Starved(finished(pair, second), second)


def test_a_step_that_ran_out_of_memory_is_repeated_in_smaller_pieces_and_nothing_is_lost(
    starved: tuple[Starved, Starved], unchanged: list[float]
) -> None:
    alone, _ = starved
    assert alone.losses == pytest.approx(unchanged, rel=ROUNDING)
    # Eight do not fit, four neither, two do; and then no step is tried with more again.
    assert alone.outcome.log.count("do not fit") == 2
    assert "the step is repeated with 2 row(s) at once instead of 4" in alone.outcome.log


def test_all_ranks_repeat_the_step_when_one_of_them_ran_out_of_memory(
    starved: tuple[Starved, Starved], unchanged: list[float]
) -> None:
    _, pair = starved
    assert pair.losses == pytest.approx(unchanged, rel=ROUNDING)
    assert "repeated with 1 row(s) at once" in pair.outcome.log


def test_what_did_not_fit_is_not_tried_again_after_a_restart(
    starved: tuple[Starved, Starved], shared_training: MakeTraining
) -> None:
    checkpoint = shared_training("starved").checkpoints / f"checkpoint-{STEPS}" / "steps.json"
    kept = json.loads(checkpoint.read_text())
    assert (kept["fits"], kept["out_of_memory"], kept["samples"]) == (2, 2, 8 * STEPS)


def test_a_row_that_does_not_fit_alone_ends_the_attempt_with_137(training: MakeTraining) -> None:
    run = training(**SETTINGS)
    run.environment.update(TEST_ROWS_THAT_FIT="0", PYTHONPATH=str(HERE / "little_memory"))
    outcome = run.run()
    assert (outcome.code, outcome.termination["reason"]) == (138, "OutOfMemory"), outcome.log
    assert "1 row(s) at once do not fit into memory" in outcome.termination["message"]
