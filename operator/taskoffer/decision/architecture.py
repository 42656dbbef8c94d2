"""What a language model is made of, as far as memory and time depend on it: layers, widths, vocabulary.

The table holds what the ``config.json`` of well-known models says. The shape of any other model is estimated from its
number of parameters alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import linear_regression
from typing import NamedTuple

from taskoffer.api.contract import rank_cap

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output layer."""


Ranks = tuple[tuple[str, int], ...]
"""Names of layers and their ranks."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with gated feed-forward layers.

    Widths count features: ``query`` is heads times head size, ``key_value`` is key-value heads times head size.
    """

    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool = False
    """Whether the output layer is the embedding."""
    fused: bool = False
    """Whether query, key and value are one layer, and gate and up another one (Phi)."""
    known: bool = True
    """Whether these are a model's own numbers; False for an estimate from the size."""

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """Name, input and output features of the linear layers of one block."""
        down = ("down_proj", self.intermediate, self.hidden)
        out = ("o_proj", self.query, self.hidden)
        if self.fused:
            together = ("qkv_proj", self.hidden, self.query + 2 * self.key_value)
            return (together, out, ("gate_up_proj", self.hidden, 2 * self.intermediate), down)
        return (
            ("q_proj", self.hidden, self.query),
            ("k_proj", self.hidden, self.key_value),
            ("v_proj", self.hidden, self.key_value),
            out,
            ("gate_proj", self.hidden, self.intermediate),
            ("up_proj", self.hidden, self.intermediate),
            down,
        )

    def adapted(self, target_modules: str = ALL_LINEAR) -> tuple[tuple[str, int, int], ...]:
        """Return the layers of a block that LoRA adapts: all, or those whose names are given, separated by commas.

        Names that this shape does not have may be those of a model that calls its layers otherwise; when none is
        known, all layers count.
        """
        names = {name.strip() for name in target_modules.split(",")}
        return tuple(layer for layer in self.linears if layer[0] in names) or self.linears

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear layers of all blocks."""
        return _linear_parameters(self)

    @property
    def parameters(self) -> int:
        """Parameters in all: the linear layers, the embedding and the output layer. Norms and biases are left out."""
        return self.linear_parameters + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(
        self, rank: int, target_modules: str = ALL_LINEAR, *, pattern: Ranks = (), capped: bool = True
    ) -> int:
        """Parameters that LoRA of a rank adds: the sum of rank times (in + out); each layer's rank is capped.

        Args:
            rank: Rank of the layers that the pattern does not name.
            target_modules: The layers that are adapted.
            pattern: Ranks of single layers.
            capped: Whether no layer gets more than it can use.
        """
        return _adapter_parameters(self, rank, target_modules, pattern, capped)

    def layer_ranks(self, rank: int, target_modules: str = ALL_LINEAR, pattern: Ranks = ()) -> dict[str, int]:
        """Return the rank of each adapted layer: the pattern's, else the one for all, but not more than it can use."""
        asked = dict(pattern)
        return {name: min(asked.get(name, rank), rank_cap(i, o)) for name, i, o in self.adapted(target_modules)}

    def rank_caps(self, target_modules: str = ALL_LINEAR) -> dict[int, tuple[str, ...]]:
        """Return the largest useful ranks and the adapted layers that they hold for, the largest rank first."""
        caps: dict[int, tuple[str, ...]] = {}
        for name, features_in, features_out in self.adapted(target_modules):
            cap = rank_cap(features_in, features_out)
            caps[cap] = (*caps.get(cap, ()), name)
        return dict(sorted(caps.items(), reverse=True))


@lru_cache(maxsize=4096)
def _linear_parameters(shape: ModelShape) -> int:
    return shape.layers * sum(i * o for _, i, o in shape.linears)


@lru_cache(maxsize=16_384)
def _adapter_parameters(shape: ModelShape, rank: int, target_modules: str, pattern: Ranks, capped: bool) -> int:
    layers, asked = shape.adapted(target_modules), dict(pattern)
    ranks = {name: asked.get(name, rank) for name, _, _ in layers}
    return shape.layers * sum((min(ranks[n], rank_cap(i, o)) if capped else ranks[n]) * (i + o) for n, i, o in layers)


def by_layer(caps: Mapping[int, tuple[str, ...]]) -> str:
    """Write ranks and the layers that they hold for, as in ``q/o 1024, k/v 409``."""
    return ", ".join(f"{'/'.join(n.removesuffix('_proj') for n in names)} {cap}" for cap, names in caps.items())


class Structure(NamedTuple):
    """What a model's name says of its layers beside their widths."""

    experts: bool = False
    """Whether it is a mixture of experts."""
    other_layers: bool = False
    """Whether its linear layers are not called as Llama's: query, key and value in one, other words, or factors."""


TEXT_LAYERS = frozenset(
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"],
)
"""Names of the layers of a block, as Llama's and Phi's code has them; a model of pictures has none of them."""

_DEEPSEEK = r"deepseek-(?:v[23]|r1(?!.*distill))"
_EXPERTS = re.compile(
    rf"(?<![a-z0-9.])\d+x\d|mixtral|(?<![a-z])moe(?![a-z])|(?<![a-z0-9])a\d+(?:\.\d+)?[bm](?![a-z0-9])|{_DEEPSEEK}|gpt-oss"
)
"""How names say that a model has experts: 8x7B, Mixtral, Qwen1.5-MoE, 30B-A3B, DeepSeek from its second version on."""
_OTHER_LAYERS = re.compile(
    rf"(?<![a-z])phi(?![a-z])|{_DEEPSEEK}|falcon|bloom|pythia|gpt-neo|gpt-?j|gpt-?2"
    r"|gpt-oss|internlm2|starcoder|codegen|(?<![a-z])(?:opt|mpt)-\d"
)


def structure_of(model_name: str) -> Structure:
    """Return what the part of a model's name that follows the owner says of its layers."""
    return _structure_of(model_name.rsplit("/", 1)[-1].lower())


@lru_cache(maxsize=4096)
def _structure_of(name: str) -> Structure:
    return Structure(_EXPERTS.search(name) is not None, _OTHER_LAYERS.search(name) is not None)


_TABLE: dict[str, ModelShape] = {
    # Name pattern (whole words of the lower-case name): hidden, intermediate, layers, query, key_value, vocabulary.
    r"smollm2?-135m": ModelShape(576, 1536, 30, 576, 192, 49152, tied=True),
    r"qwen2\.5-0\.5b": ModelShape(896, 4864, 24, 896, 128, 151936, tied=True),
    r"tinyllama-1\.1b": ModelShape(2048, 5632, 22, 2048, 256, 32000),
    r"llama-?3\.2-1b": ModelShape(2048, 8192, 16, 2048, 512, 128256, tied=True),
    r"qwen2\.5-1\.5b": ModelShape(1536, 8960, 28, 1536, 256, 151936, tied=True),
    r"qwen2\.5-3b": ModelShape(2048, 11008, 36, 2048, 256, 151936, tied=True),
    r"llama-?3\.2-3b": ModelShape(3072, 8192, 28, 3072, 1024, 128256, tied=True),
    r"phi-?3(\.5)?-mini": ModelShape(3072, 8192, 32, 3072, 3072, 32064, fused=True),
    r"(?:llama-?2|codellama)-7b": ModelShape(4096, 11008, 32, 4096, 4096, 32000),
    r"mistral-7b": ModelShape(4096, 14336, 32, 4096, 1024, 32000),
    r"qwen2\.5-(?:coder-|math-)?7b": ModelShape(3584, 18944, 28, 3584, 512, 152064),
    r"llama-?3(?:\.1)?-8b": ModelShape(4096, 14336, 32, 4096, 1024, 128256),
    r"gemma-7b": ModelShape(3072, 24576, 28, 4096, 4096, 256000, tied=True),
    r"(?:llama-?2|codellama)-13b": ModelShape(5120, 13824, 40, 5120, 5120, 32000),
    r"phi-?4": ModelShape(5120, 17920, 40, 5120, 1280, 100352, fused=True),
    r"qwen2\.5-(?:coder-)?14b": ModelShape(5120, 13824, 48, 5120, 1024, 152064),
    r"qwen2\.5-(?:coder-)?32b": ModelShape(5120, 27648, 64, 5120, 1024, 152064),
    r"codellama-34b": ModelShape(8192, 22016, 48, 8192, 1024, 32000),
    r"llama-?2-70b": ModelShape(8192, 28672, 80, 8192, 1024, 32000),
    r"llama-?3(?:\.[13])?-70b": ModelShape(8192, 28672, 80, 8192, 1024, 128256),
    r"qwen2\.5-72b": ModelShape(8192, 29568, 80, 8192, 1024, 152064),
}
"""Shapes by model. Source: the config.json that each model's publisher ships with it."""

_PATTERNS = tuple((re.compile(rf"(?<![a-z0-9]){pattern}(?![a-z0-9.])"), shape) for pattern, shape in _TABLE.items())
_GRID = 64
"""Widths are multiples of this, as those of real models are."""
_USUAL_VOCABULARY = 152_064
_UNTIED_FROM = 4 * 10**9
"""Small models share the embedding with the output layer, larger ones do not (Llama 3, Qwen 2.5)."""


def shape_of(model_name: str, parameters: int) -> ModelShape:
    """Return the shape of a model: its own when it is known by name, else one of its size.

    A name is believed only as long as the size is the one that it stands for, within a tenth: a pruned or widened
    model keeps its ancestor's name.

    Raises:
        ValueError: when the number of parameters is not positive.
    """
    if parameters < 1:
        raise ValueError(f"a model has at least one parameter, got {parameters}")
    return _shape_of(model_name.rsplit("/", 1)[-1].lower(), parameters)


@lru_cache(maxsize=4096)
def _shape_of(name: str, parameters: int) -> ModelShape:
    """Return the shape of all models of this name, whoever owns them."""
    for pattern, shape in _PATTERNS:
        if pattern.search(name) and abs(shape.parameters / parameters - 1) <= 0.1:
            return shape
    return shape_of_size(parameters)


@lru_cache(maxsize=4096)
def shape_of_size(parameters: int) -> ModelShape:
    """Return the shape of a usual model of this size.

    Widths follow the power laws that fit the table best (least squares of the logarithms); the number of layers is
    what then makes up the size. The vocabulary is a large one, so that logits are not thought too small.
    """
    hidden = _on_grid(_law("hidden", parameters))
    intermediate = _on_grid(_law("intermediate", parameters))
    key_value = min(hidden, _on_grid(_law("key_value", parameters)))
    shape = ModelShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=1,
        query=hidden,
        key_value=key_value,
        vocabulary=_USUAL_VOCABULARY,
        tied=parameters < _UNTIED_FROM,
        known=False,
    )
    embedding = shape.parameters - shape.linear_parameters
    return replace(shape, layers=max(2, round((parameters - embedding) / shape.linear_parameters)))


def _on_grid(value: float) -> int:
    return max(_GRID, round(value / _GRID) * _GRID)


def _law(width: str, parameters: int) -> float:
    slope, intercept = _power_law(width)
    return math.exp(intercept + slope * math.log(parameters))


@lru_cache(maxsize=8)
def _power_law(width: str) -> tuple[float, float]:
    """Return exponent and logarithm of the factor of the power law of a width over the number of parameters."""
    sizes = [math.log(shape.parameters) for shape in _TABLE.values()]
    widths = [math.log(getattr(shape, width)) for shape in _TABLE.values()]
    return linear_regression(sizes, widths)
