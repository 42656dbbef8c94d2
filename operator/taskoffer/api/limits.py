"""Bounds that the operator and the trainer apply alike: to held-out rows, to rows in all, to ranks, to checkpoints."""

from __future__ import annotations

__all__ = [
    "CHECKPOINT_BYTES",
    "EVAL_FRACTION",
    "EVAL_ROWS_MAX",
    "FEWEST_CHECKPOINTS",
    "MIN_ROWS",
    "checkpoint_bytes",
    "evaluated_rows_cap",
    "rank_cap",
]

EVAL_FRACTION = 0.1
"""Share of the rows that is held out for evaluation."""

MIN_ROWS = 8
"""Fewest usable rows that are trained on unless an offer says otherwise: one or two of them are held out."""

EVAL_ROWS_MAX = 400
"""Most rows that are held out, as the task market does."""

FEWEST_CHECKPOINTS = 2
"""Fewest checkpoints that are kept, whatever is asked for: the best and the newest."""

CHECKPOINT_BYTES = 16
"""Per adapter parameter in a checkpoint: 4.1 of weights and 8.7 of Adam's state were measured, 3.2 are left for an
average and the rest."""


def checkpoint_bytes(adapter_parameters: int, kept: int) -> int:
    """Return the space that checkpoints take: those that are kept, and one more while it is being written.

    At least :data:`FEWEST_CHECKPOINTS` are kept. The operator plans with it; the trainer asks for no more.
    """
    return (max(FEWEST_CHECKPOINTS, kept) + 1) * CHECKPOINT_BYTES * adapter_parameters


def rank_cap(in_features: int, out_features: int) -> int:
    """Return the largest useful LoRA rank of a linear layer: floor(0.5 * in * out / (in + out)), at least 1.

    At rank in*out/(in+out) the two adapter matrices have as many parameters as the layer itself; half of that
    is the point where LoRA still saves something. Both the operator and the trainer apply this one function.

    Raises:
        ValueError: when a dimension is not positive.
    """
    if in_features < 1 or out_features < 1:
        raise ValueError(f"layer dimensions must be positive, got {in_features} x {out_features}")
    return max(1, (in_features * out_features) // (2 * (in_features + out_features)))


def evaluated_rows_cap(eval_steps: int, global_batch: int) -> int:
    """Return how many rows an evaluation may have, at least 1: floor(0.1 * eval_steps * global_batch * 3).

    A row takes in an evaluation about a third of the time that it takes in a step, where it goes forward, and twice
    as long backward. So evaluations of that many rows take at most a tenth of the time. Both the operator and the
    trainer apply this one function.

    Raises:
        ValueError: when an argument is not positive.
    """
    if eval_steps < 1 or global_batch < 1:
        raise ValueError(f"steps and rows must be positive, got {eval_steps} steps of {global_batch} rows")
    return max(1, eval_steps * global_batch * 3 // 10)
