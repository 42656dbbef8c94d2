"""LoRA settings that fit the model: no layer gets a rank that it cannot use, and every change is reported."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, LoraSettings, rank_cap
from taskoffer_trainer.failures import TrainerError

__all__ = ["LinearShape", "RankPlan", "linear_shapes", "lora_config", "plan_ranks"]


@dataclass(frozen=True)
class LinearShape:
    """Name and dimensions of one linear layer."""

    name: str
    in_features: int
    out_features: int

    @property
    def suffix(self) -> str:
        """Last part of the name, which is the same in every block of the model."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class RankPlan:
    """Patterns for PEFT's ``rank_pattern`` and ``alpha_pattern``, and what was changed."""

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    clamps: tuple[Clamp, ...]


def linear_shapes(model: Any, target_modules: str) -> list[LinearShape]:
    """List the linear layers that will be adapted: all but the output layer, or those with the given names.

    Raises:
        TrainerError: ``BAD_CONFIG`` when a name fits no layer, with the names that exist.
    """
    import torch

    head = model.get_output_embeddings()
    shapes = [
        LinearShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    if target_modules == "all-linear":
        return shapes
    chosen = []
    for wanted in _names(target_modules):
        matching = [one for one in shapes if one.name == wanted or one.name.endswith(f".{wanted}")]
        if not matching:
            there = ", ".join(sorted({one.suffix for one in shapes}))
            raise TrainerError(
                ExitCode.BAD_CONFIG,
                "TargetModuleMissing",
                f"lora.targetModules: no linear layer is called {wanted!r}; this model has {there}",
            )
        chosen += matching
    return chosen


def _names(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",") if name.strip()]


def plan_ranks(shapes: list[LinearShape], lora: LoraSettings) -> RankPlan:
    """Clamp the rank of each layer to :func:`taskoffer.api.contract.rank_cap` and keep the layer's scale.

    PEFT scales by alpha / r (alpha / sqrt(r) with rsLoRA), so a smaller rank needs a smaller alpha, else the
    layer's learning rate jumps in effect. Layers with the same last name and shape share one pattern.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    clamps = []
    by_suffix: dict[str, list[LinearShape]] = {}
    for shape in shapes:
        by_suffix.setdefault(shape.suffix, []).append(shape)
    for suffix, members in sorted(by_suffix.items()):
        caps = {rank_cap(one.in_features, one.out_features) for one in members}
        # One pattern for all when every block has the same shape there, else one for each layer.
        groups = [(suffix, members[:1])] if len(caps) == 1 else [(one.name, [one]) for one in members]
        for label, (shape, *_) in groups:
            cap = rank_cap(shape.in_features, shape.out_features)
            if lora.r <= cap:
                continue
            share = math.sqrt(cap / lora.r) if lora.use_rslora else cap / lora.r
            ranks[re.escape(label)] = cap
            alphas[re.escape(label)] = lora.lora_alpha * share
            clamps.append(
                Clamp(
                    field=f"lora.r[{label}]"[:128],
                    requested=str(lora.r),
                    effective=str(cap),
                    reason="RankClamped",
                    message=f"A {shape.in_features} x {shape.out_features} layer has no use for a greater "
                    "rank; its alpha is scaled along.",
                )
            )
    return RankPlan(ranks, alphas, tuple(clamps))


def _experts(config: Any) -> int:
    """Return the number of experts of a mixture-of-experts model, else 0."""
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_local_experts", "n_routed_experts", "num_experts"))
    return max((int(count) for count in counts if count), default=0)


def lora_config(model: Any, lora: LoraSettings) -> tuple[Any, tuple[Clamp, ...]]:
    """Build PEFT's LoraConfig for a model, and say what could not be taken literally.

    Raises:
        TrainerError: ``BAD_CONFIG`` when a target module does not exist.
    """
    from peft import LoraConfig, TaskType

    plan = plan_ranks(linear_shapes(model, lora.target_modules), lora)
    clamps = plan.clamps
    dropout = lora.lora_dropout
    if dropout and _experts(model.config) > 1:
        clamps += (
            Clamp(
                field="lora.loraDropout",
                requested=str(dropout),
                effective="0",
                reason="DropoutUnsupported",
                message="Adapters on the experts of a mixture-of-experts model cannot have dropout.",
            ),
        )
        dropout = 0.0
    everything = lora.target_modules == "all-linear"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=dropout,
        use_rslora=lora.use_rslora,
        target_modules="all-linear" if everything else _names(lora.target_modules),
        rank_pattern=plan.rank_pattern,
        alpha_pattern=plan.alpha_pattern,
    )
    return config, clamps
