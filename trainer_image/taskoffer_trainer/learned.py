"""Tells whether an adapter has learned anything.

Of each pair of matrices the second begins as zero (Hu et al. 2021, arXiv:2106.09685, section 4.1), and the adapter
changes the model by their product: as long as every second matrix is zero, it changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["NOTHING_LEARNED", "has_learned", "has_moved"]

NOTHING_LEARNED = "NothingLearned"
"""Every second matrix of the adapter is zero (exit code 74)."""
_SECOND = (".lora_B.", ".lora_up.", ".lora.up.")
"""What marks the second matrix in the names of PEFT and diffusers, of kohya's scripts, and of old."""


def has_learned(weights: Path) -> bool:
    """Tell whether a file of weights holds a second matrix that is not zero; read up to the first of them."""
    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary.
            if any(mark in name for mark in _SECOND) and _is_something(weights, file, name):
                return True
    return False


def _is_something(weights: Path, file: Any, name: str) -> bool:
    if file.get_slice(name).get_dtype() in ("F64", "F32", "F16"):
        return bool(file.get_tensor(name).any())
    # numpy has no bfloat16 and nothing below it; torch, which has, takes seconds to import.
    from safetensors import safe_open

    with safe_open(weights, framework="pt", device="cpu") as again:
        return bool(again.get_tensor(name).float().count_nonzero())


def has_moved(model: Any) -> bool:
    """Tell whether a model's adapter has learned anything; of one that is shared out, the part that is here."""
    from taskoffer_trainer.sharding import local

    return any(
        bool(local(parameter.detach()).count_nonzero())
        for name, parameter in model.named_parameters()
        if any(mark in name for mark in _SECOND)
    )
