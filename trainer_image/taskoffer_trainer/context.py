"""How long a text a language model takes in, and YaRN, which stretches that; read from the model's own settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import ExitCode, RunConfig, TaskType
from taskoffer_trainer.failures import TrainerError

__all__ = ["Context", "context_of", "positions_of", "stretched", "yarn"]

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
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


def positions_of(settings: Any) -> int | None:
    """Return the longest text in tokens that a loaded model's settings (``model.config``) state."""
    return _first(lambda name: getattr(settings, name, None))


def context_of(config: RunConfig) -> Context:
    """Return what the base model of a run takes in; needs only its ``config.json``.

    A model that was stretched by the asked factor before it was published (its settings say ``yarn`` and that factor)
    is taken as it is.

    Raises:
        TrainerError: ``BAD_CONFIG`` when YaRN is asked for a model that cannot have it.
    """
    if config.task_type is TaskType.IMAGE:
        return Context()
    said = _said(Path(config.model.path) / "config.json")
    positions, factor = _first(said.get), config.model.yarn_factor
    if factor is None:
        return Context(positions if positions is not None else _first(_inner(said).get))
    if positions is None:
        raise _no_yarn(config, "does not say how many positions it has")
    scaling = said.get("rope_scaling") or said.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "yarn" and scaling.get("factor") == factor:
        return Context(positions)
    if kind != "default":
        raise _no_yarn(config, f"has positions that are scaled already, by {kind} with factor {scaling.get('factor')}")
    return Context(positions * factor, positions)


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


def _inner(said: dict[str, Any]) -> dict[str, Any]:
    inner = said.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _first(find: Any) -> int | None:
    for name in _LENGTHS:
        found = find(name)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _no_yarn(config: RunConfig, why: str) -> TrainerError:
    return TrainerError(
        ExitCode.BAD_CONFIG,
        "ConfigInvalid",
        f"model.yarnFactor: {config.model.name} {why}, so that YaRN cannot stretch it; leave yarnFactor out",
    )
