"""What the operator knows of the cluster: one store per kind, fed by watches and corrected by lists.

A store takes an object only if it is newer than what it has. A deletion leaves a tombstone, so that a list that was
taken before it cannot bring the object back. A list replaces the store: what it lacks is dropped, because a watch
that was cut for too long never reports those deletions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Raw = dict[str, Any]
T = TypeVar("T")

_TOMBSTONES = 10_000


def version_of(raw: Raw) -> int:
    """Return an object's resourceVersion as a number; Kubernetes 1.35 and later promise that they compare as such."""
    return int(raw["metadata"]["resourceVersion"])


class Store(Generic[T]):
    """Objects of one kind by UID, reduced to what is needed of them."""

    def __init__(self, kind: str, reduce: Callable[[Raw], T]) -> None:
        self.kind = kind
        self._reduce = reduce
        self._items: dict[str, tuple[int, T]] = {}
        self._gone: dict[str, int] = {}
        self.listed = False
        self.on_change: Callable[[T | None, T | None], None] = _nothing

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self._items.values())

    def get(self, uid: str) -> T | None:
        """Return the object with this UID, or None."""
        found = self._items.get(uid)
        return found[1] if found else None

    def observe(self, event_type: str | None, raw: Raw) -> bool:
        """Take in a watch event or a write's answer. Tell whether it changed anything."""
        metadata = raw["metadata"]
        uid, version = metadata["uid"], version_of(raw)
        if event_type == "DELETED":
            return self._remove(uid, version)
        return self._put(uid, version, raw)

    def forget(self, uid: str, version: int) -> bool:
        """Take in that an object is gone (404), as seen at this resourceVersion or later."""
        return self._remove(uid, version)

    def replace(self, items: Iterable[Raw], list_version: str) -> int:
        """Take in a complete list. Return how many objects it corrected."""
        present: set[str] = set()
        corrected = self.take_page(items, present)
        return corrected + self.keep_only(present, list_version)

    def take_page(self, items: Iterable[Raw], present: set[str]) -> int:
        """Take in a part of a list, and note in ``present`` what is in it. Return how many objects it corrected."""
        corrected = 0
        for raw in items:
            uid = raw["metadata"]["uid"]
            present.add(uid)
            corrected += self._put(uid, version_of(raw), raw)
        return corrected

    def keep_only(self, present: set[str], list_version: str) -> int:
        """Drop what a complete list of this version did not have. Return how many objects that was."""
        corrected, at = 0, int(list_version)
        for uid in [u for u, (version, _) in self._items.items() if u not in present and version <= at]:
            corrected += self._remove(uid, at)
        self.listed = True
        return corrected

    def _put(self, uid: str, version: int, raw: Raw) -> bool:
        before = self._items.get(uid)
        if (before is not None and before[0] >= version) or self._gone.get(uid, -1) >= version:
            return False
        item = self._reduce(raw)
        self._items[uid] = (version, item)
        self.on_change(before[1] if before else None, item)
        return True

    def _remove(self, uid: str, version: int) -> bool:
        self._gone.pop(uid, None)
        self._gone[uid] = version
        if len(self._gone) > _TOMBSTONES:
            del self._gone[next(iter(self._gone))]
        before = self._items.pop(uid, None)
        if before is None:
            return False
        self.on_change(before[1], None)
        return True


def _nothing(_before: object, _after: object) -> None:
    return None
