"""Libraries that only the simulator needs: loaded when they are used, with a clear word where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingExtraError(ImportError):
    """A library of the extra ``simulate`` is not installed."""


def load(module: str) -> Any:
    """Import a module of the extra ``simulate``.

    Raises:
        MissingExtraError: when it is not installed; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingExtraError(f"{library} is not installed: pip install '.[simulate]' in the checkout") from error
