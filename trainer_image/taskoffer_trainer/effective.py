"""The settings that an attempt really runs with: those of the run, in the form that this pod can bear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import Clamp, RunConfig, evaluated_rows_cap
from taskoffer_trainer.attention import attention_in_use
from taskoffer_trainer.config import global_batch
from taskoffer_trainer.context import within_context
from taskoffer_trainer.fallback import keeps_attention, lowered, profile_of
from taskoffer_trainer.pod import pod_cpus

__all__ = ["Effective", "effective", "in_force"]

_MOST_LOADERS = 16
"""Processes per GPU beyond which loading gets no faster; the first strategy document asks for 16."""
_MOST_AHEAD = 4
"""Steps that a loading process prepares ahead. 16 processes with 8 each would hold 128 in shared memory."""


@dataclass(frozen=True)
class Effective:
    """Settings, the fallback profile that they belong to, and what was changed of those that were asked for."""

    config: RunConfig
    profile: int
    clamps: tuple[Clamp, ...]


def effective(config: RunConfig, cpus: float | None = None) -> Effective:
    """Return what this attempt runs with. The same in every process of a pod, and needs none of the heavy libraries.

    Args:
        config: what was asked for; what checkpoints belong to is said in terms of it.
        cpus: CPUs of the pod; found out when absent.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the model cannot be stretched as is asked for.
    """
    profile = profile_of(config)
    lower, fallbacks = lowered(config, profile, keeps_attention(config))
    lower, loaders = _loaders(lower, pod_cpus() if cpus is None else cpus)
    lower, evaluation = _evaluation(lower)
    lower, context = within_context(lower)
    return Effective(lower, profile, (*fallbacks, *loaders, *evaluation, *context))


def in_force(config: RunConfig, profile: int, model: Any) -> dict[str, str]:
    """Return how each technique is done, by the name of its setting, now that the model is loaded."""
    train, factor = config.train, config.model.yarn_factor
    stretched = {"yarnFactor": str(factor)} if factor is not None else {}
    return {
        "attnImplementation": attention_in_use(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torchCompile": _switch(train.torch_compile),
        "gradientCheckpointing": _switch(train.gradient_checkpointing),
        "optim": train.optim,
        "dataloaderNumWorkers": str(train.dataloader_num_workers),
        "saveTotalLimit": str(train.save_total_limit),
        "fallbackProfile": str(profile),
        **stretched,
    }


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _loaders(config: RunConfig, cpus: float) -> tuple[RunConfig, tuple[Clamp, ...]]:
    """Give each loading process a CPU of the pod, and few steps to prepare ahead."""
    train, clamps = config.train, []
    asked, ahead = train.dataloader_num_workers, train.dataloader_prefetch_factor
    room = min(_MOST_LOADERS, max(1, int(cpus / config.gpus)))
    workers = min(asked, room)
    if workers < asked:
        message = f"The pod has {cpus:g} CPUs for {config.gpus} training process(es)."
        clamps.append(_clamp("train.dataloaderNumWorkers", asked, workers, "LoadersClamped", message))
    prefetch = None if ahead is None or not workers else min(ahead, _MOST_AHEAD)
    if prefetch != ahead:
        message = f"{workers} process(es) prepare the rows of {prefetch or 'no'} steps ahead."
        clamps.append(_clamp("train.dataloaderPrefetchFactor", ahead, prefetch or "none", "LoadersClamped", message))
    update = {"dataloader_num_workers": workers, "dataloader_prefetch_factor": prefetch}
    return config.model_copy(update={"train": train.model_copy(update=update)}), tuple(clamps)


def _evaluation(config: RunConfig) -> tuple[RunConfig, tuple[Clamp, ...]]:
    """Hold out no more rows than a tenth of the time is enough for."""
    train, data = config.train, config.data
    asked = min(data.eval_rows_max, train.eval_rows_max or data.eval_rows_max)
    most = min(asked, evaluated_rows_cap(train.eval_steps, global_batch(config)))
    config = config.model_copy(update={"data": data.model_copy(update={"eval_rows_max": most})})
    if most == asked:
        return config, ()
    message = f"An evaluation every {train.eval_steps} steps of {global_batch(config)} rows takes a tenth of the time."
    return config, (_clamp("data.evalRowsMax", asked, most, "EvaluationClamped", message),)


def _clamp(field: str, requested: object, effective: object, reason: str, message: str) -> Clamp:
    return Clamp(field=field, requested=str(requested), effective=str(effective), reason=reason, message=message)
