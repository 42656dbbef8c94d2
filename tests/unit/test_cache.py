"""Stores: what watches and lists may do to them in whatever order they arrive."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from taskoffer.reconcile import cache
from taskoffer.reconcile.cache import Store
from taskoffer.reconcile.world import World


def raw(uid: str = "a", version: int = 1) -> dict[str, Any]:
    return {"metadata": {"uid": uid, "resourceVersion": str(version)}}


def store() -> Store[int]:
    return Store("Thing", lambda r: int(r["metadata"]["resourceVersion"]))


def test_an_object_is_known_from_its_first_event_and_renewed_by_newer_ones() -> None:
    made = store()
    assert made.observe(None, raw(version=5))
    assert made.observe("MODIFIED", raw(version=6))
    assert (made.get("a"), list(made), len(made)) == (6, [6], 1)


@pytest.mark.parametrize("stale", [4, 5])
def test_a_stale_event_changes_nothing(stale: int) -> None:
    made = store()
    made.observe("ADDED", raw(version=5))
    assert not made.observe("MODIFIED", raw(version=stale))
    assert made.get("a") == 5


def test_a_deleted_object_stays_away_whatever_arrives_late() -> None:
    made = store()
    made.observe("ADDED", raw(version=5))
    assert made.observe("DELETED", raw(version=7))
    assert not made.observe("MODIFIED", raw(version=6))
    made.replace([raw(version=6)], "6")
    assert made.get("a") is None
    assert not made.observe("DELETED", raw(version=7))


def test_an_object_that_was_created_again_has_another_uid_and_comes_in() -> None:
    made = store()
    made.observe("DELETED", raw("a", 7))
    assert made.observe("ADDED", raw("b", 8))


def test_a_list_drops_what_the_watch_has_missed() -> None:
    made = store()
    for uid, version in (("ghost", 1), ("kept", 2), ("old", 3)):
        made.observe("ADDED", raw(uid, version))
    assert made.replace([raw("kept", 2), raw("old", 9), raw("new", 8)], "10") == 3
    assert {uid: made.get(uid) for uid in ("ghost", "kept", "old", "new")} == {
        "ghost": None,
        "kept": 2,
        "old": 9,
        "new": 8,
    }


def test_a_list_does_not_drop_what_was_created_after_it() -> None:
    made = store()
    made.observe("ADDED", raw("young", 11))
    assert made.replace([], "10") == 0
    assert made.get("young") == 11


def test_a_list_does_not_set_an_object_back() -> None:
    made = store()
    made.observe("MODIFIED", raw("a", 12))
    assert made.replace([raw("a", 9)], "10") == 0
    assert made.get("a") == 12


def test_a_store_counts_as_listed_after_a_list_and_not_after_events() -> None:
    made = store()
    made.observe("ADDED", raw())
    assert not made.listed
    made.replace([], "1")
    assert made.listed


def test_changes_are_told_with_before_and_after() -> None:
    made, told = store(), list[tuple[int | None, int | None]]()
    made.on_change = lambda before, after: told.append((before, after))
    made.observe("ADDED", raw(version=1))
    made.observe("MODIFIED", raw(version=2))
    made.observe("MODIFIED", raw(version=2))
    made.forget("a", 2)
    made.forget("a", 2)
    assert told == [(None, 1), (1, 2), (2, None)]


def test_the_order_of_events_and_a_list_does_not_matter() -> None:
    def add(s: Store[int]) -> None:
        s.observe("ADDED", raw("a", 1))

    def change(s: Store[int]) -> None:
        s.observe("MODIFIED", raw("a", 3))

    def delete(s: Store[int]) -> None:
        s.observe("DELETED", raw("a", 5))

    def early_list(s: Store[int]) -> None:
        s.replace([raw("a", 3), raw("b", 2)], "4")

    for order in itertools.permutations([add, change, delete, early_list]):
        made = store()
        for act in order:
            act(made)
        assert made.get("a") is None, [f.__name__ for f in order]
        assert made.get("b") == 2


def test_tombstones_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_TOMBSTONES", 10)
    made = store()
    for i in range(100):
        made.observe("DELETED", raw(str(i), i + 1))
    assert len(made._gone) == 10
    assert not made.observe("ADDED", raw("99", 50))


@pytest.mark.parametrize("missing", range(6))
def test_the_world_is_complete_only_when_every_kind_was_listed(missing: int) -> None:
    world = World()
    for number, each in enumerate(world.stores):
        if number != missing:
            each.replace([], "1")
    assert not world.complete
    world.stores[missing].replace([], "1")
    assert world.complete
