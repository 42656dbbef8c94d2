"""Parts of stored objects in the shape that is expected of them; what has another shape counts as absent.

A schema keeps its shapes only for what is written under it: objects outlive schemas.
"""

from __future__ import annotations

from typing import Any

Raw = dict[str, Any]


def mapping(value: object) -> Raw:
    """Return a mapping, or an empty one instead of anything else."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[Raw]:
    """Return the mappings of a list; none of anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text(value: object) -> str | None:
    """Return a text, or None instead of anything else."""
    return value if isinstance(value, str) else None


def count(value: object) -> int | None:
    """Return a whole number from 0 on, or None instead of anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
