"""torch.compile for as long as it pays: each new size of a piece may compile the model once more."""

from __future__ import annotations

from typing import Any

import torch

from taskoffer.api.contract import Clamp, ExitCode
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fallback import COMPILE_FAILED

__all__ = ["Compiling", "compile_failed"]


class Compiling:
    """Hands out the compiled model, and the plain one once the size of the pieces has changed too often."""

    LIMIT = 3
    """Changes after which the model is no longer compiled; measured on a tiny model, a change cost 23 s."""

    def __init__(self) -> None:
        self.changes = 0
        self._size: int | None = None

    @property
    def given_up(self) -> bool:
        """Whether the plain model is used from now on."""
        return self.changes >= self.LIMIT

    def choose(self, model: Any, rows_at_once: int) -> Any:
        """Return the model for a step in which so many rows go through it at once."""
        if self._size is not None and rows_at_once != self._size:
            self.changes += 1
        self._size = rows_at_once
        return getattr(model, "_orig_mod", model) if self.given_up else model

    def clamp(self) -> Clamp | None:
        """Say that the model is no longer compiled, where that is so."""
        if not self.given_up:
            return None
        message = f"The rows at once have changed {self.changes} times; each change may compile it again."
        return Clamp(
            field="train.torchCompile", requested="true", effective="false", reason="CompileOff", message=message
        )


def compile_failed(error: Exception) -> TrainerError | None:
    """Return the failure that a compiler's error stands for; ``None`` for errors of other kinds."""
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return None
    return TrainerError(
        ExitCode.RESTART,
        COMPILE_FAILED,
        f"train.torchCompile: the model cannot be compiled, the next attempt does without: {error}"[:1000],
    )
