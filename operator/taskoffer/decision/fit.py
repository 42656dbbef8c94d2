"""Whether a training fits the memory of its GPUs, and the settings with which it does.

What a policy asks for is kept where it can be kept. Where it cannot, three things give way, in this order: the rank of
each layer to what the layer can hold, the micro-batch to what fits (the global batch stays, through accumulation), and,
when not even one row fits, the rank again. What gave way is told, with the numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

from taskoffer.api.contract import SHARDING_SERVED, Clamp, LoraSettings, TrainSettings
from taskoffer.api.quantity import whole
from taskoffer.api.reasons import Reason
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.model_and_data import Architecture, Model
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import ModelShape, by_layer, shape_of
from taskoffer.decision.memory import GIB, IMAGE_MODELS, Layout, Load, Need, image_need, text_need
from taskoffer.decision.sizing import billions

_LEAST_RANK = 8
"""Below this an adapter is not what anybody has asked for, so the offer is refused instead."""
_MOST_ACCUMULATION = 65_536
"""The schema's bound on gradientAccumulationSteps."""
_SCALE_TOLERANCE = 0.05
"""How far the adapter's scale may move, through rounding alpha, without a word."""


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
    """What is trained: the model, its size, the task, and the edge of its pictures in pixels.

    Models of one shape and size are alike: their names tell nothing more.
    """

    model_name: str = field(compare=False)
    architecture: Architecture | None
    parameters: int
    task: TaskType
    resolution: int = 1024
    shape: ModelShape | None = field(init=False)
    """None for a model of pictures."""

    def __post_init__(self) -> None:
        text = self.task is not TaskType.IMAGE
        object.__setattr__(self, "shape", shape_of(self.model_name, self.parameters) if text else None)

    @classmethod
    def of(cls, model: Model, parameters: int, task: TaskType, resolution: int | None) -> Subject:
        """Take what counts from an offer's model and data."""
        return cls(model.name, model.architecture, parameters, task, resolution or 1024)


@lru_cache(maxsize=4096)
def fit(
    subject: Subject, asked: Settings, estimation: Estimation, gpus: int, memory_factor: Decimal = Decimal(1)
) -> Fit:
    """Return how a training fits this many GPUs of one node.

    Models are spread by copies (DDP) where a copy fits, else in shares (FSDP) where the trainer can do that.

    Args:
        subject: What is trained.
        asked: The settings that the policy asks for.
        estimation: The policy's GPUs.
        gpus: How many of them.
        memory_factor: What outcomes have shown every need to be a multiple of.
    """
    limit = whole(estimation.gpu_memory) * float(estimation.memory_fraction)
    layouts = [Layout(gpus)]
    if gpus > 1 and SHARDING_SERVED and subject.task is not TaskType.IMAGE:
        layouts.append(Layout(gpus, sharded=True))
    fits = [_in_layout(subject, asked, estimation, layout, limit, float(memory_factor)) for layout in layouts]
    return next((one for one in fits if one.fits), fits[-1])


def _in_layout(
    subject: Subject, asked: Settings, estimation: Estimation, layout: Layout, limit: float, factor: float
) -> Fit:
    shape = subject.shape
    margin = 0.0 if shape is None or shape.known else float(estimation.unknown_shape_margin)

    def need_at(rank: int) -> Need:
        return _need(subject, shape, asked, rank, layout, margin).scaled(factor)

    useful, targets = asked.lora.r, asked.lora.target_modules
    if shape is not None and shape.known:
        useful = min(useful, max(shape.rank_caps(targets)))
    rank, least = useful, min(useful, _LEAST_RANK)
    if need_at(rank).largest_rows(limit) == 0:
        # The need grows with the rank, so the largest one that fits is found by halving the range.
        ranks = range(least, useful + 1)
        fitting = bisect_left(ranks, True, key=lambda rank: need_at(rank).largest_rows(limit) == 0)
        rank = max(least, least + fitting - 1)
    need = need_at(rank)
    rows = need.largest_rows(limit)
    lora = _with_rank(asked.lora, rank)
    train = _batch(asked.train, max(1, rows))
    clamps: tuple[Clamp, ...] = ()
    if rows > 0:
        told = (
            _rank_clamp(shape, subject, asked.lora, rank, useful, limit),
            _scale_clamp(asked.lora, lora),
            _batch_clamp(subject, asked.train, train, need, limit),
        )
        clamps = tuple(clamp for clamp in told if clamp is not None)
    return Fit(
        effective=Settings(lora=lora, train=train),
        clamps=clamps,
        layout=layout,
        peak=need.at(train.per_device_train_batch_size),
        limit=limit,
        largest_rows=rows,
        known=shape is None or shape.known,
    )


def _need(
    subject: Subject, shape: ModelShape | None, asked: Settings, rank: int, layout: Layout, margin: float
) -> Need:
    image = IMAGE_MODELS[subject.architecture or Architecture.SDXL]
    if shape is not None:
        adapter = shape.adapter_parameters(rank, asked.lora.target_modules)
    else:
        adapter = rank * image.adapter_parameters_per_rank
    load = Load(
        task=subject.task,
        max_length=asked.train.max_length,
        rank=rank,
        adapter_parameters=adapter,
        dropout=asked.lora.lora_dropout > 0,
        checkpointing=asked.train.gradient_checkpointing,
        bf16=asked.train.bf16,
    )
    if shape is None:
        return image_need(image, subject.resolution, load, layout)
    return text_need(shape, subject.parameters, load, layout, margin)


def _rank_clamp(
    shape: ModelShape | None, subject: Subject, lora: LoraSettings, rank: int, useful: int, limit: float
) -> Clamp | None:
    """Say what becomes of the rank: what each layer can hold of it, where the layers are known, and what fits."""
    caps = shape.rank_caps(lora.target_modules) if shape is not None and shape.known else {}
    lower = {cap: names for cap, names in caps.items() if cap < rank}
    parts = []
    if shape is not None and any(cap < lora.r for cap in caps):
        literal = billions(shape.adapter_parameters(lora.r, lora.target_modules, capped=False))
        too_wide = by_layer({cap: names for cap, names in caps.items() if cap < lora.r})
        size = billions(subject.parameters)
        parts.append(
            f"{too_wide}: half of what each layer can hold; {size} at r {lora.r} would add {literal} parameters"
        )
    if rank < useful:
        parts.append(f"at r {useful} not even one row at a time fits {limit / GIB:.1f} GiB, at {rank} it does")
    if not parts:
        return None
    effective = ", ".join(part for part in (str(rank) if rank < lora.r else "", by_layer(lower)) if part)
    return _clamp("lora.r", lora.r, effective, Reason.RANK_CLAMPED, f"r {lora.r} → {'; '.join(parts)}")


def _with_rank(lora: LoraSettings, rank: int) -> LoraSettings:
    """Return the settings with a smaller rank and, as far as whole numbers go, the same scale."""
    if rank == lora.r:
        return lora
    alpha = Decimal(lora.lora_alpha * _scale_share(lora, rank)).to_integral_value(ROUND_HALF_UP)
    return lora.model_copy(update={"r": rank, "lora_alpha": max(1, int(alpha))})


def _scale_share(lora: LoraSettings, rank: int) -> float:
    """Return what alpha is to be multiplied with so that alpha / r, or alpha / sqrt(r), stays."""
    return math.sqrt(rank / lora.r) if lora.use_rslora else rank / lora.r


def _scale_clamp(asked: LoraSettings, lora: LoraSettings) -> Clamp | None:
    exact = asked.lora_alpha * _scale_share(asked, lora.r)
    if abs(lora.lora_alpha / exact - 1) <= _SCALE_TOLERANCE:
        return None
    message = f"alpha is a whole number of at least 1; {exact:.3g} would keep the adapter's scale at r {lora.r}"
    return _clamp("lora.loraAlpha", asked.lora_alpha, lora.lora_alpha, Reason.RANK_CLAMPED, message)


def _batch(train: TrainSettings, largest: int) -> TrainSettings:
    """Return the settings with a micro-batch that fits and, where the schema can say it, the same rows per step."""
    asked = train.per_device_train_batch_size
    if asked <= largest:
        return train
    per_step = asked * train.gradient_accumulation_steps
    rows = max(n for n in range(1, largest + 1) if per_step % n == 0)
    if per_step // rows > _MOST_ACCUMULATION:
        rows = largest
    steps = min(per_step // rows, _MOST_ACCUMULATION)
    return train.model_copy(update={"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps})


def _batch_clamp(
    subject: Subject, asked: TrainSettings, train: TrainSettings, need: Need, limit: float
) -> Clamp | None:
    before, rows = asked.per_device_train_batch_size, train.per_device_train_batch_size
    if rows == before:
        return None
    steps, per_step = train.gradient_accumulation_steps, before * asked.gradient_accumulation_steps
    what = "pictures" if subject.task is TaskType.IMAGE else f"rows of {train.max_length} tokens"
    kept = f"keep {per_step}" if rows * steps == per_step else f"make {rows * steps} of {per_step}"
    message = (
        f"{before} {what} at a time need {need.at(before) / GIB:.0f} GiB of {limit / GIB:.1f}; {rows} at a time and "
        f"gradientAccumulationSteps {steps} {kept} rows per step and GPU"
    )
    return _clamp("train.perDeviceTrainBatchSize", before, rows, Reason.BATCH_CLAMPED, message)


def _clamp(field: str, requested: int, effective: int | str, reason: Reason, message: str) -> Clamp:
    return Clamp(
        field=field,
        requested=str(requested),
        effective=str(effective)[:256],
        reason=reason.value,
        message=message[:512],
    )
