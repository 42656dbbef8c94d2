"""Times and whole numbers as Kubernetes writes them."""

from __future__ import annotations

from datetime import datetime


def moment(text: str | None) -> datetime | None:
    """Read an RFC 3339 time, or None."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def whole(quantity: object) -> int:
    """Read a quantity that is a whole number; anything else counts as 0, as with extended resources."""
    text = str(quantity)
    return int(text) if text.isdigit() else 0
