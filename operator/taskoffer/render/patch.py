"""Merge patches (RFC 7386) that leave nothing of the old value behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the merge patch that turns ``before`` into ``after``.

    A merge patch merges objects, so a field that is gone has to be named with null at every depth; without that a
    bound removed from a policy would live on in ``status.activeSpec``. Lists are replaced as a whole. Fields that
    stay the same are in the patch too, which makes it right for every state in between.
    """
    patch: dict[str, Any] = {name: None for name in before if name not in after}
    for name, value in after.items():
        old = before.get(name)
        patch[name] = merge_patch(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return patch
