"""When an attempt ends, by either clock, and how much earlier its result is planned to be there."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.clock import Clock, now, reserve_clamp, reserve_seconds
from taskoffer_trainer.progress import read_report
from taskoffer_trainer.stop import Stop, StopCause
from taskoffer_trainer.timings import Timings, evaluate_every

from .conftest import merge

pytestmark = pytest.mark.trainer

START = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SLOW = {"rewardFunctions": [{"name": "length", "source": "def length(completions): return [1.0]"}]}


@pytest.fixture
def wire(base_config: dict[str, Any]) -> dict[str, Any]:
    return {**base_config, "outputDir": "/o", "checkpointDir": "/c"}


ENDS = [
    ("no limit", None, None, None),
    ("from the admission", START + HOUR, None, START + HOUR),
    ("from the container's start", None, 1800, START + timedelta(minutes=30)),
    ("a second attempt, whose clock the first one's start has set", START + timedelta(minutes=10), 1800, "deadline"),
    ("a deadline beyond the limit", START + HOUR, 1800, START + timedelta(minutes=30)),
]


@pytest.mark.parametrize(("deadline", "limit", "end"), [one[1:] for one in ENDS], ids=[one[0] for one in ENDS])
def test_the_earlier_of_deadline_and_time_limit_ends_an_attempt(
    deadline: datetime | None, limit: int | None, end: Any, wire: dict[str, Any]
) -> None:
    config = RunConfig.model_validate({**wire, "deadline": deadline, "timeLimitSeconds": limit})
    assert Clock.of(config, START).deadline == (deadline if end == "deadline" else end)


RESERVES = [
    ("a long task", None, None, 10 * 3600, 180),
    ("slow rewards", None, SLOW, 10 * 3600, 720),
    ("what the settings say", 5, SLOW, 10 * 3600, 300),
    ("no reserve at all", 0, None, 3600, 0),
    ("half an hour is just long enough", None, None, 1800, 180),
    ("a task of five minutes keeps four and a half", None, None, 300, 30),
    ("five minutes with slow rewards", None, SLOW, 300, 30),
    ("nothing left", None, None, -5, 0),
]


@pytest.mark.parametrize(
    ("minutes", "rewards", "available", "seconds"), [one[1:] for one in RESERVES], ids=[one[0] for one in RESERVES]
)
def test_the_reserve_is_three_minutes_or_twelve_and_never_more_than_a_tenth_of_the_time(
    minutes: float | None, rewards: Any, available: float, seconds: float, wire: dict[str, Any]
) -> None:
    changed = merge(wire, {"train": {"reserveMinutes": minutes}, "data": {"grpo": rewards}})
    assert reserve_seconds(RunConfig.model_validate(changed), available) == pytest.approx(seconds)


CLAMPED = [
    ("as asked for", 3, 3600, None),
    ("no reserve", 0, 60, None),
    ("what nobody asked for by name", None, 600, None),
    ("twelve minutes of an hour", 12, 3600, ("12", "6")),
    ("a short rest of the time", 3, 100, ("3", "0.167")),
]


@pytest.mark.parametrize(("minutes", "limit", "told"), [one[1:] for one in CLAMPED], ids=[one[0] for one in CLAMPED])
def test_a_reserve_that_is_shorter_than_asked_for_is_said(
    minutes: float | None, limit: int, told: tuple[str, str] | None, wire: dict[str, Any]
) -> None:
    changed = merge(wire, {"timeLimitSeconds": limit, "train": {"reserveMinutes": minutes}})
    config = RunConfig.model_validate(changed)
    found = reserve_clamp(config, Clock.of(config, START))
    assert [(one.requested, one.effective) for one in found] == ([] if told is None else [told])
    assert reserve_clamp(config, Clock(START)) == ()


def test_a_program_knows_when_it_was_started_and_not_when_the_machine_was() -> None:
    before = now()
    code = "from taskoffer_trainer.clock import process_started; print(process_started().isoformat())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    # The kernel counts in hundredths of a second.
    started = datetime.fromisoformat(said.stdout.strip())
    assert before - timedelta(seconds=0.1) <= started <= now()


def test_training_stops_for_the_planned_end_and_the_reserve_is_used_only_where_there_is_nothing_yet() -> None:
    stop = Stop(Clock(now(), now() + timedelta(seconds=100), reserve=60))
    assert stop.agree(20) is StopCause.NONE
    assert stop.agree(50) is StopCause.DEADLINE
    assert stop.agree(50, at_the_latest=True) is StopCause.NONE
    assert stop.agree(150, at_the_latest=True) is StopCause.DEADLINE


def test_a_signal_comes_before_a_deadline_and_without_a_deadline_there_is_always_time() -> None:
    stop = Stop()
    assert stop.agree(1e9) is StopCause.NONE
    late = Stop(Clock(now(), now()))
    late.signalled = True
    assert late.agree() is StopCause.SIGNAL


PLANS = [
    ("free", 0.0, 100, 60, 1),
    ("within a tenth", 1.0, 10, 100, 1),
    ("just too many", 1.0, 11, 100, 2),
    ("every fifth", 5.0, 10, 100, 5),
    ("no time at all leaves one", 5.0, 10, 0, 10),
]


@pytest.mark.parametrize(
    ("cost", "planned", "left", "every"), [one[1:] for one in PLANS], ids=[one[0] for one in PLANS]
)
def test_evaluations_take_at_most_a_tenth_of_the_time_that_is_left(
    cost: float, planned: int, left: float, every: int
) -> None:
    assert evaluate_every(cost, planned, left) == every
    if left:
        assert cost * (planned // every) <= 0.1 * left


def test_before_the_first_step_its_time_is_guessed_from_the_base_models_evaluation(wire: dict[str, Any]) -> None:
    timings = Timings()
    assert timings.step == 0
    timings.evaluate = 2.0
    for checkpointing, seconds in ((False, 2 * 2.0 * 8 / 40), (True, 3 * 2.0 * 8 / 40)):
        config = RunConfig.model_validate(merge(wire, {"train": {"gradientCheckpointing": checkpointing}}))
        timings.guess_step(config, rows=8, held_out=40)
        assert timings.step == pytest.approx(seconds)
    timings.steps.append(0.3)
    assert timings.step == 0.3


def test_the_rest_of_a_run_is_its_steps_evaluations_checkpoints_and_the_finish(wire: dict[str, Any]) -> None:
    config = RunConfig.model_validate(merge(wire, {"train": {"evalSteps": 5, "saveSteps": 10}}))
    timings = Timings()
    timings.steps.append(1.0)
    timings.evaluate, timings.write, timings.save, timings.load, timings.answer = 2.0, 3.0, 4.0, 5.0, 6.0
    finish = 5 + 2 + 6 + 4
    assert timings.seconds(config, 20) == 20 * 1 + 4 * 2 + 2 * (3 + 4) + finish
    timings.every = 2
    assert timings.seconds(config, 20) == 20 * 1 + 2 * 2 + 2 * (3 + 4) + finish


VERIFIED = [
    # Processes, task, and evaluations that the verification takes as long as: one process measures all rows alone,
    # of a preference under the base model as well.
    (1, {}, 1),
    (4, {}, 4),
    (1, {"taskType": "DPO", "data": {"instruct": None, "dpo": {}}}, 2),
    (4, {"taskType": "DPO", "data": {"instruct": None, "dpo": {}}}, 8),
]


@pytest.mark.parametrize(("gpus", "task", "times"), VERIFIED)
def test_the_end_is_planned_with_what_one_process_verifies_alone(
    gpus: int, task: dict[str, Any], times: int, wire: dict[str, Any]
) -> None:
    config = RunConfig.model_validate(merge(wire, {"gpus": gpus, **task}))
    timings = Timings(config)
    timings.evaluate = 2.0
    assert timings.finish == times * 2.0
    assert timings.reserve == 1.5 * (2.0 + times * 2.0) + 5.0
    # The average of the weights is measured by all of them together.
    timings.candidates = 2
    assert timings.finish == 2.0 + times * 2.0


def test_a_step_of_preferences_goes_through_the_base_model_too(wire: dict[str, Any]) -> None:
    task = {"taskType": "DPO", "data": {"instruct": None, "dpo": {}}}
    for checkpointing, passes in ((False, 3), (True, 4)):
        config = RunConfig.model_validate(merge(wire, {**task, "train": {"gradientCheckpointing": checkpointing}}))
        timings = Timings(config)
        timings.evaluate = 2.0
        timings.guess_step(config, rows=8, held_out=40)
        assert timings.step == pytest.approx(passes * 2.0 * 8 / 40)


EXPECTED = [(None, None, None), (600, None, 600), (600, 100, 90), (50, 1000, 50)]


@pytest.mark.parametrize(("expected", "limit", "said"), EXPECTED)
def test_what_the_operator_predicted_is_said_from_the_start_and_never_more_than_there_is(
    expected: int | None, limit: int | None, said: int | None, wire: dict[str, Any], tmp_path: Path
) -> None:
    config = RunConfig.model_validate({**wire, "expectedSeconds": expected, "timeLimitSeconds": limit})
    report = read_report(tmp_path / "absent.json", config, Clock.of(config, now()))
    assert report.estimated_remaining_seconds == said
