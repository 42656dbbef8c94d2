"""Whether a training fits the memory of its GPUs, and the settings with which it does.

What a policy asks for is kept where it can be kept. Where it cannot, three things give way, in this order: the rank of
each layer to what the layer can hold, the micro-batch to what fits (the global batch stays, through accumulation), and,
when not even one row fits, the rank again. What gave way is told, with the numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from taskoffer.api.contract import SHARDING_SERVED, Clamp, LoraSettings, TrainSettings
from taskoffer.api.quantity import whole
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.taskoffer import Architecture, Model
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import Shape, shape_of
from taskoffer.decision.memory import GIB, IMAGE_MODELS, Layout, Load, Need, image_need, text_need
from taskoffer.decision.sizing import billions

_LEAST_RANK = 8
"""Below this an adapter is not what anybody has asked for, so the offer is refused instead."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training fits: effective settings, what was clamped, and the peak of each GPU, in bytes."""

    effective: Settings
    clamps: tuple[Clamp, ...]
    layout: Layout
    peak: float
    limit: float
    largest_rows: int
    """The largest micro-batch that fits with the effective rank; 0 when the training does not fit at all."""
    known: bool
    """Whether the model's own layers and widths were used."""

    @property
    def fits(self) -> bool:
        """Tell whether at least one row at a time fits."""
        return self.largest_rows > 0

    @property
    def numbers(self) -> str:
        """Say the peak and its limit."""
        rows = self.effective.train.per_device_train_batch_size
        source = "" if self.known else ", layers estimated from the size"
        return (
            f"{self.peak / GIB:.1f} of {self.limit / GIB:.1f} GiB on each GPU with {rows} row(s) at a time "
            f"({self.layout.name}{source})"
        )


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained: the model, its size, the task, and the edge of its pictures in pixels."""

    model_name: str
    architecture: Architecture | None
    parameters: int
    task: TaskType
    resolution: int = 1024

    @classmethod
    def of(cls, model: Model, parameters: int, task: TaskType, resolution: int | None) -> Subject:
        """Take what counts from an offer's model and data."""
        return cls(model.name, model.architecture, parameters, task, resolution or 1024)


@lru_cache(maxsize=4096)
def fit(subject: Subject, asked: Settings, estimation: Estimation, gpus: int) -> Fit:
    """Return how a training fits this many GPUs of one node.

    Models are spread by copies (DDP) where a copy fits, else in shares (FSDP) where the trainer can do that.
    """
    limit = whole(estimation.gpu_memory) * float(estimation.memory_fraction)
    layouts = [Layout(gpus)]
    if gpus > 1 and SHARDING_SERVED and subject.task is not TaskType.IMAGE:
        layouts.append(Layout(gpus, sharded=True))
    fits = [_in_layout(subject, asked, estimation, layout, limit) for layout in layouts]
    return next((one for one in fits if one.fits), fits[-1])


def _in_layout(subject: Subject, asked: Settings, estimation: Estimation, layout: Layout, limit: float) -> Fit:
    shape = None if subject.task is TaskType.IMAGE else shape_of(subject.model_name, subject.parameters)
    margin = 1.0 if shape is None or shape.known else 1.0 + float(estimation.unknown_shape_margin)
    wanted, clamps = _useful_rank(shape, subject, asked.lora)

    def rows_at(rank: int) -> int:
        return _need(subject, shape, asked, rank, layout).largest_rows(limit / margin)

    rank = wanted
    if rows_at(rank) == 0:
        # The need grows with the rank, so the largest one that fits is found by halving the range.
        fitting = bisect_left(range(_LEAST_RANK, wanted + 1), True, key=lambda rank: rows_at(rank) == 0)
        rank = max(_LEAST_RANK, _LEAST_RANK + fitting - 1)
    need, rows = _need(subject, shape, asked, rank, layout), rows_at(rank)
    if rows > 0 and rank < wanted:
        clamps = (*clamps, _rank_for_memory(wanted, rank, limit))
    lora = _with_rank(asked.lora, rank)
    train, batch_clamp = _batch(asked.train, max(1, rows), need, limit, margin)
    if batch_clamp is not None and rows > 0:
        clamps = (*clamps, batch_clamp)
    return Fit(
        effective=Settings(lora=lora, train=train),
        clamps=clamps,
        layout=layout,
        peak=need.at(train.per_device_train_batch_size) * margin,
        limit=limit,
        largest_rows=rows,
        known=shape is None or shape.known,
    )


def _need(subject: Subject, shape: Shape | None, asked: Settings, rank: int, layout: Layout) -> Need:
    image = IMAGE_MODELS[subject.architecture or Architecture.SDXL]
    adapter = shape.adapter_parameters(rank) if shape is not None else rank * image.adapter_parameters_per_rank
    load = Load(
        task=subject.task,
        max_length=asked.train.max_length,
        rank=rank,
        adapter_parameters=adapter,
        dropout=asked.lora.lora_dropout > 0,
        checkpointing=asked.train.gradient_checkpointing,
    )
    if shape is None:
        return image_need(image, subject.resolution, load, layout)
    return text_need(shape, subject.parameters, load, layout)


def _useful_rank(shape: Shape | None, subject: Subject, lora: LoraSettings) -> tuple[int, tuple[Clamp, ...]]:
    """Return the largest rank that any layer has a use for, and what that takes from the one that was asked for."""
    if shape is None:
        return lora.r, ()
    caps = shape.rank_caps()
    lower = {cap: names for cap, names in caps.items() if cap < lora.r}
    if not lower:
        return lora.r, ()
    by_layer = ", ".join(f"{'/'.join(n.removesuffix('_proj') for n in names)} {cap}" for cap, names in lower.items())
    literal = billions(shape.adapter_parameters(lora.r, capped=False))
    message = (
        f"r {lora.r} → {by_layer}: half of what each layer can hold; "
        f"{billions(subject.parameters)} at r {lora.r} would add {literal} parameters"
    )
    return min(lora.r, max(caps)), (_clamp("lora.r", lora.r, by_layer, Reason.RANK_CLAMPED, message),)


def _rank_for_memory(wanted: int, rank: int, limit: float) -> Clamp:
    message = f"r {wanted} → {rank}: at r {wanted} not even one row at a time fits {limit / GIB:.1f} GiB"
    return _clamp("lora.r", wanted, rank, Reason.RANK_CLAMPED, message)


def _with_rank(lora: LoraSettings, rank: int) -> LoraSettings:
    """Return the settings with a smaller rank and the same scale."""
    if rank == lora.r:
        return lora
    share = math.sqrt(rank / lora.r) if lora.use_rslora else rank / lora.r
    alpha = max(1, int(Decimal(lora.lora_alpha * share).to_integral_value()))
    return lora.model_copy(update={"r": rank, "lora_alpha": alpha})


def _batch(
    train: TrainSettings, largest: int, need: Need, limit: float, margin: float
) -> tuple[TrainSettings, Clamp | None]:
    """Return the settings with a micro-batch that fits and the same number of rows per step."""
    asked, accumulated = train.per_device_train_batch_size, train.gradient_accumulation_steps
    if asked <= largest:
        return train, None
    per_step = asked * accumulated
    rows = max(n for n in range(1, min(largest, per_step) + 1) if per_step % n == 0)
    message = (
        f"{asked} rows of {train.max_length} tokens at a time need {need.at(asked) * margin / GIB:.0f} GiB of "
        f"{limit / GIB:.1f}; {rows} at a time and gradientAccumulationSteps {per_step // rows} "
        f"keep {per_step} rows per step and GPU"
    )
    changed = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": per_step // rows}
    return train.model_copy(update=changed), _clamp(
        "train.perDeviceTrainBatchSize", asked, rows, Reason.BATCH_CLAMPED, message
    )


def _clamp(field: str, requested: int, effective: int | str, reason: Reason, message: str) -> Clamp:
    return Clamp(
        field=field, requested=str(requested), effective=str(effective), reason=reason.value, message=message[:512]
    )
