"""What docs/explanation/presets.md states of the examples under each preset, to be held against the operator."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from operator_bench import Bench, condition
from taskoffer.api.reasons import Reason

ROOT = Path(__file__).resolve().parents[1]
_PAGE = ROOT / "docs" / "explanation" / "presets.md"
_SECTION = "The examples under each preset"
FOLDERS = ("examples", "examples/market")
_MOST_ITEMS = 16


@dataclass(frozen=True)
class Row:
    """What the page says of one example: its file, and the answer under each preset."""

    path: Path
    answers: dict[str, str]


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return the rows of all tables in the page's section."""
    text = _PAGE.read_text(encoding="utf-8")
    section = text.partition(f"## {_SECTION}\n")[2].partition("\n## ")[0]
    found: list[Row] = []
    columns: list[str] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = [cell.strip("`") for cell in cells[1:]]
        elif link := re.search(r"\]\((\S+\.yaml)\)", cells[0]):
            path = (_PAGE.parent / link[1]).resolve()
            found.append(Row(path, dict(zip(columns, cells[1:], strict=True))))
    return tuple(found)


def _said(offer: dict[str, Any]) -> str:
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


def _has_score(preset: str, offer: dict[str, Any]) -> bool:
    """Tell whether the preset's formula can be worked out: not without rows, or without the family's success rate."""
    if preset == "expected-value":
        return "rows" in offer["spec"]["dataset"]
    return bool(condition(offer, "Admitted")["reason"] != Reason.MODEL_FAMILY_NOT_ACCEPTED)


def _check_explanation(preset: str, offer: dict[str, Any]) -> None:
    """The score is the sum of its terms, and what decided is named with what would change it."""
    status, reason = offer["status"], condition(offer, "Admitted")["reason"]
    items: dict[str, dict[str, Any]] = {}
    for item in status["explanation"]:
        items.setdefault(item["type"], {})[item["name"]] = item
    assert len(status["explanation"]) <= _MOST_ITEMS
    terms = [Decimal(item["value"]) for item in items.get("Term", {}).values()]
    assert bool(terms) == _has_score(preset, offer)
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


@dataclass(frozen=True)
class Answers:
    """What the page states for a folder's examples, what they were given, and which of them are admitted."""

    stated: dict[str, str]
    given: dict[str, str]
    admitted: list[dict[str, Any]]


def answers(bench: Bench, preset: str, folder: str) -> Answers:
    """Create a folder's examples, each after the answer to the one before, and check how the answers are explained."""
    found = Answers({}, {}, [])
    for row in rows():
        if row.path.parent != ROOT / folder:
            continue
        name = str(bench.create(yaml.safe_load(row.path.read_text(encoding="utf-8")))["metadata"]["name"])
        offer = bench.until(name, lambda o: bool(condition(o, "Admitted")), "answered")
        _check_explanation(preset, offer)
        found.stated[name], found.given[name] = row.answers[preset], _said(offer)
        if "admission" in offer["status"]:
            found.admitted.append(offer)
    return found
