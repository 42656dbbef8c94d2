"""Short rows packed into full sequences, where attention is not one of the flash kernels."""

from __future__ import annotations

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

__all__ = ["PackedRows"]


class PackedRows:
    """Collates packed sequences, each a row of its own.

    TRL lays all sequences of a batch end to end, which the flash kernels take as it is. For other kinds of attention
    that is one sequence as long as all together, whose mask grows with the square of that.

    Nothing of a sequence sees what it was packed with: transformers builds the mask from the positions, which begin
    anew with each row, and does so only where no other mask is given.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, return_position_ids=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels`` and ``position_ids``, each of rows x longest row."""
        batch: dict[str, Any] = dict(self._collate(rows))
        del batch["attention_mask"]
        # No token of the row before predicts the first one of a row.
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch
