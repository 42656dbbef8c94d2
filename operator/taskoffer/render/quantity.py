"""Kubernetes quantities, as far as they are multiplied here."""

from __future__ import annotations

import re
from decimal import Decimal

_FORM = re.compile(r"^(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")


def times(quantity: str, count: int) -> str:
    """Multiply a quantity by a whole number, keeping its unit: 1.5Gi times 2 is 3Gi.

    Raises:
        ValueError: when the quantity is not a non-negative number with a known unit.
    """
    found = _FORM.match(quantity)
    if found is None:
        raise ValueError(f"{quantity!r} is not a quantity: write it as 500m, 2, 110Gi")
    number, unit = found.groups()
    product = (Decimal(number) * count).normalize()
    return f"{product:f}{unit or ''}"
