"""How much memory of a GPU a training takes at its peak, and the largest micro-batch that fits.

The formulas are closed and linear in the micro-batch, so that its largest value is an answer and not a search. They
were fitted to simulations of transformers, peft and trl on fake tensors: 15 model shapes, ranks up to 1024, with and
without dropout on the adapter; seven whole configurations agreed within -4 % and +9 %. What a real GPU adds to that
(allocator, kernels of other versions) is what a policy's memory fraction leaves room for.

All figures are bytes on one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from taskoffer.api.contract import DRAWN_PER_TRAINED
from taskoffer.api.tasks import TaskType
from taskoffer.api.v1alpha1.model_and_data import Architecture
from taskoffer.decision.architecture import ModelShape

GIB = 1024**3

_ADAPTER_BYTES = 16
"""Per adapter parameter: float32 weight and gradient, two moments of Adam."""
_AVERAGE_BYTES = 4
"""Per adapter parameter: the moving average of the weight, where one is kept."""
_FRAGMENTATION = 1.05
_CUDA_BYTES = 1.5 * GIB
_NCCL_BYTES = 1.0 * GIB
_CHUNK_TOKENS, _CHUNK_LOGITS = 4096, 8192
"""trl computes the loss in chunks; this is the size of the tile that is held at a time."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a training is spread over GPUs: each holds everything (DDP), or its share of the parameters (FSDP)."""

    gpus: int
    sharded: bool = False

    @property
    def name(self) -> str:
        """How people call it."""
        if self.gpus == 1:
            return "1 GPU"
        return f"{self.gpus} GPUs, {'FSDP' if self.sharded else 'DDP'}"


@dataclass(frozen=True, slots=True)
class Load:
    """What a training puts on a GPU, apart from how many rows at once. Without bf16 all is float32, twice as wide."""

    task: TaskType
    max_length: int
    rank: int
    adapter_parameters: int
    dropout: bool = False
    checkpointing: bool = True
    bf16: bool = True
    average: bool = False
    """Whether a moving average of the adapter is kept beside it."""

    @property
    def adapter_bytes(self) -> int:
        """What the adapter takes on a GPU that holds all of it."""
        return (_ADAPTER_BYTES + (_AVERAGE_BYTES if self.average else 0)) * self.adapter_parameters


@dataclass(frozen=True, slots=True)
class Need:
    """Peak memory of a GPU: what does not depend on the micro-batch, and what each of its rows adds."""

    weights: float
    adapter: float
    buffers: float
    """Gradient buckets of DDP, gathered layers of FSDP."""
    per_row: float
    fixed: float
    """CUDA context, libraries, and one tile of logits."""

    def at(self, rows: int) -> float:
        """Return the peak with this micro-batch, in bytes."""
        return (self.weights + self.adapter + self.buffers + rows * self.per_row) * _FRAGMENTATION + self.fixed

    def scaled(self, factor: float) -> Need:
        """Return the need with every part multiplied, as outcomes have shown it to be."""
        if factor == 1:
            return self
        parts = (self.weights, self.adapter, self.buffers, self.per_row, self.fixed)
        return Need(*(part * factor for part in parts))

    def largest_rows(self, limit: float) -> int:
        """Return the largest micro-batch whose peak stays within the limit; 0 when not even one row fits."""
        room = (limit - self.fixed) / _FRAGMENTATION - self.weights - self.adapter - self.buffers
        return max(0, int(room / self.per_row))


def text_need(shape: ModelShape, parameters: int, load: Load, layout: Layout, margin: float = 0.0) -> Need:
    """Return what a language model's training needs on each GPU.

    Args:
        shape: The model's layers and widths.
        parameters: The model's size, which may be a little more than its shape accounts for.
        load: Task, lengths and adapter.
        layout: GPUs, and whether the parameters are shared out among them.
        margin: What is added to all that follows from the shape, as a share of it.
    """
    share = layout.gpus if layout.sharded else 1
    adapter, dropout, guessed = load.adapter_parameters, load.dropout, 1 + margin
    # A preference pair is two sequences.
    tokens = load.max_length * (2 if load.task is TaskType.DPO else 1)
    layer = tokens * (
        (54 if dropout else 30) * shape.hidden
        + (24 if dropout else 16) * shape.intermediate
        + 2.3 * shape.key_value
        + 10 * load.rank
    )
    stored = tokens * 2 * shape.hidden * shape.layers if load.checkpointing else 0
    head = tokens * 8 * shape.hidden
    # Keys and values in bfloat16, over all layers.
    cache = 4 * shape.key_value * shape.layers * load.max_length if load.task is TaskType.GRPO else 0
    trained = stored + layer * (1 if load.checkpointing else shape.layers) + head
    # A step is drawn before any of it is trained, so the larger of both counts.
    per_row = max(trained, DRAWN_PER_TRAINED * cache)
    buffers = 0.0
    if layout.sharded:
        buffers = 4.0 * parameters / shape.layers
    elif layout.gpus > 1:
        buffers = 4.0 * adapter
    tile = _CHUNK_TOKENS * min(shape.vocabulary, _CHUNK_LOGITS) * 8
    width = 1 if load.bf16 else 2
    return Need(
        weights=2.0 * width * parameters / share,
        adapter=load.adapter_bytes * guessed / share,
        buffers=buffers * guessed,
        per_row=per_row * width * guessed,
        fixed=_CUDA_BYTES + (_NCCL_BYTES if layout.gpus > 1 else 0) + tile * _FRAGMENTATION,
    )


@dataclass(frozen=True, slots=True)
class ImageModel:
    """A diffusion model as far as memory and time depend on it."""

    parameters: int
    adapter_parameters_per_rank: int
    activation_bytes: float
    """Of one picture of 1024 x 1024, with gradient checkpointing."""
    forward_flops: float
    """Of one picture of 1024 x 1024."""


IMAGE_MODELS = {
    Architecture.SDXL: ImageModel(2_567_463_684, 2_616_320, 3.0 * GIB, 6.76e12),
    Architecture.FLUX: ImageModel(11_901_408_320, 4_085_760, 6.25 * GIB, 74.4e12),
}
"""Parameters, adapter parameters and FLOPs were counted on the meta device with diffusers 0.42; the adapter is on the
attention and feed-forward layers of the blocks, as the trainer puts it. The activations are an assumption (12 and
25 GiB for four pictures) that no GPU has confirmed yet."""


def image_need(model: ImageModel, resolution: int, load: Load, layout: Layout) -> Need:
    """Return what an image model's training needs on each GPU; ``resolution`` is the edge of a picture in pixels."""
    adapter, width = load.adapter_parameters, 1 if load.bf16 else 2
    return Need(
        weights=2.0 * width * model.parameters,
        adapter=load.adapter_bytes,
        buffers=4.0 * adapter if layout.gpus > 1 else 0.0,
        per_row=model.activation_bytes * width * (resolution / 1024) ** 2,
        fixed=_CUDA_BYTES + (_NCCL_BYTES if layout.gpus > 1 else 0),
    )
