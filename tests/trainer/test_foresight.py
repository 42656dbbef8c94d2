"""What is foreseen of a step and of the end before any step was measured, where a method measures in its own way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.timings import Timings

from .conftest import merge

pytestmark = pytest.mark.trainer

DRAWING: dict[str, Any] = {"taskType": "GRPO", "data": {"instruct": None}}
GUESSES = [
    # Passes of a step for one of the evaluation, by gradient checkpointing and the weight of the divergence.
    ({"gradientCheckpointing": False, "grpo": {"beta": 0}}, 1.0),
    ({"gradientCheckpointing": True, "grpo": {"beta": 0}}, 1.5),
    ({"gradientCheckpointing": True, "grpo": {"beta": 0.04}}, 2.0),
    ({"gradientCheckpointing": False}, 1.5),
]


@pytest.mark.parametrize(("train", "passes"), GUESSES)
def test_a_step_that_draws_completions_is_compared_with_an_evaluation_that_draws_them_too(
    train: dict[str, Any], passes: float, base_config: dict[str, Any]
) -> None:
    place = {"outputDir": "/o", "checkpointDir": "/c"}
    config = RunConfig.model_validate(merge(base_config, {**place, **DRAWING, "train": train}))
    timings = Timings()
    timings.evaluate = 2.0
    timings.guess_step(config, rows=32, held_out=16)
    assert timings.step == pytest.approx(passes * 2.0 * 32 / 16)


def test_completions_of_an_evaluation_are_its_rows() -> None:
    from taskoffer_trainer.grpo import _Reinforcement

    course: Any = SimpleNamespace(settings=SimpleNamespace(num_generations_eval=2), held_out=[None] * 8)
    assert _Reinforcement.rows_measured(course) == 16


def test_pictures_are_measured_at_as_many_times_as_is_foreseen() -> None:
    import torch

    from taskoffer_trainer.image import _Pictures

    measured = []

    def over(_model: Any, rows: list[Any], *_: Any) -> list[float]:
        measured.append(len(rows))
        return [0.0]

    held_out = [None] * 5
    course: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(seed=1)),
        device=SimpleNamespace(dtype=torch.float32),
        data=SimpleNamespace(held_out=held_out),
        split=SimpleNamespace(held_out=held_out),
        steps=SimpleNamespace(micro_batch=SimpleNamespace(size=1)),
        evaluation=SimpleNamespace(over=over),
    )
    _Pictures.measure(course, torch.nn.Linear(1, 1), True, lambda: None)
    assert measured == [_Pictures.rows_measured(course)]


class LoadedError(Exception):
    """Ends the preparation once the network is loaded."""


def test_encoding_the_pictures_is_no_part_of_loading_the_model_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskoffer_trainer import image

    clock = [0.0]

    def takes(seconds: float, found: Any) -> Any:
        def work(*_: Any) -> Any:
            clock[0] += seconds
            return found

        return work

    def end(*_: Any) -> None:
        raise LoadedError

    monkeypatch.setattr(image, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(image, "encode_split", takes(600.0, None))
    monkeypatch.setattr(image, "load_component", takes(7.0, None))
    monkeypatch.setattr(image, "lora_config", end)
    course: Any = SimpleNamespace(
        config=SimpleNamespace(lora=None),
        between=lambda: None,
        split=None,
        prompts=list,
        denoiser=SimpleNamespace(target_modules=""),
        device=SimpleNamespace(dtype=None),
        layout=SimpleNamespace(network="unet"),
        timings=Timings(),
    )
    with pytest.raises(LoadedError):
        image._Pictures.prepare(course, None)  # type: ignore[arg-type]
    assert course.timings.load == 7.0
