"""Image storage of nodes that outlives clusters: an image pulled once is there for the next cluster."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.locking import try_lock
from taskoffer_lab.paths import cache_root


@dataclass(frozen=True)
class Slot:
    """One node's storage, claimed until `lock` is closed by all who hold it.

    Attributes:
        folder: containerd's root.
        lock: The open lock file.
    """

    folder: Path
    lock: int


def store_root() -> Path:
    """Return the folder of all slots."""
    return cache_root() / "node-store"


def claim_slot() -> Slot:
    """Claim the first free slot; a first node thus always gets the slot with the most images."""
    number = 1
    while True:
        folder = store_root() / f"slot-{number}"
        lock = try_lock(folder.with_suffix(".lock"))
        if lock is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.utime(folder)  # The time of the last use, for pruning.
            return Slot(folder, lock)
        number += 1


def prune_slots(keep: int = 0, unused_seconds: float = 0.0) -> list[Path]:
    """Remove free slots that were not used for `unused_seconds`, keeping the first `keep` of them.

    Returns:
        What was removed.
    """
    removed = []
    folders = sorted(store_root().glob("slot-*[0-9]"), key=_number)
    for folder in folders[keep:]:
        if time.time() - folder.stat().st_mtime < unused_seconds:
            continue
        lock = try_lock(folder.with_suffix(".lock"))
        if lock is None:
            continue  # A node runs on it.
        try:
            shutil.rmtree(folder)
            removed.append(folder)
        finally:
            os.close(lock)
    return removed


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
