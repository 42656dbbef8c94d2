"""When a run saves and evaluates, and what it says of its end."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig, RunState
from taskoffer_trainer import clock, in_time
from taskoffer_trainer.callbacks import Progress
from taskoffer_trainer.clock import Clock, now
from taskoffer_trainer.in_time import EARLY_STEPS, InTime
from taskoffer_trainer.pace import EvaluationPace
from taskoffer_trainer.timings import Timings
from taskoffer_trainer.world import World

from .conftest import merge

pytestmark = pytest.mark.trainer


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> RunConfig:
    place = {"outputDir": str(tmp_path / "out"), "checkpointDir": str(tmp_path / "checkpoints")}
    return RunConfig.model_validate(merge(base_config, {**place, "train": {"evalSteps": 10, "saveSteps": 10}}))


def clock_of(seconds: float | None) -> Clock:
    return Clock(now(), None if seconds is None else now() + timedelta(seconds=seconds))


class Adapter:
    """A model whose adapter learns nothing before a step; a step of 0 is a trained one."""

    def __init__(self, learns_at: int = 0) -> None:
        import torch

        self.learns_at, self.weight = learns_at, torch.zeros(2, 2)
        self.at(0)

    def at(self, step: int) -> None:
        if step >= self.learns_at:
            self.weight[0, 0] = 1e-6

    def named_parameters(self) -> list[tuple[str, Any]]:
        import torch

        return [("layer.lora_A.default.weight", torch.ones(2, 2)), ("layer.lora_B.default.weight", self.weight)]


def planned(
    made: InTime, steps: int, first: int = 0, every: int = 10, model: Adapter | None = None
) -> tuple[list[int], list[int]]:
    """Go through steps as transformers does, and return those that are saved and those that are evaluated."""
    model = model or Adapter()
    saved, evaluated = [], []
    state = SimpleNamespace(global_step=first, max_steps=steps)
    made.on_train_begin(None, state, None, model=model)
    for step in range(first + 1, steps + 1):
        state.global_step = step
        model.at(step)
        last = step == steps
        due = step % every == 0 or last
        control = SimpleNamespace(should_save=due, should_evaluate=due, should_training_stop=last)
        made.on_step_end(None, state, control, model=model)
        if control.should_evaluate:
            evaluated.append(step)
        if control.should_save:
            made.on_save(None, state, control, model=model)
            saved.append(step)
    return saved, evaluated


def test_the_first_checkpoint_comes_after_a_few_steps_and_then_as_planned(config: RunConfig) -> None:
    made = InTime(config, clock_of(None), Timings(), World())
    assert planned(made, 25) == ([EARLY_STEPS, 10, 20, 25], [10, 20, 25])


def test_with_slow_steps_the_first_checkpoint_comes_after_two_minutes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 10_000, 50))
    monkeypatch.setattr(in_time.time, "monotonic", lambda: float(next(ticks)))
    made = InTime(config, clock_of(None), Timings(), World())
    # Every look at the clock finds 50 s more: the third step ends 150 s after the beginning.
    assert planned(made, 9)[0] == [3, 9]


def test_a_run_that_goes_on_has_a_checkpoint_already(config: RunConfig) -> None:
    assert planned(InTime(config, clock_of(None), Timings(), World()), 30, first=11)[0] == [20, 30]


EARLY = [
    ("while nothing is learned there is nothing to save early", 8, 0, [8, 10, 20]),
    ("a checkpoint of nothing is none", 12, 0, [10, 12, 20]),
    ("a run that goes on from such a checkpoint", 13, 11, [13, 20]),
]


@pytest.mark.parametrize(("learns", "first", "saved"), [one[1:] for one in EARLY], ids=[one[0] for one in EARLY])
def test_the_early_checkpoint_is_one_that_has_learned_something(
    learns: int, first: int, saved: list[int], config: RunConfig
) -> None:
    made = InTime(config, clock_of(None), Timings(), World())
    assert planned(made, 20, first=first, model=Adapter(learns))[0] == saved


def test_the_ranks_save_together_when_one_of_them_finds_it_late(config: RunConfig) -> None:
    world = SimpleNamespace(largest=lambda *_: [1.0])
    assert planned(InTime(config, clock_of(None), Timings(), world), 4)[0] == [1, 4]  # type: ignore[arg-type]


def timings_of(step: float, evaluate: float) -> Timings:
    made = Timings()
    made.steps.append(step)
    made.evaluate = evaluate
    return made


EVALUATIONS = [
    ("without a deadline all are made", None, 100.0, list(range(10, 101, 10))),
    ("with much time all are made", 100_000, 1.0, list(range(10, 101, 10))),
    ("with little time some are left out, and never the last", 400, 10.0, [30, 50, 70, 80, 90, 100]),
]


@pytest.mark.parametrize(
    ("seconds", "cost", "evaluated"), [one[1:] for one in EVALUATIONS], ids=[one[0] for one in EVALUATIONS]
)
def test_evaluations_are_thinned_out_where_a_deadline_leaves_too_little_time(
    seconds: float | None, cost: float, evaluated: list[int], config: RunConfig
) -> None:
    timings = timings_of(0.01, cost)
    made = InTime(config, clock_of(seconds), timings, World())
    saved, found = planned(made, 100)
    assert found == evaluated
    assert saved == [EARLY_STEPS, *range(10, 101, 10)]


class Course:
    """Steps and evaluations that take their time on a clock of their own, until the time is up."""

    def __init__(self, config: RunConfig, seconds: float, step: float, cost: float, every: int) -> None:
        self.config = config.model_copy(
            update={"train": config.train.model_copy(update={"eval_steps": every, "save_steps": every})}
        )
        self.passed, self.seconds, self.step, self.cost = 0.0, seconds, step, cost
        began = now()
        self.now = lambda: began + timedelta(seconds=self.passed)
        self.clock = Clock(began, began + timedelta(seconds=seconds))

    def evaluated(self, first: int = 0, stretch: int | None = None) -> list[int]:
        """Go on from a step as transformers does; return the steps that are evaluated."""
        timings = timings_of(self.step, self.cost)
        timings.stretch = stretch or 1
        steps: Any = SimpleNamespace(
            config=self.config, plan=SimpleNamespace(total_steps=10**6), stretch=stretch, world=World()
        )
        told: Any = SimpleNamespace(clamps=())
        callbacks = EvaluationPace(steps, timings, told), InTime(self.config, self.clock, timings, World())
        state = SimpleNamespace(global_step=first, max_steps=10**6)
        callbacks[1].on_train_begin(None, state, None, model=Adapter())
        found = []
        while self.passed < self.seconds - timings.reserve:
            self.passed += self.step
            state.global_step += 1
            due = state.global_step % self.config.train.eval_steps == 0
            control = SimpleNamespace(should_evaluate=due, should_save=due, should_training_stop=False)
            for one in callbacks:
                one.on_step_end(None, state, control, model=Adapter())
            if control.should_evaluate:
                found.append(state.global_step)
                self.passed += self.cost
        return found


# Seconds of the run, of a step and of an evaluation, steps between evaluations, and how many of them are made.
SHARES = [
    (3600, 1.0, 30.0, 25, 11),
    (3600, 1.0, 90.0, 25, 3),
    (7200, 4.0, 40.0, 25, 16),
    # Too short for the pace of a run to put one off.
    (3600, 0.1, 1.9, 25, 163),
]


@pytest.mark.parametrize(("seconds", "step", "cost", "every", "made"), SHARES)
def test_with_a_deadline_evaluations_get_the_share_of_the_time_that_they_may_take_and_not_half_of_it(
    seconds: float,
    step: float,
    cost: float,
    every: int,
    made: int,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    course = Course(config, seconds, step, cost, every)
    monkeypatch.setattr(clock, "now", course.now)
    found = course.evaluated()
    assert len(found) == made
    assert 0.07 * seconds < made * cost <= 0.1 * seconds


def test_a_run_that_goes_on_evaluates_when_it_would_have_without_the_stop(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = Course(config, 3600, 1.0, 30.0, 25)
    monkeypatch.setattr(clock, "now", course.now)
    # An evaluation every 275 steps; of a stop between two of them nothing is to be seen.
    assert course.evaluated(first=530, stretch=11)[:3] == [550, 825, 1100]


def progress_of(config: RunConfig, seconds: float | None, reserve: float = 0.0) -> Progress:
    made = clock_of(seconds)
    return Progress(config, None, Timings(), Clock(made.started, made.deadline, reserve))


def test_the_end_is_predicted_from_what_is_known_first_from_afar_then_from_the_steps(config: RunConfig) -> None:
    assert progress_of(config, None).remaining() is None
    made = progress_of(config.model_copy(update={"expected_seconds": 500}), None)
    assert made.remaining() == 500
    made.total, made.step, made.timings.guess = 100, 0, 2.0
    assert made.remaining() == 200
    made.step = 40
    made.timings.steps.append(1.0)
    assert made.remaining() == 60


def test_no_end_is_predicted_after_the_one_that_the_deadline_makes(config: RunConfig) -> None:
    made = progress_of(config, 50, reserve=20)
    made.total, made.timings.guess = 1000, 2.0
    assert made.remaining() == 30
    late = progress_of(config, -5)
    late.total, late.timings.guess = 1000, 2.0
    assert late.remaining() == 0


def test_after_the_last_step_only_the_finish_is_left_however_many_steps_were_planned(config: RunConfig) -> None:
    made = progress_of(config, None)
    made.total, made.step, made.timings.guess = 100_000, 10, 2.0
    made.timings.load, made.timings.save = 30.0, 3.0
    made.enter(RunState.VERIFYING)
    assert made.remaining() == 33
    made.enter(RunState.SAVING)
    assert made.remaining() == 3
    made.enter(RunState.DONE)
    assert made.remaining() == 0
