"""How attention is computed: the best of the ways that were asked for, are there, and serve the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taskoffer.api.contract import AttnImplementation, Clamp, RunConfig

__all__ = ["attention_clamp", "attention_in_use", "chain", "load_with_attention"]

_PLAIN: tuple[AttnImplementation, ...] = ("sdpa", "eager")
"""Ways that need no further package, the faster one first."""


def _missing(way: AttnImplementation) -> str | None:
    """Say why a way cannot be taken here, or ``None``."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if way in _PLAIN:
        return None
    there = is_flash_attn_3_available() if way == "flash_attention_3" else is_flash_attn_2_available()
    return None if there else f"There is no GPU for {way} here, or no package of it."


def chain(wishes: Sequence[AttnImplementation], half: bool = True) -> list[AttnImplementation]:
    """Return the ways to try, in their order: those asked for that are there, then what needs no package.

    Args:
        wishes: what was asked for, the most wanted first.
        half: the model is in half precision. The flash kernels compute in nothing else; transformers loads a model in
            float32 with them all the same, and the first pass through it fails.
    """
    last = _PLAIN[_PLAIN.index(wishes[-1]) :] if wishes[-1] in _PLAIN else _PLAIN
    asked = [way for way in wishes if _missing(way) is None and (half or way in _PLAIN)]
    return [*asked, *(way for way in last if way not in asked)]


def load_with_attention(
    load: Callable[[str | None], Any], wishes: Sequence[AttnImplementation], half: bool = True
) -> Any:
    """Load a model with the first way to compute attention that it can be loaded with.

    Args:
        load: loads the model, given a name for transformers' ``attn_implementation``; ``None`` leaves it to the
            library, which takes sdpa where the model has it.
        wishes: what was asked for, the most wanted first; empty leaves it to the library.
        half: see :func:`chain`.

    Raises:
        ImportError, ValueError: what the last try raised, which is then not for the attention.
    """
    if not wishes:
        return load(None)
    *first, last = chain(wishes, half)
    for way in first:
        try:
            return load(way)
        except (ImportError, ValueError) as error:
            print(f"model: attention cannot be {way}: {str(error)[:200]}", flush=True)
    return load(last)


def attention_in_use(model: Any) -> str:
    """Return how a model computes attention, with the kernels that torch may choose from on a GPU.

    On a GPU sdpa stands for several: torch takes the flash kernel where masks and shapes allow it.
    """
    import torch

    # Models of diffusers say nothing; their processors call torch's scaled_dot_product_attention.
    way = str(getattr(model.config, "_attn_implementation", None) or "sdpa")
    if way != "sdpa" or next(model.parameters()).device.type != "cuda":
        return way
    cuda = torch.backends.cuda
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return f"sdpa ({', '.join(name for name, on in enabled.items() if on)})"


def attention_clamp(config: RunConfig, model: Any) -> tuple[Clamp, ...]:
    """Say that attention is not computed in the way that was wanted most, where that is so."""
    wishes = config.train.attn_implementation
    in_use = attention_in_use(model)
    if not wishes or in_use.partition(" ")[0] == wishes[0]:
        return ()
    why = _missing(wishes[0])
    if why is None and wishes[0] not in _PLAIN and str(getattr(model, "dtype", "")) == "torch.float32":
        why = f"{wishes[0]} computes in half precision, and the model is in float32."
    why = why or f"{config.model.name} cannot be loaded with {wishes[0]}."
    return (
        Clamp(
            field="train.attnImplementation",
            requested=", ".join(wishes),
            effective=in_use,
            reason="AttentionFallback",
            message=why[:512],
        ),
    )
