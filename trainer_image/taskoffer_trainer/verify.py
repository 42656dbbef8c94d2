"""Verifies an adapter as its user will meet it: from disk, on a base model that was loaded afresh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.checkpoints import ADAPTER_FILE, check_adapter
from taskoffer_trainer.failures import TrainerError

__all__ = ["TOLERANCE", "Verified", "check_answers", "check_figures", "check_repeated", "load_adapter", "verify_failed"]

TOLERANCE = 0.02
"""How far what is compared (a loss, a log-probability) may be from what it was in training, as a share of it."""
REPEATED, ROUNDING = 0.005, 0.0005
"""The same for a loss whose noise is fixed, so that nothing but rounding moves it: at most, and at least. In bfloat16 a
value is off by up to 2^-9, as often up as down, and a loss is the mean of thousands."""
_OF_THE_CHANGE = 0.25
"""Share of what the training has changed that the loss may be off by: an adapter that has no effect is off by all."""


@dataclass(frozen=True)
class Verified:
    """What the verification measured."""

    figures: dict[str, float]
    answers: list[str]
    parameters: int

    @property
    def eval_loss(self) -> float:
        """The figure that was to become smaller."""
        return self.figures["eval_loss"]


def verify_failed(message: str) -> TrainerError:
    """Build the error for a result that cannot be handed over."""
    return TrainerError(ExitCode.VERIFY_FAILED, "VerifyFailed", f"the adapter did not pass verification: {message}")


def load_adapter(folder: Path, base: Any, expected_tensors: int) -> tuple[Any, int]:
    """Load an adapter from disk onto a fresh base model and check that it arrives there as it is.

    Args:
        folder: the adapter on disk.
        base: the base model, just loaded.
        expected_tensors: number of tensors that the file must hold.

    Returns:
        The model with its adapter, and the adapter's parameters.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what did not pass.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        parameters = check_adapter(folder, expected_tensors)
    except (ValueError, OSError) as error:
        raise verify_failed(str(error)) from error
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise verify_failed(f"it cannot be loaded: {error}") from error
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in load_file(folder / ADAPTER_FILE).items():
        if name not in loaded or not torch.equal(loaded[name].cpu().to(tensor.dtype), tensor):
            raise verify_failed(f"tensor {name} is not in the loaded model as it is on disk")
    return model, parameters


def check_figures(figures: dict[str, float], measured: float | None) -> None:
    """Compare what an adapter does after loading with what it did in training.

    Args:
        figures: measured on the loaded model.
        measured: ``eval_loss`` of these weights during training, where it was measured.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    loss = figures["eval_loss"]
    if not math.isfinite(loss):
        raise verify_failed(f"its held-out loss is {loss}")
    if measured is not None and abs(loss - measured) > TOLERANCE * max(abs(measured), 1.0):
        raise verify_failed(f"its held-out loss is {loss:.4f} after loading, and was {measured:.4f} in training")


def check_repeated(loss: float, measured: float | None, before: float | None) -> None:
    """Compare a loss whose noise is fixed with the one of the same weights in training, and be strict.

    Losses of pictures are near 0.1, and a good adapter lowers them by a few percent, so that an adapter which did not
    arrive could pass for one that did.

    Args:
        loss: measured on the loaded model.
        measured: the loss of these weights during training, where it was measured.
        before: the loss of the base model, where it is known.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    if not math.isfinite(loss):
        raise verify_failed(f"its held-out loss is {loss}")
    if measured is None:
        return
    allowed = REPEATED * abs(measured)
    if before is not None:
        allowed = max(ROUNDING * abs(measured), min(allowed, _OF_THE_CHANGE * abs(before - measured)))
    if abs(loss - measured) > allowed:
        base = f"; the base model's is {before:.6f}" if before is not None else ""
        raise verify_failed(
            f"its held-out loss is {loss:.6f} after loading, and was {measured:.6f} in training with the same noise, "
            f"off by {abs(loss - measured):.6f} where {allowed:.6f} is allowed{base}"
        )


def check_answers(texts: list[str], before: list[str]) -> None:
    """Refuse an adapter that silences its model.

    A base model may have nothing to say to the prompts either: it ends at once, or with blank lines, where it was never
    taught to answer. Then the answers say nothing of the adapter.

    Args:
        texts: what the model answers with the adapter.
        before: what it answers without.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    if any(before) and not any(texts):
        said = sum(map(bool, before))
        raise verify_failed(
            f"it answers none of {len(texts)} prompts with any text, and its base model answers {said} of them"
        )
