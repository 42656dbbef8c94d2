"""Keeping the lab's caches below their bound: what they hold, and what goes first."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.node_store import prune_slots, store_root
from taskoffer_lab.paths import cache_root, folder_size
from taskoffer_lab.toolchain import prune_tools

CACHE_BOUND_BYTES = 25_000_000_000
"""Tools, images and node storage together stay below this."""


@dataclass(frozen=True)
class CacheUse:
    """One part of the cache and its size on disk in bytes."""

    name: str
    path: Path
    size: int


def cache_use() -> list[CacheUse]:
    """Return every folder of the cache with its size, the node storage slot by slot; largest first."""
    parts = [folder for folder in cache_root().iterdir() if folder.is_dir() and folder != store_root()]
    if store_root().is_dir():
        parts += [folder for folder in store_root().iterdir() if folder.is_dir()]
    root = cache_root()
    found = [CacheUse(str(part.relative_to(root)), part, folder_size(part)) for part in parts]
    return sorted(found, key=lambda use: use.size, reverse=True)


def prune(bound: int = CACHE_BOUND_BYTES) -> list[Path]:
    """Remove what is old, then free node storage, until the cache is below `bound` bytes.

    Tools that nobody used for days go first; then the storage of free nodes, the last slots first, for the first
    ones are used again soonest. Images are built anew from their own layers, so the builder prunes those.

    Returns:
        What was removed.
    """
    removed = prune_tools()
    slots = len(list(store_root().glob("slot-*[0-9]"))) if store_root().is_dir() else 0
    while slots > 0 and sum(use.size for use in cache_use()) > bound:
        slots -= 1
        removed += prune_slots(keep=slots)
    return removed


def clear() -> list[Path]:
    """Remove everything that no running cluster uses; returns what was removed."""
    removed = prune_slots() if store_root().is_dir() else []
    for folder in cache_root().iterdir():
        if folder.is_dir() and folder not in (store_root(), cache_root() / "go"):
            shutil.rmtree(folder)
            removed.append(folder)
    return removed
