"""The timeline of the GPUs: slots that nobody else has, and files that are the same each time."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from taskoffer.simulation.extras import MissingExtraError
from taskoffer.simulation.run import Run, Stretch
from taskoffer.simulation.timeline import Slots, assign_slots, draw

OUTCOMES = ("InTime", "Late", "Failed")


def run(name: str, start: float, end: float, gpus: int, node: str = "n1", outcome: str = "InTime") -> Run:
    return Run(name, start, end, gpus, node, outcome, 1.0)


def busy_day(seed: int, gpus: int = 8) -> list[Run]:
    """Return runs that never need more GPUs of a node than there are."""
    dice = random.Random(seed)
    runs: list[Run] = []
    for n in range(80):
        start, node, count = dice.uniform(0, 86_400), dice.choice(["n1", "n2"]), dice.choice([1, 2, 4, 8])
        new = run(f"r{n}", start, start + dice.uniform(600, 20_000), count, node, dice.choice(OUTCOMES))
        beside = [one for one in runs if one.node == node and one.start < new.end and one.end > new.start]
        if sum(one.gpus for one in beside) + count <= gpus:
            runs.append(new)
    return runs


def overlap(one: Slots, other: Slots) -> bool:
    return one.run.start < other.run.end and other.run.start < one.run.end and bool({*one.slots} & {*other.slots})


@pytest.mark.parametrize("seed", range(5))
def test_no_slot_is_given_to_two_runs_at_a_time(seed: int) -> None:
    assigned = assign_slots(busy_day(seed))
    assert len(assigned) > 20
    assert all(len(one.slots) == one.run.gpus for one in assigned)
    assert not any(overlap(*pair) for pair in itertools.combinations(assigned, 2))
    assert all((min(one.slots) >= 8) == (max(one.slots) >= 8) == (one.run.node == "n2") for one in assigned)


def test_slots_are_the_first_contiguous_ones_or_else_the_first_free_ones() -> None:
    runs = [
        run("a", 0, 10, 1),
        run("b", 0, 30, 1),
        run("c", 0, 10, 2),
        run("d", 10, 20, 2),
        run("e", 11, 20, 2),
    ]
    slots = {one.run.name: one.slots for one in assign_slots(runs, gpus=5)}
    assert slots == {"a": (0,), "b": (1,), "c": (2, 3), "d": (2, 3), "e": (0, 4)}


def test_a_node_that_is_over_booked_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="b needs 5 GPUs of n1, 4 are free"):
        assign_slots([run("a", 0, 10, 4), run("b", 9, 10, 5)])


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_is_written_the_same_each_time(tmp_path: Path, suffix: str, magic: bytes) -> None:
    runs = {"first come, first served": busy_day(0), "best": busy_day(1)}
    pictures = []
    for name in ("one", "other"):
        draw(runs, tmp_path / f"{name}.{suffix}")
        pictures.append((tmp_path / f"{name}.{suffix}").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(magic)
    assert len(pictures[0]) > 8_000


def test_a_window_shows_less(tmp_path: Path) -> None:
    runs = {"best": busy_day(0)}
    draw(runs, tmp_path / "all.svg")
    draw(runs, tmp_path / "part.svg", start_hours=3, end_hours=5)
    assert (tmp_path / "part.svg").stat().st_size < (tmp_path / "all.svg").stat().st_size


def test_a_policy_without_a_run_has_a_row_all_the_same(tmp_path: Path) -> None:
    draw({"refuses everything": []}, tmp_path / "idle.png")
    assert (tmp_path / "idle.png").stat().st_size > 1_000


REFUSED = {
    "another suffix": ({"a": []}, "a.pdf", {}, "neither .png nor .svg"),
    "no policy": ({}, "a.png", {}, "no policy"),
    "an empty window": (
        {"a": []},
        "a.png",
        {"start_hours": 5, "end_hours": 5},
        "nothing lies between hour 5 and hour 5",
    ),
    "an unknown outcome": ({"a": [run("a", 0, 1, 1, outcome="Lost")]}, "a.png", {}, "no colour for the outcome Lost"),
}


@pytest.mark.parametrize(("runs", "name", "window", "told"), REFUSED.values(), ids=REFUSED)
def test_is_not_drawn(
    tmp_path: Path, runs: dict[str, list[Run]], name: str, window: dict[str, float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        draw(runs, tmp_path / name, **window)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingExtraError, match=r"matplotlib is not installed: pip install '.\[simulate\]' in the checkout"
    ):
        draw({"a": []}, tmp_path / "a.png")


def test_a_run_that_was_stopped_in_between_is_drawn_for_each_of_its_stretches_and_counted_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts = (Stretch(0, 3600, "n1"), Stretch(7200, 9000, "n2"))
    stopped = replace(run("a", 0, 9000, 4), stretches=parts)
    between = run("b", 3600, 7200, 8)
    assigned = [(one.run.name, one.run.start, one.run.end, one.slots[0]) for one in assign_slots([stopped, between])]
    assert assigned == [("a", 0, 3600, 0), ("b", 3600, 7200, 0), ("a", 7200, 9000, 8)]
    draw({"policy": [stopped, between]}, tmp_path / "gpus.svg")
    assert "policy: 2 runs, worth 2.0" in (tmp_path / "gpus.svg").read_text()
