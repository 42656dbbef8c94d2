"""Verifies an adapter as its user will meet it: from disk, on a base model that was loaded afresh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.checkpoints import ADAPTER_FILE, check_adapter
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.held_out import answers, held_out_loss
from taskoffer_trainer.tokens import TokenRow

__all__ = ["Verified", "verify_adapter"]

TOLERANCE = 0.02
"""How far the loss may be from the one measured in training, as a share of it."""


@dataclass(frozen=True)
class Verified:
    """What the verification measured."""

    eval_loss: float
    answers: list[str]
    parameters: int


def _failed(message: str) -> TrainerError:
    return TrainerError(ExitCode.VERIFY_FAILED, "VerifyFailed", f"the adapter did not pass verification: {message}")


def verify_adapter(
    folder: Path,
    base: Any,
    tokenizer: Any,
    batches: Sequence[Sequence[TokenRow]],
    prompts: Sequence[str],
    expected_tensors: int,
    measured: float | None,
    between: Callable[[], None],
) -> Verified:
    """Load an adapter onto a fresh base model and check it.

    Args:
        folder: the adapter on disk.
        base: the base model, just loaded.
        tokenizer: its tokenizer.
        batches: the held-out rows.
        prompts: what to answer; at least one answer must have text.
        expected_tensors: number of tensors that the file must hold.
        measured: the held-out loss of these weights during training, where it was measured.
        between: called between pieces of work; may raise to leave early.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what did not pass.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from trl.trainer.utils import add_fused_lm_head

    try:
        parameters = check_adapter(folder, expected_tensors)
    except (ValueError, OSError) as error:
        raise _failed(str(error)) from error
    between()
    add_fused_lm_head(base)
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _failed(f"it cannot be loaded: {error}") from error
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in load_file(folder / ADAPTER_FILE).items():
        if name not in loaded or not torch.equal(loaded[name].cpu().to(tensor.dtype), tensor):
            raise _failed(f"tensor {name} is not in the loaded model as it is on disk")
    loss = held_out_loss(model, batches, tokenizer.pad_token_id, between)
    if not math.isfinite(loss):
        raise _failed(f"its held-out loss is {loss}")
    if measured is not None and abs(loss - measured) > TOLERANCE * max(measured, 1.0):
        raise _failed(f"its held-out loss is {loss:.4f} after loading, and was {measured:.4f} in training")
    texts = answers(model, tokenizer, prompts, between)
    if not any(texts):
        raise _failed(f"it answers none of {len(texts)} prompts with any text")
    return Verified(loss, texts, parameters)
