"""How many tokens a model can take in a row, by its ``config.json``. Needs no heavy library."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, GRPOSettings, RunConfig, TaskType
from taskoffer_trainer.failures import TrainerError

__all__ = ["context_of", "within_context"]


def context_of(folder: Path) -> int | None:
    """Return the longest row that a language model was made for, in tokens, or ``None`` where it does not say.

    A model with rotary positions can be told to stretch them (``rope_scaling``, since transformers 5
    ``rope_parameters``): by its factor, over the original number where that is said.
    """
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    inner = said.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else said
    # GPT-2, GPT-J and their kin have their own words for it.
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    positions = next((number for name in names if (number := _positive(text.get(name)))), None)
    if positions is None:
        return None
    return math.floor(max([positions, *_stretched(text, positions)]))


def _stretched(text: dict[str, Any], positions: float) -> list[float]:
    """Return what the positions are stretched to; the models of some families say it for each kind of layer."""
    said = [text.get(name) for name in ("rope_scaling", "rope_parameters")]
    scalings = [one for one in said if isinstance(one, dict)]
    scalings += [one for scaling in scalings for one in scaling.values() if isinstance(one, dict)]
    found = []
    for scaling in scalings:
        factor = _positive(scaling.get("factor"))
        if factor is not None:
            found.append(factor * (_positive(scaling.get("original_max_position_embeddings")) or positions))
    return found


def _positive(value: Any) -> float | None:
    usual = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if usual and 0 < value < math.inf else None


def within_context(config: RunConfig) -> tuple[RunConfig, tuple[Clamp, ...]]:
    """Let no row be longer than the model can take.

    Beyond that a model with learned positions fails, and one with rotary positions learns from what it cannot tell
    apart.

    Raises:
        TrainerError: ``BAD_CONFIG`` when completions leave no room for a prompt.
    """
    train = config.train
    most = None if config.task_type is TaskType.IMAGE else context_of(Path(config.model.path))
    if most is None or most >= train.max_length:
        return config, ()
    completion = (train.grpo or GRPOSettings()).max_completion_length
    if config.task_type is TaskType.GRPO and completion >= most:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"train.grpo.maxCompletionLength: {completion} tokens leave no room for a prompt in the {most} that "
            f"{config.model.name} can take; set it lower",
        )
    clamp = Clamp(
        field="train.maxLength",
        requested=str(train.max_length),
        effective=str(most),
        reason="ContextClamped",
        message=f"{config.model.name} was made for rows of at most {most} tokens (its config.json)."[:512],
    )
    return config.model_copy(update={"train": train.model_copy(update={"max_length": most})}), (clamp,)
