"""How long a training takes: the work in floating point operations, over what the GPUs do in a second.

FLOPs per token were counted with PyTorch's FlopCounter; the formulas agree with it to three digits. What share of its
peak a GPU reaches (MFU, of the model's FLOPs without recomputation counted twice) is an assumption until it has been
measured, so it is a policy's number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taskoffer.api.tasks import TaskType
from taskoffer.decision.architecture import ModelShape
from taskoffer.decision.memory import ImageModel


@dataclass(frozen=True, slots=True)
class Speed:
    """What a GPU does: its peak in bfloat16, the share of it that is reached, the speed of its memory."""

    peak_flops: float
    mfu: float
    memory_bytes_per_second: float = 3.35e12
    decode_share: float = 0.6
    """Share of the memory's speed that generating text reaches."""
    launch_seconds_per_layer: float = 0.8e-3
    """What one layer takes for one token when launching kernels is the limit, as with plain transformers."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: rows in all (epochs counted), their tokens, and what the task adds."""

    task: TaskType
    rows: int
    tokens_per_row: float
    adapter_parameters: int
    checkpointing: bool = True
    generated_tokens_per_row: float = 0.0
    rows_per_generation: float = 1
    """Completions that are generated together, over all GPUs; a mean where a step is no multiple of it."""
    compared: bool = False
    """Whether the base model goes over the rows as well, for the KL divergence from it."""


def flops_per_token(shape: ModelShape, work: Work, length: float) -> float:
    """Return the FLOPs of a token of a sequence of this length, forward and backward.

    Linear layers take 4 per weight (6 with gradient checkpointing, whose second forward is counted here) and 6 (8) per
    adapter weight; attention 2 x length x width x layers x 4.5; the output layer 6 x vocabulary x width. A preference
    task runs the reference model as well, and so does one whose divergence from the base model counts: 2 per weight
    more.
    """
    linear, adapter = shape.linear_parameters, work.adapter_parameters
    per_weight, per_adapter = (6, 8) if work.checkpointing else (4, 6)
    if work.task is TaskType.DPO or work.compared:
        per_weight += 2
    attention = 2 * length * shape.query * shape.layers * 4.5
    return per_weight * linear + per_adapter * adapter + attention + 6 * shape.vocabulary * shape.hidden


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast rows of text are trained on, however many there are."""

    tokens_per_row: float
    flops_per_token: float
    flops_per_second: float
    """Of all GPUs."""
    rows_per_generation: float = 1
    generated_tokens_per_row: float = 0.0
    seconds_per_generated_token: float = 0.0
    """Of all completions that are generated together."""

    def seconds(self, rows: int) -> float:
        """Return the seconds that so many rows take."""
        trained = rows * self.tokens_per_row * self.flops_per_token / self.flops_per_second
        if self.seconds_per_generated_token == 0:
            return trained
        rounds = math.ceil(rows / self.rows_per_generation)
        return trained + rounds * self.generated_tokens_per_row * self.seconds_per_generated_token


def text_pace(shape: ModelShape, parameters: int, work: Work, speed: Speed, gpus: int) -> Pace:
    """Return how fast a language model trains on its GPUs; the rows of the work do not count."""
    sequences = 2 if work.task is TaskType.DPO else 1
    length = work.tokens_per_row + work.generated_tokens_per_row
    flops, per_second = flops_per_token(shape, work, length), gpus * speed.mfu * speed.peak_flops
    if work.task is not TaskType.GRPO:
        return Pace(sequences * length, flops, per_second)
    per_token = max(
        2 * parameters / (speed.decode_share * speed.memory_bytes_per_second),
        speed.launch_seconds_per_layer * shape.layers,
    )
    tokens, together = work.generated_tokens_per_row, work.rows_per_generation
    return Pace(sequences * length, flops, per_second, together, tokens, per_token)


def text_seconds(shape: ModelShape, parameters: int, work: Work, speed: Speed, gpus: int) -> float:
    """Return the seconds that a language model's training takes on its GPUs, without evaluation and start-up."""
    return text_pace(shape, parameters, work, speed, gpus).seconds(work.rows)


def image_pace(model: ImageModel, resolution: int, speed: Speed, gpus: int) -> Pace:
    """Return how fast an image model trains on its GPUs: a picture takes four forward passes' worth.

    A picture counts as a row of one token; ``resolution`` is its edge in pixels.
    """
    flops = 4 * model.forward_flops * (resolution / 1024) ** 2
    return Pace(1, flops, gpus * speed.mfu * speed.peak_flops)


def image_seconds(model: ImageModel, resolution: int, pictures: int, speed: Speed, gpus: int) -> float:
    """Return the seconds that an image model's training takes, without evaluation and start-up."""
    return image_pace(model, resolution, speed, gpus).seconds(pictures)
