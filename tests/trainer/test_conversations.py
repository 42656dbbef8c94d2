"""Conversations through the real entry point: the held-out loss falls, the template goes with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskoffer_trainer.chat_template import named_template

from .conftest import MakeTraining, Outcome, Training, side_by_side

pytestmark = pytest.mark.trainer


def chat(fixtures_dir: Path, template: str, **data: Any) -> dict[str, Any]:
    return {
        "taskType": "Chat",
        "data": {
            "path": str(fixtures_dir / "chat" / "train.jsonl"),
            "instruct": None,
            "chat": {"chatTemplate": template},
            **data,
        },
        "train": {"maxLength": 256, "maxSteps": 16},
        "samplePrompts": None,
    }


@pytest.fixture(scope="module")
def runs(shared_training: MakeTraining, fixtures_dir: Path) -> dict[str, tuple[Training, Outcome]]:
    asked = {name: chat(fixtures_dir, name) for name in ("chatml", "llama-3")}
    trainings = {name: shared_training(name, **changes) for name, changes in asked.items()}
    outcomes = side_by_side(*trainings.values())
    return {name: (one, outcome) for (name, one), outcome in zip(trainings.items(), outcomes, strict=True)}


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_the_held_out_loss_of_conversations_falls(name: str, runs: dict[str, tuple[Training, Outcome]]) -> None:
    training, outcome = runs[name]
    assert outcome.code == 0, outcome.log
    assert outcome.termination["evalLossAfter"] < outcome.termination["evalLossBefore"] - 0.3
    template = named_template(name)
    assert template is not None
    assert (training.adapter / "chat_template.jinja").read_text() == template.text
    manifest = json.loads((training.adapter / "manifest.json").read_text())
    assert "chat_template.jinja" in manifest["files"]
    assert manifest["sampleAnswers"][0]["prompt"]


def test_a_template_whose_markers_the_model_lacks_is_reported(runs: dict[str, tuple[Training, Outcome]]) -> None:
    """The tiny model knows ChatML's markers, and those of no other template."""
    reported = {
        name: [clamp["effective"] for clamp in outcome.termination["clamps"] if "chatTemplate" in clamp["field"]]
        for name, (_, outcome) in runs.items()
    }
    assert reported == {"chatml": [], "llama-3": ["llama-3, 3 of 3 markers as text"]}


REFUSED = [
    ({"chat": {"chatTemplate": "klingon"}}, 64, "ChatTemplateUnknown", "data.chat.chatTemplate"),
    ({"chat": {"chatColumn": "messages"}}, 65, "ColumnMissing", "'messages'"),
    ({"chat": {"chatRoleField": "role"}}, 65, "FieldMissing", "chat.chatRoleField"),
    ({"minRows": 1000}, 65, "TooFewRows", "data.minRows"),
    ({"fileFormat": "zip"}, 64, "ConfigInvalid", "Chat reads json, jsonl, csv, parquet or hf"),
]


@pytest.mark.parametrize(("change", "code", "reason", "word"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_does_not_fit_is_refused_before_any_model_is_loaded(
    change: dict[str, Any], code: int, reason: str, word: str, training: MakeTraining, fixtures_dir: Path
) -> None:
    outcome = training(**chat(fixtures_dir, "chatml", **change)).run()
    assert (outcome.code, outcome.termination["reason"]) == (code, reason), outcome.log
    assert word in outcome.termination["message"]
    assert "model:" not in outcome.log
