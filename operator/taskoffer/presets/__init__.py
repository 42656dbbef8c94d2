"""Ready CapacityPolicies: the strategy documents written down as data, and one for a machine without GPUs."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

__all__ = ["load", "names"]


def names() -> list[str]:
    """Return the names of the presets, sorted."""
    files = resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load(name: str, *, image: str | None = None) -> dict[str, Any]:
    """Return a preset as a CapacityPolicy manifest.

    Args:
        name: Name of the preset, one of :func:`names`.
        image: Trainer image to put in; absent keeps the preset's own.

    Raises:
        KeyError: when there is no preset of this name; the message lists those that exist.
    """
    if name not in names():
        raise KeyError(f"no preset {name!r}; there are {', '.join(names())}")
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    manifest: dict[str, Any] = yaml.safe_load(text)
    if image is not None:
        manifest["spec"]["podTemplate"]["image"] = image
    return manifest
