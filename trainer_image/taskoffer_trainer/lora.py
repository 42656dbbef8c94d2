"""LoRA settings that fit the model: no layer gets a rank that it cannot use, and every change is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, LoraSettings, rank_cap
from taskoffer_trainer.failures import TrainerError

__all__ = [
    "LinearShape",
    "RankPlan",
    "expert_shapes",
    "linear_shapes",
    "lora_config",
    "plan_ranks",
    "with_targets_of",
]

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output layer."""


@dataclass(frozen=True)
class LinearShape:
    """Name and dimensions of one linear layer, or of the layers of all experts where they are one tensor.

    Attributes:
        joined: layers that were put side by side in it. PEFT gives it as many times the rank, so that each has the
            rank that was asked for.
        experts: whether it is a tensor of a mixture's experts or of their router, and no module of its own.
    """

    name: str
    in_features: int
    out_features: int
    joined: int = 1
    experts: bool = False

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features}"

    @property
    def suffix(self) -> str:
        """Last part of the name, which is the same in every block; with the part before a number or of experts."""
        parts = self.name.split(".")
        return ".".join(parts[-2:] if parts[-1].isdecimal() or self.experts else parts[-1:])

    def pattern(self, label: str) -> str:
        """Return the key of PEFT's patterns for layers with this label.

        PEFT takes the first that fits, and puts one of its own for joined experts behind ours. A saved adapter's keys
        are sorted, and there the bracket keeps ours in front.
        """
        return f"(?:{re.escape(label)})" if self.experts else re.escape(label)


@dataclass(frozen=True)
class RankPlan:
    """Patterns for PEFT's ``rank_pattern`` and ``alpha_pattern``, and what was changed."""

    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    clamps: tuple[Clamp, ...]


def linear_shapes(model: Any, target_modules: str, everything: str | None = None) -> list[LinearShape]:
    """List the linear layers that will be adapted: all but the output layer, or those with the given names.

    Args:
        model: the base model.
        target_modules: ``all-linear`` or names separated by commas.
        everything: a pattern of the layers that ``all-linear`` means where it is not all but the output layer.

    Raises:
        TrainerError: ``BAD_CONFIG`` when there is no such layer.
    """
    shapes = _layers(model, everything)
    if target_modules == ALL_LINEAR:
        chosen = [one for one in shapes if everything is None or re.fullmatch(everything, one.name)]
    else:
        chosen = [one for wanted in _names(target_modules) for one in shapes if _called(one, wanted)]
    if not chosen:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "TargetModuleMissing",
            f"lora.targetModules: the model has no linear layers that {target_modules} means",
        )
    return chosen


def _layers(model: Any, everything: str | None) -> list[LinearShape]:
    """List the linear layers that PEFT can adapt; the output layer of a language model is none of them."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if everything is None else None
    shapes = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            shapes.append(LinearShape(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            shapes.append(LinearShape(name, module.nx, module.nf))
    return shapes


def _called(layer: LinearShape, wanted: str) -> bool:
    return layer.name == wanted or layer.name.endswith(f".{wanted}")


def with_targets_of(
    model: Any, lora: LoraSettings, everything: str | None = None
) -> tuple[LoraSettings, tuple[Clamp, ...]]:
    """Return the settings with ``all-linear`` where the model lacks a layer of a listed name, and say so.

    A list is always a policy's, which means it for models of all kinds; no offer can name layers. The operator knows
    the layers of some models by their names alone.

    Args:
        model: the base model.
        lora: what is asked for.
        everything: for a model that is no language model, a pattern of the layers that ``all-linear`` means.
    """
    if lora.target_modules == ALL_LINEAR:
        return lora, ()
    shapes, names = _layers(model, everything), _names(lora.target_modules)
    missing = [wanted for wanted in names if not any(_called(one, wanted) for one in shapes)]
    if names and not missing:
        return lora, ()
    there = ", ".join(sorted({one.suffix for one in shapes}))
    clamp = Clamp(
        field="lora.targetModules",
        requested=lora.target_modules[:256],
        effective=ALL_LINEAR,
        reason="TargetsClamped",
        message=f"No linear layer is called {', '.join(missing) or 'so'}; this model has {there}."[:512],
    )
    return lora.model_copy(update={"target_modules": ALL_LINEAR}), (clamp,)


def _names(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",") if name.strip()]


def expert_shapes(model: Any) -> list[LinearShape]:
    """List the tensors of a mixture's experts and routers, which PEFT adapts for ``all-linear`` like linear layers.

    transformers keeps the experts of a block in one tensor of three dimensions (experts, and those of the layer), and
    the router as a parameter of a module of its own kind.
    """
    import torch

    shapes = []
    for name, parameter in model.named_parameters():
        owner, _, _ = name.rpartition(".")
        joined = 2 if name.endswith(".gate_up_proj") else 1
        experts = parameter.dim() == 3 and owner.endswith(".experts")
        router = name.endswith(".gate.weight") and not isinstance(model.get_submodule(owner), torch.nn.Linear)
        if experts or router:
            rows, columns = parameter.shape[-2:]
            shapes.append(LinearShape(name, columns, rows, joined, experts=True))
    return shapes


def plan_ranks(shapes: list[LinearShape], lora: LoraSettings) -> RankPlan:
    """Clamp the rank of each layer to :func:`taskoffer.api.contract.rank_cap` and keep the layer's scale.

    PEFT scales by alpha / r (alpha / sqrt(r) with rsLoRA), so a smaller rank needs a smaller alpha, else the
    layer's learning rate jumps in effect. The same goes for a rank of the layer's own (``lora.rank_pattern``). Layers
    with the same last name and shape share one pattern, and those that are capped alike one clamp.
    """
    own = {layer.module: layer.r for layer in lora.rank_pattern}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    clamps = []
    by_suffix: dict[str, list[LinearShape]] = {}
    for layer in shapes:
        by_suffix.setdefault(layer.suffix, []).append(layer)
    # Experts come first, because the pattern of a layer may fit theirs as well.
    for suffix, members in sorted(by_suffix.items(), key=lambda item: (not item[1][0].experts, item[0])):
        by_cap: dict[int, list[LinearShape]] = {}
        for one in members:
            by_cap.setdefault(rank_cap(one.in_features, one.out_features), []).append(one)
        first = members[0]
        plain, asked = lora.r * first.joined, own.get(suffix, lora.r) * first.joined
        for cap, alike in sorted(by_cap.items()):
            rank = min(asked, cap)
            if rank != plain or first.experts:
                share = math.sqrt(rank / plain) if lora.use_rslora else rank / plain
                # One pattern for all when every block has the same shape there, else one for each layer.
                for label in [suffix] if len(by_cap) == 1 else [one.name for one in alike]:
                    ranks[first.pattern(label)] = rank
                    alphas[first.pattern(label)] = lora.lora_alpha * first.joined * share
            if asked > cap:
                label = suffix if len(by_cap) == 1 else alike[0].name if len(alike) == 1 else f"{suffix}, {alike[0]}"
                clamps.append(_capped(label, asked, cap, alike[0]))
    missing = [module for module in own if module not in by_suffix]
    clamps.extend(_missing(module, own[module], by_suffix) for module in missing)
    return RankPlan(ranks, alphas, tuple(clamps))


def _capped(label: str, asked: int, cap: int, layer: LinearShape) -> Clamp:
    return Clamp(
        field=f"lora.r[{label}]"[:128],
        requested=str(asked),
        effective=str(cap),
        reason="RankClamped",
        message=f"A {layer} layer has no use for a greater rank; its alpha is scaled along.",
    )


def _missing(module: str, rank: int, there: Iterable[str]) -> Clamp:
    """Say that a rank of its own goes to no layer; a policy's pattern may be meant for models of several kinds."""
    return Clamp(
        field=f"lora.rankPattern[{module}]"[:128],
        requested=str(rank),
        effective="none",
        reason="LayerMissing",
        message=f"No adapted layer is called so; this model has {', '.join(sorted(there))}."[:512],
    )


def _experts(config: Any) -> int:
    """Return the number of experts of a mixture-of-experts model, else 0."""
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_local_experts", "n_routed_experts", "num_experts"))
    return max((int(count) for count in counts if count), default=0)


def lora_config(model: Any, lora: LoraSettings, everything: str | None = None) -> tuple[Any, tuple[Clamp, ...]]:
    """Build PEFT's LoraConfig for a model, and say what could not be taken literally.

    Args:
        model: the base model.
        lora: what is asked for.
        everything: for a model that is no language model, a pattern of the layers that ``all-linear`` means.

    Raises:
        TrainerError: ``BAD_CONFIG`` when the model has no layer to adapt.
    """
    from peft import LoraConfig, TaskType

    lora, clamps = with_targets_of(model, lora, everything)
    shapes = linear_shapes(model, lora.target_modules, everything)
    if lora.target_modules == ALL_LINEAR and everything is None:
        shapes += expert_shapes(model)
    plan = plan_ranks(shapes, lora)
    clamps += plan.clamps
    dropout = lora.lora_dropout
    if dropout and everything is None and _experts(model.config) > 1:
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
    all_linear = lora.target_modules == ALL_LINEAR
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if everything is None else None,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=dropout,
        use_rslora=lora.use_rslora,
        target_modules=(everything or ALL_LINEAR) if all_linear else _names(lora.target_modules),
        rank_pattern=plan.rank_pattern,
        alpha_pattern=plan.alpha_pattern,
    )
    return config, clamps
