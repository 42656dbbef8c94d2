"""What is kept over a stop is kept exactly, the better result is exported, and a failure makes the next one gentler."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .conftest import Found, MakeTraining, found_by
from .preloaded import Preloader

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def found(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Found:
    return found_by("run_probes.py", base_config, tmp_path_factory.mktemp("attempts"), libraries)


def test_warm_up_stages_and_evaluations_move_the_learning_rate(found: Found) -> None:
    said = found["moving"]
    # Every evaluation improves, so each raises the rate by 5 %, from the next step on; half way the stage changes.
    assert said["losses"] == sorted(said["losses"], reverse=True)
    factors = [1.05 ** (step // 2) * (1 if step < 6 else 0.3) for step in range(12)]
    assert said["rates"] == pytest.approx([0.002 * factor for factor in [1 / 3, 2 / 3, *factors[2:]]])
    assert said["factor"] == pytest.approx(1.05**6)


def test_a_stopped_run_goes_on_with_the_same_rates_average_optimizer_and_weights(found: Found) -> None:
    said = found["moving"]
    assert said["ratesResumed"] == said["rates"]
    assert said["factorResumed"] == said["factor"]
    assert said["updates"] == [4, 4]
    assert (said["weightsEqual"], said["averagesEqual"], said["optimizerEqual"]) == (True, True, True)


def test_a_signal_in_an_evaluation_is_heeded_at_its_end_and_not_a_step_later(found: Found) -> None:
    said = found["signalled"]
    assert (said["step"], said["cause"]) == (2, "SIGNAL")
    # What was measured is kept, although a checkpoint was planned after two more steps only.
    assert [said["mark"]["eval_loss"]] == said["losses"]


@pytest.mark.parametrize("when", ["due", "middle"])
def test_a_long_evaluation_that_a_signal_leaves_out_is_made_up_by_the_next_attempt_before_its_first_step(
    when: str, found: Found
) -> None:
    whole, said = found["owed"], found["owed"][when]  # type: ignore[index]
    assert (said["step"], said["cause"]) == (4, "SIGNAL")
    assert said["begun"] == whole["losses"][:1]
    # The checkpoint that was written in its place learns what it is worth.
    assert said["marks"] == [None, whole["losses"][1]]
    assert (said["losses"], said["rates"]) == (whole["losses"], whole["rates"])
    assert (said["weightsEqual"], said["optimizerEqual"], said["owedAfter"]) == (True, True, False)


def test_one_process_leaves_a_measurement_outside_of_the_training_as_soon_as_a_signal_comes(found: Found) -> None:
    # Measurements that were begun, and those that came to their end.
    assert found["interrupted"] == {"base": [1, 0, True], "average": [3, 2, True]}


def test_a_reserve_that_was_cut_is_among_what_was_changed(found: Found) -> None:
    told = [one for one in found["reserved"] if one["field"] == "train.reserveMinutes"]  # type: ignore[index]
    assert [(one["requested"], one["effective"], one["reason"]) for one in told] == [("12", "1", "ReserveClamped")]


def test_the_average_follows_its_formula_and_is_kept_as_an_adapter(found: Found) -> None:
    said = found["moving"]
    assert said["apartFromFormula"] < 1e-6
    assert said["namesEqual"]
    assert said["differs"]


def test_the_average_is_exported_where_it_is_better_and_both_figures_are_said(found: Found) -> None:
    for name, exported in (("worse", "averaged"), ("better", "trained")):
        said = found["choice"][name]
        trained, averaged = said["candidates"]["trained"], said["candidates"]["averaged"]
        assert (averaged < trained) == (exported == "averaged")
        assert said["exported"] == [exported]
        assert said["metrics"] == pytest.approx([trained, averaged])
        assert said["after"] == pytest.approx(said["candidates"][exported], rel=1e-5)


def test_an_adapter_that_silences_its_model_is_refused_and_one_of_a_silent_model_is_not(found: Found) -> None:
    said = found["silence"]
    assert said["silent before"].startswith("adapter of step 2 verified: held-out loss ")
    assert said["silenced"] == (
        "74 the adapter did not pass verification: it answers none of 1 prompts with any text, and its base model "
        "answers 1 of them"
    )


def test_the_manifest_says_how_each_technique_was_done(found: Found) -> None:
    said = found["choice"]["worse"]["inForce"]
    assert (said["attnImplementation"], said["torchCompile"], said["fallbackProfile"]) == ("sdpa", "off", "0")


def test_the_last_profile_goes_on_from_a_checkpoint_with_less_of_everything(found: Found) -> None:
    said = found["fallback"]
    assert [(clamp["field"], clamp["effective"]) for clamp in said["clamps"]] == [
        ("lora.loraDropout", "0"),
        ("train.perDeviceTrainBatchSize", "smallest"),
        ("train.attnImplementation", "eager"),
        ("train.learningRate", "0.001"),
        ("train.adaptiveLr", "none"),
        ("train.emaDecay", "none"),
    ]
    assert said["rates"] == pytest.approx([0.001] * 4)
    assert min(said["ratesBefore"]) > 0.002
    assert (said["dropout"], said["attention"], said["profile"]) == ("Identity", "eager", "3")
    assert (said["rowsAtOnce"], said["average"], said["step"]) == ([1, 1], False, 12)
    assert sum(said["losses"][8:]) / 4 < sum(said["losses"][:4]) / 4


def test_a_rate_that_follows_the_loss_stays_while_that_is_the_base_models(found: Found) -> None:
    assert found["standing"] == 1.0


def test_the_compiled_model_is_called_until_its_pieces_have_changed_too_often(found: Found) -> None:
    said = found["compiling"]
    assert said["calls"][0] > 0
    assert said["calls"][1] == said["calls"][0]
    assert said["losses"] == pytest.approx(said["plain"], rel=1e-4)
    assert (said["inForce"], [clamp["effective"] for clamp in said["clamps"]]) == ("off", ["false"])


def test_a_model_that_cannot_be_compiled_asks_for_another_attempt(found: Found) -> None:
    code, reason, message = found["compiling"]["failure"]
    assert (code, reason) == (138, "CompileFailed")
    assert "train.torchCompile" in message


def test_a_run_without_memory_for_a_single_row_goes_on_with_the_profile_for_that(training: MakeTraining) -> None:
    changes = {"lora": {"loraDropout": 0.1}, "train": {"maxSteps": 8}}
    first = training("run", **changes)
    first.environment["TEST_ROWS_THAT_FIT"] = "0"
    path = Path(__file__).parent / "little_memory"
    first.environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    outcome = first.run()
    assert (outcome.code, outcome.termination["reason"]) == (138, "OutOfMemory"), outcome.log
    kept = json.loads((first.checkpoints / "run.json").read_text())
    assert (kept["profile"], [one["reason"] for one in kept["fallbacks"]]) == (2, ["OutOfMemory"])
    second = training("run", **changes, attempt=2)
    outcome = second.run()
    assert outcome.code == 0, outcome.log
    clamps = {clamp["field"]: clamp for clamp in outcome.termination["clamps"]}
    assert clamps["lora.loraDropout"]["reason"] == "FallbackProfile"
    assert json.loads((second.adapter / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert json.loads((second.adapter / "manifest.json").read_text())["inForce"]["fallbackProfile"] == "2"
