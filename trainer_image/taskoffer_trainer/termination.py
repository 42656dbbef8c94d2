"""Writes the termination message: what the kubelet copies into the status of the container."""

from __future__ import annotations

import json
import os
from pathlib import Path

from taskoffer.api.contract import MAX_TERMINATION_BYTES, TERMINATION_LOG, Termination

__all__ = ["encode_termination", "write_termination"]

MAX_MESSAGE = 1024


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """Cut a text in the middle, where it says least, so that it has at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - 5 - head) :]}"


def encode_termination(termination: Termination, limit: int = MAX_TERMINATION_BYTES) -> bytes:
    """Encode as JSON of at most ``limit`` bytes: clamps go first, then the message is cut, then figures go.

    Raises:
        ValueError: when even the shortest form is longer than ``limit``.
    """
    total, said = len(termination.clamps), termination.message
    while True:
        data = json.dumps(termination.to_wire(), ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= limit:
            return data
        if termination.clamps:
            keep = len(termination.clamps) * 3 // 4
            note = f" ({total - keep} of {total} clamps left out)"
            message = shorten(said, MAX_MESSAGE - len(note)) + note
            termination = termination.model_copy(update={"clamps": termination.clamps[:keep], "message": message})
        elif len(termination.message) > 16:
            shorter = shorten(termination.message, len(termination.message) * 3 // 4)
            termination = termination.model_copy(update={"message": shorter})
        elif termination.figures_before or termination.figures_after:
            termination = termination.model_copy(update={"figures_before": (), "figures_after": ()})
        elif termination.adapter_dir is not None:
            termination = termination.model_copy(update={"adapter_dir": None})
        else:
            raise ValueError(f"a termination of {len(data)} bytes cannot be cut to {limit} bytes")


def write_termination(termination: Termination) -> Path | None:
    """Write the termination message and return its path, or ``None`` where there is no place for it.

    Where it cannot be written that is told: the exit code says more than the one of a program that failed over it.

    The file is the kubelet's, which mounts it before the container starts. Outside of a pod it is absent and
    is not created; ``TASKOFFER_TERMINATION_LOG`` names another file.
    """
    override = os.environ.get("TASKOFFER_TERMINATION_LOG")
    path = Path(override or TERMINATION_LOG)
    if override is None and not path.exists():
        return None
    try:
        path.write_bytes(encode_termination(termination))
    except OSError as error:
        print(f"trainer: {path} could not be written: {error}", flush=True)
        return None
    return path
