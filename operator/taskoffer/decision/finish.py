"""Whether a training ends in time: the predicted seconds beside what the offer gives."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from taskoffer.api.contract import DRAWN_PER_TRAINED, GRPOSettings, TrainSettings
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import DurationEstimation
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.api.v1alpha1.taskoffer import ClockMode, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import ModelShape
from taskoffer.decision.compute import Pace, Speed, Work, image_pace, text_pace
from taskoffer.decision.fit import Subject
from taskoffer.decision.identity import Itself
from taskoffer.decision.memory import IMAGE_MODELS


class Pacing(NamedTuple):
    """How a task goes on its GPUs, whatever its rows and its time limit; times are in seconds."""

    gpus: int
    pace: Pace
    rows_per_step: int
    max_steps: int
    """A number of steps that counts before the rows; 0 where there is none."""
    epochs: float
    stretch: float
    """What training is multiplied with, so that evaluation is in it."""
    start: float
    """From the admission to the first step."""
    around: float
    """Fetching model and data before, verifying and uploading the result after."""
    reserve: float
    """What is to be left of the limit at the end."""
    how: str
    """What the pace rests on."""
    generations: int = 1
    """Rows that are trained on for each row of the data: the completions of a prompt."""

    def finish(self, spec: TaskOfferSpec, factor: float = 1.0, learned: str = "") -> Finish:
        """Return how long an offer's task takes.

        Args:
            spec: The offer.
            factor: What outcomes have shown the time of training to be a multiple of.
            learned: How that came about, for people.

        Raises:
            ValueError: when neither rows nor steps are known.
        """
        rows = spec.dataset.rows
        if self.max_steps > 0:
            work = self.max_steps * self.rows_per_step
        elif rows is not None:
            work = round(rows * self.epochs) * self.generations
        else:
            raise ValueError("dataset.rows is not set: set it to have the time predicted")
        # The pod's start is not part of what outcomes measure.
        training = self.pace.seconds(work) * self.stretch * factor
        seconds = self.start + training + self.around
        counted = training if spec.clock_mode is ClockMode.TRAINING else seconds
        limit = spec.time_limit_seconds
        in_time = counted <= _budget(limit, self.reserve)
        return Finish(self, rows, training, seconds, counted, limit, in_time, learned)


class Finish(NamedTuple):
    """How long a task takes on its GPUs, and how long it may, in seconds."""

    pacing: Pacing
    rows: int | None
    """As the offer states them."""
    training: float
    """Training and evaluation."""
    seconds: float
    """From the admission to the result, when the pod starts at once."""
    counted: float
    """What the clock of the offer counts: all of it from the admission on, or from the start of the container."""
    limit: float
    in_time: bool
    """Whether the result is there before the reserve begins."""
    learned: str = ""
    """How outcomes have corrected it."""

    @property
    def gpus(self) -> int:
        """The number of GPUs."""
        return self.pacing.gpus

    @property
    def start(self) -> float:
        """Seconds from the admission to the first step."""
        return self.pacing.start

    @property
    def reserve(self) -> float:
        """Seconds of the limit that are to be left at the end."""
        return self.pacing.reserve

    @property
    def budget(self) -> float:
        """The time limit without the reserve."""
        return _budget(self.limit, self.pacing.reserve)

    @property
    def least_limit(self) -> int:
        """The shortest time limit with which it would be."""
        return math.ceil(self.counted + self.pacing.reserve)

    @property
    def basis(self) -> str:
        """Say what the prediction rests on."""
        pacing = self.pacing
        if pacing.max_steps > 0:
            of_what = f"{pacing.max_steps} steps of {pacing.rows_per_step} rows"
        else:
            of_what = f"{self.rows} rows, {pacing.epochs:g} epoch(s)"
        return f"{of_what}{pacing.how}, {self.learned}" if self.learned else f"{of_what}{pacing.how}"

    @property
    def numbers(self) -> str:
        """Say the prediction and its limit."""
        return f"{duration_text(self.counted)} of {duration_text(self.budget)} on {self.gpus} GPU(s): {self.basis}"


def _budget(limit: float, reserve: float) -> float:
    return max(0.0, limit - reserve)


def finish_of(
    spec: TaskOfferSpec, parameters: int, settings: Settings, duration: DurationEstimation, gpus: int
) -> Finish:
    """Return how long an offer's task takes on so many GPUs.

    The rows are those that the offer states; a number of steps in the settings counts before them. Tokens per row are
    those that it declares, else the policy's assumption, cut at the longest sequence.

    Raises:
        ValueError: when neither rows nor steps are known.
    """
    resolution = spec.dataset.image.resolution if spec.dataset.image else None
    subject = Subject.of(spec.model, parameters, spec.task_type, resolution)
    return _pacing(subject, Itself(settings), Itself(duration), gpus, spec.dataset.tokens_per_row).finish(spec)


@lru_cache(maxsize=16_384)
def _pacing(
    subject: Subject,
    settings: Itself[Settings],
    duration: Itself[DurationEstimation],
    gpus: int,
    declared: float | None,
) -> Pacing:
    return pacing_of(subject, settings.value, duration.value, gpus, declared)


def pacing_of(
    subject: Subject, settings: Settings, duration: DurationEstimation, gpus: int, declared: float | None = None
) -> Pacing:
    """Return how a task goes on so many GPUs with these settings; the same for all data of rows of one length.

    Args:
        subject: What is trained.
        settings: With which settings.
        duration: What the policy assumes of GPUs and rows.
        gpus: The number of GPUs.
        declared: Tokens of a row as the offer declares them; None means what the policy assumes. Pictures have none.
    """
    train = settings.train
    speed = _speed(duration, subject.parameters, train.bf16)
    if subject.shape is None:
        pace = image_pace(IMAGE_MODELS[subject.architecture or Architecture.SDXL], subject.resolution, speed, gpus)
        how = f" of {subject.resolution} pixels, MFU {speed.mfu:g}"
    else:
        pace, how = _text_pace(subject, subject.shape, settings, duration, speed, gpus, declared)
    drawing = _drawing(subject, train)
    return Pacing(
        gpus=gpus,
        pace=pace,
        rows_per_step=_rows_per_step(train, drawing, gpus),
        max_steps=train.max_steps,
        epochs=train.num_train_epochs,
        stretch=1 + float(duration.evaluation_share),
        start=duration.start_seconds,
        around=duration.prepare_seconds + duration.submit_seconds,
        reserve=duration.reserve_seconds,
        how=how,
        generations=drawing.num_generations if drawing is not None else 1,
    )


def _drawing(subject: Subject, train: TrainSettings) -> GRPOSettings | None:
    """Return how completions are drawn: as the policy says, else with the trainer's defaults."""
    return (train.grpo or GRPOSettings()) if subject.task is TaskType.GRPO else None


def _rows_per_step(train: TrainSettings, drawing: GRPOSettings | None, gpus: int) -> int:
    """Return the rows of a step; the completions of a prompt are never parted."""
    rows, group = train.per_device_train_batch_size * train.gradient_accumulation_steps * gpus, 1
    if drawing is not None:
        group = drawing.num_generations
    return -(-rows // group) * group


def _speed(duration: DurationEstimation, parameters: int, bf16: bool) -> Speed:
    # Without bfloat16 the matrix units take twice as long, at best.
    return Speed(duration.peak_teraflops * 1e12 / (1 if bf16 else 2), float(duration.mfu_of(parameters)))


def _text_pace(
    subject: Subject,
    shape: ModelShape,
    settings: Settings,
    duration: DurationEstimation,
    speed: Speed,
    gpus: int,
    declared: float | None,
) -> tuple[Pace, str]:
    """Return how fast text is trained on, and on what that rests."""
    lora, train = settings.lora, settings.train
    drawing = _drawing(subject, train)
    tokens: float = min(duration.tokens_per_row if declared is None else declared, train.max_length)
    generated, together = 0, 1.0
    if drawing is not None:
        generated = min(duration.generated_tokens_per_row, drawing.max_completion_length)
        tokens = max(1, min(tokens, train.max_length - drawing.max_completion_length))
        # A step is drawn in as few rounds as the trainer's rows at once allow.
        rows = _rows_per_step(train, drawing, gpus)
        at_once = DRAWN_PER_TRAINED * train.per_device_train_batch_size * gpus
        together = rows / math.ceil(rows / at_once)
    work = Work(
        task=subject.task,
        rows=0,
        tokens_per_row=tokens,
        adapter_parameters=shape.adapter_parameters(
            lora.r, lora.target_modules, pattern=tuple((layer.module, layer.r) for layer in lora.rank_pattern)
        ),
        checkpointing=train.gradient_checkpointing,
        generated_tokens_per_row=generated,
        rows_per_generation=together,
        compared=drawing is not None and drawing.beta > 0,
    )
    how = f" of {_tokens_text(tokens, declared)}" + (f" and {generated} generated ones" if generated else "")
    if drawing is not None:
        how += f", {drawing.num_generations} times"
    return text_pace(shape, subject.parameters, work, speed, gpus), f"{how}, MFU {speed.mfu:g}"


def _tokens_text(tokens: float, declared: float | None) -> str:
    """Say how many tokens of a row count, and what the offer declares where it does."""
    counted = f"{round(tokens, 1):.8g} tokens"
    if declared is None:
        return counted
    return f"{counted} (declared)" if declared <= tokens else f"{counted} ({round(declared, 1):.8g} declared)"


def duration_text(seconds: float) -> str:
    """Write a time for people: minutes below two hours, hours above."""
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 3_600_000 else f"{seconds / 3600:.0f} h"
