"""The examples under every preset: each gets the answer that docs/explanation/presets.md states."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from operator_bench import Bench, condition
from taskoffer import presets
from taskoffer.api.reasons import Reason

pytestmark = pytest.mark.usefixtures("operator")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "presets.md"
SECTION = "The examples under each preset"
FOLDERS = ("examples", "examples/market")
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
MOST_ITEMS = 16


@dataclass(frozen=True)
class Row:
    """What the page says of one example: its file, and the answer under each preset."""

    path: Path
    answers: dict[str, str]


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return the rows of all tables in the page's section."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition(f"## {SECTION}\n")[2].partition("\n## ")[0]
    found: list[Row] = []
    columns: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = [cell.strip("`") for cell in cells[1:]]
        elif link := re.search(r"\]\((\S+\.yaml)\)", cells[0]):
            path = (PAGE.parent / link[1]).resolve()
            found.append(Row(path, dict(zip(columns, cells[1:], strict=True))))
    return tuple(found)


def said(offer: dict[str, Any]) -> str:
    """Return an offer's answer in the words of the page."""
    status, reason = offer["status"], condition(offer, "Admitted")["reason"]
    if "admission" in status:
        assert reason == Reason.ADMITTED
        (made,) = status["admission"]["assignments"]
        gpus = f"{made['count']} GPU" + ("s" if made["count"] > 1 else "")
        return f"{gpus}, `{made['lane']}`" if "lane" in made else gpus
    ended = condition(offer, "Finished")
    assert ended in ({}, {**ended, "status": "True", "reason": "Rejected"})
    return f"refused: `{reason}`" if ended else f"waits: `{reason}`"


def has_score(preset: str, offer: dict[str, Any]) -> bool:
    """Tell whether the preset's formula can be worked out: not without rows, or without the family's success rate."""
    if preset == "expected-value":
        return "rows" in offer["spec"]["dataset"]
    return bool(condition(offer, "Admitted")["reason"] != Reason.MODEL_FAMILY_NOT_ACCEPTED)


def check_explanation(preset: str, offer: dict[str, Any]) -> None:
    """The score is the sum of its terms, and what decided is named with what would change it."""
    status, reason = offer["status"], condition(offer, "Admitted")["reason"]
    items: dict[str, dict[str, Any]] = {}
    for item in status["explanation"]:
        items.setdefault(item["type"], {})[item["name"]] = item
    assert len(status["explanation"]) <= MOST_ITEMS
    terms = [Decimal(item["value"]) for item in items.get("Term", {}).values()]
    assert bool(terms) == has_score(preset, offer)
    if terms or "admission" in status:
        assert Decimal(status["score"]) == sum(terms, Decimal(0))
    else:
        assert "score" not in status
    if "admission" in status:
        assert set(items["Constraint"]) == {"SizeClass"}
        assert "Counterfactual" not in items
    else:
        # A policy that refuses what it has no room for names what is missing.
        named = set(items["Constraint"])
        assert reason in named or (reason == Reason.CAPACITY_FULL and named <= {"WaitingForJobSlot"})
        assert all(item["message"] for item in items["Constraint"].values())
        assert items["Counterfactual"].keys() <= named


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_page_has_a_row_for_each_example_and_a_column_for_each_preset(folder: str) -> None:
    shown = [row for row in rows() if row.path.parent == ROOT / folder]
    assert [row.path for row in shown] == sorted((ROOT / folder).glob("*.yaml"))
    for row in shown:
        assert sorted(row.answers) == presets.names()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("preset", presets.names())
def test_the_examples_get_the_answers_that_the_page_states(bench: Bench, preset: str, folder: str) -> None:
    bench.node(labels=H100)
    bench.preset(preset)
    stated, given = {}, {}
    for row in rows():
        if row.path.parent != ROOT / folder:
            continue
        name = str(bench.create(yaml.safe_load(row.path.read_text(encoding="utf-8")))["metadata"]["name"])
        offer = bench.until(name, lambda o: bool(condition(o, "Admitted")), "answered")
        check_explanation(preset, offer)
        stated[name], given[name] = row.answers[preset], said(offer)
    assert given == stated
