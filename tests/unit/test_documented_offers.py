"""The offers that the documentation shows are ones that the shipped policies take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_builders import policy_spec
from taskoffer import presets
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.taskoffer import TaskOfferSpec
from taskoffer.decision.evaluate import evaluate

ROOT = Path(__file__).resolve().parents[2]


def _yaml(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.M | re.S)


def documented() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the manifest of each offer of the how-to pages and of the examples of types."""
    texts = [(page, body) for page in ROOT.glob("docs/howto/*.md") for body in _yaml(page.read_text("utf-8"))]
    texts += [(path, path.read_text("utf-8")) for path in ROOT.glob("examples/types/*.yaml")]
    for path, text in sorted(texts):
        for manifest in yaml.safe_load_all(text):
            if isinstance(manifest, dict) and manifest.get("kind") == "TaskOffer":
                yield f"{path.name}: {manifest['metadata']['name']}", manifest["spec"]


OFFERS = dict(documented())


@pytest.mark.parametrize("preset", presets.names())
@pytest.mark.parametrize("name", OFFERS)
def test_an_offer_to_copy_is_taken_by_every_preset_that_takes_its_type(name: str, preset: str) -> None:
    spec, policy = TaskOfferSpec.model_validate(OFFERS[name]), policy_spec(preset=preset)
    accepted = {rule.name for rule in policy.task_types if rule.accepted}
    if spec.task_type not in accepted or spec.trainer is not None:
        # No preset has the trainers block that an offer with its own trainer needs; its page shows one.
        return
    # The examples are for the lab's node and say how many of its GPUs they take.
    allowed = {Reason.GPU_COUNT_NOT_ALLOWED} if spec.gpu_count is not None else set()
    refusals = [r for r in evaluate(spec, policy).refusals if r.reason not in allowed]
    assert [f"{r.reason}: {r.message}" for r in refusals] == []


def test_every_task_type_is_documented_with_an_offer() -> None:
    assert {OFFERS[name]["taskType"] for name in OFFERS} == {"InstructText", "Chat", "DPO", "GRPO", "Image"}
