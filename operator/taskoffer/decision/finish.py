"""Whether a training ends in time: the predicted seconds beside what the offer gives."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import DurationEstimation
from taskoffer.api.v1alpha1.taskoffer import Architecture, TaskOfferSpec
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import shape_of
from taskoffer.decision.hours import Speed, Work, image_seconds, text_seconds
from taskoffer.decision.memory import IMAGE_MODELS


@dataclass(frozen=True, slots=True)
class Finish:
    """How long a task takes on its GPUs, in seconds, and how long it may."""

    gpus: int
    training: float
    overhead: float
    """Start-up and evaluation."""
    budget: float
    """The time limit without the reserve that is kept at its end."""
    basis: str
    """What the prediction rests on."""

    @property
    def seconds(self) -> float:
        """Seconds from the admission to the result, when the pod starts at once."""
        return self.training + self.overhead

    @property
    def in_time(self) -> bool:
        """Tell whether the result is there before the reserve begins."""
        return self.seconds <= self.budget

    @property
    def numbers(self) -> str:
        """Say the prediction and its limit."""
        return f"{hours(self.seconds)} of {hours(self.budget)} on {self.gpus} GPU(s): {self.basis}"


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
    mfu = float(duration.mfu_of(parameters))
    speed = Speed(duration.peak_teraflops * 1e12, mfu)
    if spec.task_type is TaskType.IMAGE:
        model = IMAGE_MODELS[spec.model.architecture or Architecture.SDXL]
        resolution = spec.dataset.image.resolution if spec.dataset.image else 1024
        training = image_seconds(model, resolution, rows, speed, gpus)
        of_what += f" of {resolution} pixels"
    else:
        shape = shape_of(spec.model.name, parameters)
        tokens = min(duration.tokens_per_row, train.max_length)
        generated = duration.generated_tokens_per_row if spec.task_type is TaskType.GRPO else 0
        work = Work(
            task=spec.task_type,
            rows=rows,
            tokens_per_row=tokens,
            adapter_parameters=shape.adapter_parameters(settings.lora.r),
            checkpointing=train.gradient_checkpointing,
            generated_tokens_per_row=generated,
            rows_per_generation=per_step,
        )
        training = text_seconds(shape, parameters, work, speed, gpus)
        of_what += f" of {tokens} tokens" + (f" and {generated} generated ones" if generated else "")
    return Finish(
        gpus=gpus,
        training=training,
        overhead=duration.start_seconds + training * float(Decimal(duration.evaluation_share)),
        budget=max(0, spec.time_limit_seconds - duration.reserve_seconds),
        basis=f"{of_what}, MFU {mfu:g}",
    )


def hours(seconds: float) -> str:
    """Write a time for people: minutes below two hours, hours above."""
    return f"{seconds / 3600:.3g} h" if seconds >= 7200 else f"{seconds / 60:.3g} min"
