"""Whether a training fits the memory of its GPUs, and the settings with which it does.

What a policy asks for is kept where it can be kept. Where it cannot, three things give way, in this order: the rank of
each layer to what the layer can hold, the micro-batch to what fits (the global batch stays, through accumulation), and,
when not even one row fits, the rank again. Checkpoints are sized beside that: fewer are kept where they have no room
for all. What gave way is told, with the numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache

from taskoffer.api.contract import (
    CHECKPOINT_BYTES,
    FEWEST_CHECKPOINTS,
    Clamp,
    LayerRank,
    LoraSettings,
    TrainSettings,
    checkpoint_bytes,
)
from taskoffer.api.quantity import whole
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.estimation import Estimation
from taskoffer.api.v1alpha1.model_and_data import Architecture, Model
from taskoffer.api.v1alpha1.trainingjob import Settings
from taskoffer.decision.architecture import (
    ALL_LINEAR,
    TEXT_LAYERS,
    ModelShape,
    Ranks,
    Structure,
    shape_of,
    structure_of,
)
from taskoffer.decision.clamping import (
    batch_clamp,
    checkpoints_clamp,
    dropout_clamp,
    evaluation_batch_clamp,
    rank_clamp,
    scale_clamp,
    sharding_clamp,
    targets_clamp,
    tokens_clamp,
)
from taskoffer.decision.memory import GIB, IMAGE_MODELS, Layout, Load, Need, image_need, text_need

SHARDING_SERVED = True
"""Whether the trainer can share out a model's parameters over its GPUs (FSDP)."""
_LEAST_RANK = 8
"""Below this an adapter is not what anybody has asked for, so the offer is refused instead."""
_MOST_ACCUMULATION = 65_536
"""The schema's bound on gradientAccumulationSteps."""


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
    checkpoint_bytes: int
    """Space for the checkpoints that are kept and the one that is being written."""
    lacks_storage: bool = False
    """Whether it does not fit because of its checkpoints."""

    @property
    def fits(self) -> bool:
        """Tell whether at least one row at a time fits."""
        return self.largest_rows > 0

    @property
    def numbers(self) -> str:
        """Say the peak and its limit."""
        train = self.effective.train
        most = train.per_device_train_max_tokens
        tokens = f" and at most {most} tokens" if most is not None else ""
        source = "" if self.known else ", layers estimated from the size"
        return (
            f"{self.peak / GIB:.1f} of {self.limit / GIB:.1f} GiB on each GPU with {train.per_device_train_batch_size} "
            f"row(s){tokens} at a time ({self.layout.name}{source})"
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
    structure: Structure = field(init=False)

    def __post_init__(self) -> None:
        text = self.task is not TaskType.IMAGE
        object.__setattr__(self, "shape", shape_of(self.model_name, self.parameters) if text else None)
        object.__setattr__(self, "structure", structure_of(self.model_name) if text else Structure())

    @classmethod
    def of(cls, model: Model, parameters: int, task: TaskType, resolution: int | None) -> Subject:
        """Take what counts from an offer's model and data."""
        return cls(model.name, model.architecture, parameters, task, resolution or 1024)


@lru_cache(maxsize=4096)
def fit(
    subject: Subject, asked: Settings, estimation: Estimation, gpus: int, memory_factor: Decimal = Decimal(1)
) -> Fit:
    """Return how a training fits this many GPUs of one node.

    Models are spread by copies (DDP) where a copy fits with the rank that is asked for, else in shares (FSDP) where the
    trainer can do that and a larger rank fits so.

    Args:
        subject: What is trained.
        asked: The settings that the policy asks for.
        estimation: The policy's GPUs.
        gpus: How many of them.
        memory_factor: What outcomes have shown every need to be a multiple of.
    """
    served = gpus > 1 and SHARDING_SERVED and subject.task is not TaskType.IMAGE
    copies, shares = Layout(gpus), Layout(gpus, sharded=True)
    if served and asked.train.fsdp:
        return _Fitting(subject, asked, estimation, shares, float(memory_factor)).result()
    found = _Fitting(subject, asked, estimation, copies, float(memory_factor)).result()
    if served and (not found.fits or found.effective.lora.r < asked.lora.r):
        other = _Fitting(subject, asked, estimation, shares, float(memory_factor)).result()
        if not found.fits or (other.fits and other.effective.lora.r > found.effective.lora.r):
            return other
    return found


def fit_by_copies(
    subject: Subject, asked: Settings, estimation: Estimation, gpus: int, memory_factor: Decimal = Decimal(1)
) -> Fit | None:
    """Return how a training fits by copies that :func:`fit` spreads in shares for the sake of its rank, or None.

    A smaller rank is less work, so that it may end in time where the larger one does not.

    Args:
        subject: What is trained.
        asked: The settings that the policy asks for.
        estimation: The policy's GPUs.
        gpus: How many of them.
        memory_factor: What outcomes have shown every need to be a multiple of.
    """
    if asked.train.fsdp:
        return None
    found = _Fitting(subject, asked, estimation, Layout(gpus), float(memory_factor)).result()
    if not found.fits:
        return None
    told = tuple(
        clamp.model_copy(update={"message": f"{clamp.message}; in shares (FSDP) a larger one fits, and ends too late"})
        if clamp.field == "lora.r"
        else clamp
        for clamp in found.clamps
    )
    return replace(found, clamps=told)


class _Fitting:
    """One look at a training in one layout."""

    def __init__(
        self, subject: Subject, asked: Settings, estimation: Estimation, layout: Layout, factor: float
    ) -> None:
        self.subject, self.asked, self.estimation = subject, asked, estimation
        self.layout, self.factor = layout, factor
        self.limit = whole(estimation.gpu_memory) * float(estimation.memory_fraction)
        self.volume = whole(estimation.checkpoint_volume) if estimation.checkpoint_volume is not None else None
        known = subject.shape is None or subject.shape.known
        self.margin = 0.0 if known else float(estimation.unknown_shape_margin)
        self.known = known
        self.lora = _for_structure(subject, asked.lora)
        self.useful = asked.lora.r
        if subject.shape is not None and known:
            self.useful = min(self.useful, max(subject.shape.rank_caps(self.lora.target_modules)))

    def result(self) -> Fit:
        """Return the fit with the largest rank and micro-batch that there is room for."""
        rank = self._rank()
        need, adapter = self._need(rank), self._adapter(rank)
        rows = need.largest_rows(self.limit)
        lacks_storage = rows > 0 and not self._has_room(rank)
        lora, train = self._lora(rank), self._train(need, max(1, rows), adapter)
        fits = rows > 0 and not lacks_storage
        return Fit(
            effective=Settings(lora=lora, train=train),
            clamps=self._clamps(rank, lora, train, need, adapter) if fits else (),
            layout=self.layout,
            peak=need.at(self._rows_at_once(train)),
            limit=self.limit,
            largest_rows=rows if fits else 0,
            known=self.known,
            checkpoint_bytes=checkpoint_bytes(self._stored(adapter), train.save_total_limit),
            lacks_storage=lacks_storage,
        )

    # The rank

    def _rank(self) -> int:
        """Return the largest rank up to the useful one that fits, or the least that is worth it."""
        useful, least = self.useful, min(self.useful, _LEAST_RANK)
        if self._holds(useful):
            return useful
        # The need grows with the rank, so the largest one that fits is found by halving the range.
        ranks = range(least, useful + 1)
        fitting = bisect_left(ranks, True, key=lambda rank: not self._holds(rank))
        return max(least, least + fitting - 1)

    def _holds(self, rank: int) -> bool:
        return self._need(rank).largest_rows(self.limit) > 0 and self._has_room(rank)

    def _has_room(self, rank: int) -> bool:
        """Tell whether the fewest checkpoints, and another one while it is written, fit their volume."""
        return self.volume is None or self._fewest(rank) <= self.volume

    def _fewest(self, rank: int) -> int:
        """Return the space of the fewest checkpoints that are kept, and of one that is written."""
        return checkpoint_bytes(self._stored(self._adapter(rank)), FEWEST_CHECKPOINTS)

    def _stored(self, adapter: int) -> int:
        """Return the parameters that checkpoints are sized for: more where the layers are only estimated."""
        return math.ceil(adapter * (1 + self.margin))

    def _pattern(self, rank: int) -> Ranks:
        """Return the ranks that are asked for single layers; they give way in proportion to the one for all."""
        return tuple((layer.module, max(1, layer.r * rank // self.useful)) for layer in self.lora.rank_pattern)

    def _adapter(self, rank: int) -> int:
        shape = self.subject.shape
        if shape is not None:
            # The trainer adapts all layers where it misses one of the listed names, which nobody knows of yet.
            targets = self.lora.target_modules if self.known else ALL_LINEAR
            return shape.adapter_parameters(rank, targets, pattern=self._pattern(rank))
        return rank * IMAGE_MODELS[self.subject.architecture or Architecture.SDXL].adapter_parameters_per_rank

    def _lora(self, rank: int) -> LoraSettings:
        """Return the settings with this rank and, as far as whole numbers go, the same scale."""
        lora, shape = self.lora, self.subject.shape
        pattern = dict(self._pattern(rank))
        if shape is not None and shape.known:
            ranks = shape.layer_ranks(rank, lora.target_modules, tuple(pattern.items()))
            pattern |= {name: own for name, own in ranks.items() if own != rank}
        changes: dict[str, object] = {}
        if pattern != {layer.module: layer.r for layer in lora.rank_pattern}:
            changes["rank_pattern"] = tuple(LayerRank(module=name, r=own) for name, own in pattern.items())
        if rank != lora.r:
            alpha = Decimal(_exact_alpha(lora, rank)).to_integral_value(ROUND_HALF_UP)
            changes |= {"r": rank, "lora_alpha": max(1, int(alpha))}
        return lora.model_copy(update=changes) if changes else lora

    # Memory

    def _need(self, rank: int) -> Need:
        subject, train, shape = self.subject, self.asked.train, self.subject.shape
        widest = max([rank, *(own for _, own in self._pattern(rank))])
        load = Load(
            task=subject.task,
            max_length=train.max_length,
            rank=widest,
            adapter_parameters=self._adapter(rank),
            dropout=self.lora.lora_dropout > 0,
            checkpointing=train.gradient_checkpointing,
            bf16=train.bf16,
            average=train.ema_decay is not None,
        )
        if shape is None:
            image = IMAGE_MODELS[subject.architecture or Architecture.SDXL]
            return image_need(image, subject.resolution, load, self.layout).scaled(self.factor)
        return text_need(shape, subject.parameters, load, self.layout, self.margin).scaled(self.factor)

    # The micro-batch

    @property
    def _row_tokens(self) -> int:
        """Tokens of the longest row; a preference pair is two sequences."""
        return self.asked.train.max_length * (2 if self.subject.task is TaskType.DPO else 1)

    def _rows_at_once(self, train: TrainSettings) -> int:
        """Return how many of the longest rows a micro-batch holds."""
        most = train.per_device_train_max_tokens
        rows = train.per_device_train_batch_size
        return rows if most is None or self.subject.shape is None else min(rows, max(1, most // self._row_tokens))

    def _train(self, need: Need, largest: int, adapter: int) -> TrainSettings:
        asked = self.asked.train
        changes: dict[str, object] = {"fsdp": self.layout.sharded}
        if self._rows_at_once(asked) > largest:
            if asked.per_device_train_max_tokens is not None and self.subject.shape is not None:
                changes["per_device_train_max_tokens"] = largest * self._row_tokens
            else:
                changes |= _batch(asked, largest)
        if asked.per_device_eval_batch_size is not None:
            changes["per_device_eval_batch_size"] = min(asked.per_device_eval_batch_size, largest)
        kept = max(FEWEST_CHECKPOINTS, asked.save_total_limit)
        if self.volume is not None:
            room = self.volume // (CHECKPOINT_BYTES * self._stored(adapter)) - 1
            kept = max(FEWEST_CHECKPOINTS, min(kept, room))
        changes["save_total_limit"] = kept
        changed = {name: value for name, value in changes.items() if getattr(asked, name) != value}
        return asked.model_copy(update=changed) if changed else asked

    # What is said

    def _clamps(
        self, rank: int, lora: LoraSettings, train: TrainSettings, need: Need, adapter: int
    ) -> tuple[Clamp, ...]:
        asked, subject = self.asked, self.subject
        what = "pictures" if subject.task is TaskType.IMAGE else f"rows of {train.max_length} tokens"
        literal = need.at(asked.train.per_device_train_batch_size)
        tokens = need.at(max(1, (asked.train.per_device_train_max_tokens or 0) // self._row_tokens))
        told = (
            rank_clamp(subject.shape, subject.parameters, self.lora, rank, self.useful, self._lack()),
            scale_clamp(asked.lora, lora, _exact_alpha(asked.lora, lora.r)),
            batch_clamp(asked.train, train, what, literal, self.limit),
            tokens_clamp(asked.train, train, tokens, self.limit),
            sharding_clamp(asked.train, train, self.layout.gpus, self._copy() if train.fsdp else ""),
            targets_clamp(asked.lora, lora, subject.structure.experts),
            dropout_clamp(asked.lora, lora),
            checkpoints_clamp(asked.train, train, self._stored(adapter), self.volume or 0),
            evaluation_batch_clamp(asked.train, train),
        )
        return tuple(clamp for clamp in told if clamp is not None)

    def _lack(self) -> str:
        """Say what has no room at the useful rank."""
        if self._need(self.useful).largest_rows(self.limit) == 0:
            return f"not even one row at a time fits {self.limit / GIB:.1f} GiB"
        volume = (self.volume or 0) / 1e9
        fewest = self._fewest(self.useful) / 1e9
        return f"the best checkpoint, the newest and one being written take {fewest:.0f} GB of {volume:.0f}"

    def _copy(self) -> str:
        """Say why a copy of the model on each GPU does not do."""
        copies = _Fitting(self.subject, self.asked, self.estimation, Layout(self.layout.gpus), self.factor)
        peak = copies._need(copies.useful).at(1) / GIB
        return (
            f"with a copy of the model on each GPU one row at r {copies.useful} needs {peak:.0f} GiB of "
            f"{self.limit / GIB:.1f}"
        )


def _for_structure(subject: Subject, lora: LoraSettings) -> LoraSettings:
    """Return the settings without what a model's structure cannot take: dropout on experts, names of other layers."""
    changes: dict[str, object] = {}
    if subject.structure.experts and lora.lora_dropout > 0:
        changes["lora_dropout"] = 0.0
    if lora.target_modules != ALL_LINEAR:
        listed = {name.strip() for name in lora.target_modules.split(",")}
        if subject.shape is None:
            lacking = not listed.isdisjoint(TEXT_LAYERS)
        else:
            lacking = subject.shape.known and not listed.issubset(name for name, _, _ in subject.shape.linears)
        if lacking or subject.structure.experts or subject.structure.other_layers:
            changes["target_modules"] = ALL_LINEAR
    return lora.model_copy(update=changes) if changes else lora


def _exact_alpha(lora: LoraSettings, rank: int) -> float:
    """Return the alpha with which alpha / r, or alpha / sqrt(r), stays."""
    return lora.lora_alpha * (math.sqrt(rank / lora.r) if lora.use_rslora else rank / lora.r)


def _batch(train: TrainSettings, largest: int) -> dict[str, object]:
    """Return a micro-batch that fits, and the accumulation that keeps the rows of a step.

    The largest divisor of the rows of a step is taken, so that these stay exactly. Where that leaves more than half of
    the memory unused (13 rows, of which 7 fit), the step is cut into as few micro-batches as can be, of equal size,
    and its rows are rounded up to fill the last one: 14, never more than one row for each micro-batch on top.
    """
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows = max(n for n in range(1, largest + 1) if per_step % n == 0)
    if 2 * rows < largest:
        rows = math.ceil(per_step / math.ceil(per_step / largest))
    if math.ceil(per_step / rows) > _MOST_ACCUMULATION:
        rows = largest
    steps = min(math.ceil(per_step / rows), _MOST_ACCUMULATION)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
