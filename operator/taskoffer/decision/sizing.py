"""What a model's name and the policy say about it: family, number of parameters, size class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

from taskoffer.api.v1alpha1.model_and_data import Architecture, Model
from taskoffer.api.v1alpha1.profiles import FamilyRule, SizeClass
from taskoffer.decision.memory import IMAGE_MODELS

# 8x7B before 7B, so that a mixture of experts is not read as one expert. The number must not continue a word or a
# version (the 3.1 of Llama-3.1-8B carries no unit and so does not match).
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_UNIT = {"b": 10**9, "m": 10**6}


def family_of(model_name: str, families: Sequence[FamilyRule]) -> FamilyRule | None:
    """Return the family whose pattern is the longest one contained in the model's name, or None.

    The longest match makes ``codellama`` win over ``llama``. Of equally long patterns the first family counts.
    """
    name = model_name.lower()
    best: tuple[int, FamilyRule] | None = None
    for family in families:
        for pattern in family.patterns:
            if pattern in name and (best is None or len(pattern) > best[0]):
                best = (len(pattern), family)
    return best[1] if best else None


def parameters_in_name(model_name: str) -> int | None:
    """Read the number of parameters from a model name: 0.5b, 1.5B, 135M and 8x7B are understood; else None.

    When a name carries several sizes the last one counts, as in ``Llama-3-8B-distill-1.5B``; but millions beside
    billions are a context's length, as in ``Qwen2.5-7B-Instruct-1M``.
    """
    return _parameters_in(model_name.rsplit("/", 1)[-1])


@lru_cache(maxsize=4096)
def _parameters_in(name: str) -> int | None:
    """Read the number of parameters from the part of a name that follows the owner."""
    found = _SIZE.findall(name)
    if not found:
        return None
    experts, number, unit = next((size for size in reversed(found) if size[2].lower() == "b"), found[-1])
    return int(Decimal(number) * _UNIT[unit.lower()] * int(experts or 1)) or None


def parameters_of(model: Model, unknown: int | None) -> int | None:
    """Return the model's size: what the offer says, else its name, else its architecture, else ``unknown``."""
    return size_of(model.parameters, model.name, model.architecture) or unknown


def size_of(stated: int | None, name: str, architecture: Architecture | None) -> int | None:
    """Return the size that is stated, else the one in the name, else that of the architecture, else None."""
    of_architecture = IMAGE_MODELS[architecture].parameters if architecture is not None else None
    return stated or parameters_in_name(name) or of_architecture


def size_class_of(parameters: int, classes: Sequence[SizeClass]) -> SizeClass | None:
    """Return the class that the size falls into; the lower bound is inclusive, the upper one is not."""
    for size in classes:
        if size.min_parameters <= parameters and (size.max_parameters is None or parameters < size.max_parameters):
            return size
    return None


def billions(parameters: int) -> str:
    """Write a size for people: 8030000000 becomes 8.03B, 135000000 becomes 135M."""
    if parameters >= 10**9:
        return f"{parameters / 10**9:.4g}B"
    return f"{parameters / 10**6:.4g}M" if parameters >= 10**6 else f"{parameters / 10**3:.4g}k"
