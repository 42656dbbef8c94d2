"""Whether a training ends in time: the predicted seconds beside what the offer gives."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import DurationEstimation
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import ModelShape, shape_of
from taskoffer.decision.compute import Pace, Speed, Work, image_seconds, text_pace
from taskoffer.decision.identity import Itself
from taskoffer.decision.memory import IMAGE_MODELS


class Finish(NamedTuple):
    """How long a task takes on its GPUs, and how long it may, in seconds."""

    gpus: int
    start: float
    """From the admission to the first step."""
    training: float
    """Training and evaluation."""
    limit: float
    reserve: float
    """What is to be left of the limit at the end."""
    start_counts: bool
    """Whether the clock runs from the admission on, and not from the start of the container."""
    basis: str
    """What the prediction rests on."""
    around: float = 0.0
    """Fetching model and data before, verifying and uploading the result after."""

    @property
    def seconds(self) -> float:
        """Seconds from the admission to the result, when the pod starts at once."""
        return self.start + self.training + self.around

    @property
    def counted(self) -> float:
        """Seconds that the clock of the offer counts."""
        return self.seconds if self.start_counts else self.training

    @property
    def budget(self) -> float:
        """The time limit without the reserve."""
        return max(0.0, self.limit - self.reserve)

    @property
    def in_time(self) -> bool:
        """Tell whether the result is there before the reserve begins."""
        return self.counted <= self.budget

    @property
    def least_limit(self) -> int:
        """The shortest time limit with which it would be."""
        return math.ceil(self.counted + self.reserve)

    @property
    def numbers(self) -> str:
        """Say the prediction and its limit."""
        return f"{duration_text(self.counted)} of {duration_text(self.budget)} on {self.gpus} GPU(s): {self.basis}"


def finish_of(
    spec: TaskOfferSpec, parameters: int, settings: Settings, duration: DurationEstimation, gpus: int
) -> Finish:
    """Return how long an offer's task takes on so many GPUs.

    The rows are those that the offer states; a number of steps in the settings counts before them. Tokens per row are
    the policy's assumption, cut at the longest sequence.

    Raises:
        ValueError: when neither rows nor steps are known.
    """
    train = settings.train
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus
    if train.max_steps > 0:
        rows, of_what = train.max_steps * per_step, f"{train.max_steps} steps of {per_step} rows"
    elif spec.dataset.rows is not None:
        rows = round(spec.dataset.rows * train.num_train_epochs)
        of_what = f"{spec.dataset.rows} rows, {train.num_train_epochs:g} epoch(s)"
    else:
        raise ValueError("dataset.rows is not set: set it to have the time predicted")
    if spec.task_type is TaskType.IMAGE:
        speed = _speed(duration, parameters, train.bf16)
        model = IMAGE_MODELS[spec.model.architecture or Architecture.SDXL]
        resolution = spec.dataset.image.resolution if spec.dataset.image else 1024
        training = image_seconds(model, resolution, rows, speed, gpus)
        how = f" of {resolution} pixels, MFU {speed.mfu:g}"
    else:
        shape = shape_of(spec.model.name, parameters)
        pace, how = _pace(Itself(shape), parameters, spec.task_type, Itself(settings), Itself(duration), gpus)
        training = pace.seconds(rows)
    return Finish(
        gpus=gpus,
        start=duration.start_seconds,
        training=training * (1 + float(duration.evaluation_share)),
        limit=spec.time_limit_seconds,
        reserve=duration.reserve_seconds,
        start_counts=spec.clock_mode is not ClockMode.TRAINING,
        basis=of_what + how,
        around=duration.prepare_seconds + duration.submit_seconds,
    )


def _speed(duration: DurationEstimation, parameters: int, bf16: bool) -> Speed:
    # Without bfloat16 the matrix units take twice as long, at best.
    return Speed(duration.peak_teraflops * 1e12 / (1 if bf16 else 2), float(duration.mfu_of(parameters)))


@lru_cache(maxsize=16_384)
def _pace(
    like: Itself[ModelShape],
    parameters: int,
    task: TaskType,
    settings: Itself[Settings],
    duration: Itself[DurationEstimation],
    gpus: int,
) -> tuple[Pace, str]:
    """Return how fast text is trained on, and on what that rests; the same for all data."""
    shape, lora, train = like.value, settings.value.lora, settings.value.train
    speed = _speed(duration.value, parameters, train.bf16)
    tokens = min(duration.value.tokens_per_row, train.max_length)
    generated = duration.value.generated_tokens_per_row if task is TaskType.GRPO else 0
    work = Work(
        task=task,
        rows=0,
        tokens_per_row=tokens,
        adapter_parameters=shape.adapter_parameters(lora.r, lora.target_modules),
        checkpointing=train.gradient_checkpointing,
        generated_tokens_per_row=generated,
        # One micro-batch of each process is generated at a time.
        rows_per_generation=train.per_device_train_batch_size * gpus,
    )
    how = f" of {tokens} tokens" + (f" and {generated} generated ones" if generated else "")
    return text_pace(shape, parameters, work, speed, gpus), f"{how}, MFU {speed.mfu:g}"


def duration_text(seconds: float) -> str:
    """Write a time for people: minutes below two hours, hours above."""
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 3_600_000 else f"{seconds / 3600:.0f} h"
