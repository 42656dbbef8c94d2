"""How long a text a language model takes in, and YaRN, which stretches that; read from the model's own settings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, GRPOSettings, RunConfig, TaskType
from taskoffer_trainer.failures import TrainerError

__all__ = ["Context", "context_of", "stretched", "within_context", "yarn"]

_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What model families call the number of positions in ``config.json``: most, GPT-2 and its kin, MPT."""


@dataclass(frozen=True)
class Context:
    """What a model takes in.

    Attributes:
        positions: tokens of the longest text, after stretching; None where the model does not say it, as those whose
            positions are distances (ALiBi).
        original: the same before stretching, where this trainer has to stretch it; else None.
    """

    positions: int | None = None
    original: int | None = None


def context_of(config: RunConfig) -> Context:
    """Return what the base model of a run takes in; needs only its ``config.json``.

    A model whose rotary positions are stretched by its own settings takes in what they say: the factor times the
    original number. One that was stretched by the asked factor before it was published is taken as it is.

    Raises:
        TrainerError: ``BAD_CONFIG`` when YaRN is asked for a model that cannot have it.
    """
    if config.task_type is TaskType.IMAGE:
        return Context()
    said, factor = _said(Path(config.model.path) / "config.json"), config.model.yarn_factor
    positions = _positions(said)
    if factor is None:
        return Context(positions)
    if positions is None:
        raise _no_yarn(config, "does not say how many positions it has")
    for scaling in _scalings(said):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "yarn" and scaling.get("factor") == factor:
            return Context(positions)
        if kind != "default":
            scale = scaling.get("factor")
            raise _no_yarn(config, f"has positions that are scaled already, by {kind} with factor {scale}")
    return Context(positions * factor, positions)


def within_context(config: RunConfig) -> tuple[RunConfig, tuple[Clamp, ...]]:
    """Cut rows where the model's positions end.

    A model with learned positions has none behind them: on a CPU the lookup fails, on a GPU it takes the process along.
    One with rotary positions goes on, and learns from what it cannot tell apart.

    Raises:
        TrainerError: as :func:`context_of`.
    """
    train, positions = config.train, context_of(config).positions
    if positions is None or train.max_length <= positions:
        return config, ()
    message = f"{config.model.name} was made for texts of at most {positions} tokens (its config.json)."
    clamps = [_clamp("train.maxLength", train.max_length, positions, message)]
    update: dict[str, Any] = {"max_length": positions}
    drawing = train.grpo or GRPOSettings()
    if config.task_type is TaskType.GRPO and drawing.max_completion_length >= positions:
        asked, half = drawing.max_completion_length, max(1, positions // 2)
        clamps.append(_clamp("train.grpo.maxCompletionLength", asked, half, f"{message} Half are left to the prompt."))
        update["grpo"] = drawing.model_copy(update={"max_completion_length": half})
    return config.model_copy(update={"train": train.model_copy(update=update)}), tuple(clamps)


def _clamp(field: str, requested: int, effective: int, message: str) -> Clamp:
    said = message if len(message) <= 512 else message[:509] + "..."
    return Clamp(field=field, requested=str(requested), effective=str(effective), reason="LengthClamped", message=said)


def stretched(config: RunConfig) -> Any:
    """Return the settings to load the base model with where YaRN is to stretch it, else None.

    They are those that the paper (arXiv 2309.00071) and transformers' rotary embeddings take: the factor, and the
    positions that the model was trained with.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the model has no rotary positions.
    """
    from transformers import AutoConfig

    context = context_of(config)
    if context.original is None:
        return None
    settings = AutoConfig.from_pretrained(config.model.path, local_files_only=True, trust_remote_code=False)
    rotary = getattr(settings, "rope_parameters", None)
    if not isinstance(rotary, dict) or "rope_type" not in rotary:
        raise _no_yarn(config, "has no rotary positions, or different ones in different layers")
    # The settings' own attribute is called otherwise in some families; transformers maps this name to it.
    settings.max_position_embeddings = context.positions
    settings.rope_parameters = {**rotary, **yarn(config, context.original)}
    return settings


def yarn(config: RunConfig, original: int) -> dict[str, Any]:
    """Return what YaRN adds to a model's ``rope_parameters``."""
    factor = float(config.model.yarn_factor or 1)
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def _said(file: Path) -> dict[str, Any]:
    """Return a model's settings; what is missing or broken is said by who loads the model."""
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _of_text(said: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model in one that also takes in other things."""
    inner = said.get("text_config")
    return inner if isinstance(inner, dict) else said


def _positions(said: dict[str, Any]) -> int | None:
    text = _of_text(said)
    own = next((int(number) for name in _LENGTHS if (number := _positive(text.get(name)))), None)
    if own is None:
        return None
    scaled = [
        factor * (_positive(scaling.get("original_max_position_embeddings")) or own)
        for scaling in _scalings(said)
        if (factor := _positive(scaling.get("factor")))
    ]
    return math.floor(max([own, *scaled]))


def _scalings(said: dict[str, Any]) -> list[dict[str, Any]]:
    """Return how rotary positions are stretched; the models of some families say it for each kind of layer."""
    text = _of_text(said)
    found = [one for name in ("rope_scaling", "rope_parameters") if isinstance(one := text.get(name), dict)]
    return [*found, *(one for scaling in found for one in scaling.values() if isinstance(one, dict))]


def _positive(value: Any) -> float | None:
    usual = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if usual and 0 < value < math.inf else None


def _no_yarn(config: RunConfig, why: str) -> TrainerError:
    return TrainerError(
        ExitCode.BAD_CONFIG,
        "ConfigInvalid",
        f"model.yarnFactor: {config.model.name} {why}, so that YaRN cannot stretch it; leave yarnFactor out",
    )
