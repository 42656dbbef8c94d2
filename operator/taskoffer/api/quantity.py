"""Quantities as Kubernetes writes them."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(m|[A-Za-z]{1,2})?")
_WHOLE = re.compile(r"([0-9]{1,19})(k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_FACTORS: dict[str, int] = {"": 1} | {
    unit: base**power
    for base, units in ((1000, ("k", "M", "G", "T", "P", "E")), (1024, ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")))
    for power, unit in enumerate(units, 1)
}


def whole(quantity: object) -> int:
    """Read a quantity that is a whole number; anything else counts as 0, as with extended resources.

    The server keeps quantities in their shortest form: of 1000 it makes 1k.
    """
    found = _WHOLE.fullmatch(str(quantity))
    if found is None:
        return 0
    number, unit = found.groups("")
    return int(number) * _FACTORS[unit]


def cores(quantity: str) -> Decimal:
    """Read an amount of CPU: 500m is half a core.

    Raises:
        ValueError: when it is not a non-negative number with a unit of Kubernetes.
    """
    found = _NUMBER.fullmatch(quantity)
    number, unit = found.groups("") if found is not None else ("", "?")
    if unit != "m" and unit not in _FACTORS:
        raise ValueError(f"{quantity!r} is not an amount of CPU: write it as 500m, 2 or 1.5")
    return Decimal(number) / 1000 if unit == "m" else Decimal(number) * _FACTORS[unit]
