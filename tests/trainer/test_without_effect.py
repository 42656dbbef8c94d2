"""A setting that a method does nothing with is told, and one that it does something with is not."""

from __future__ import annotations

from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.without_effect import without_effect

pytestmark = pytest.mark.trainer

ALL: dict[str, Any] = {"packing": True, "labelSmoothing": 0.1, "perDeviceTrainMaxTokens": 4096}
DROPOUT, PACKING, SMOOTHING = "lora.loraDropout", "train.packing", "train.labelSmoothing"
TOLD: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("InstructText", ALL, {SMOOTHING: "NoLabelSmoothing"}),
    ("Chat", ALL, {SMOOTHING: "NoLabelSmoothing"}),
    ("DPO", ALL, {DROPOUT: "NoDropoutInDPO", PACKING: "NoPackingInDPO", SMOOTHING: "NoLabelSmoothing"}),
    ("DPO", {**ALL, "lossType": "robust"}, {DROPOUT: "NoDropoutInDPO", PACKING: "NoPackingInDPO"}),
    ("GRPO", ALL, {PACKING: "NoPacking", SMOOTHING: "NoLabelSmoothing"}),
    (
        "Image",
        ALL,
        {PACKING: "NoPacking", SMOOTHING: "NoLabelSmoothing", "train.perDeviceTrainMaxTokens": "NoTokens"},
    ),
]


def run_of(task: str, dropout: float, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "jobName": "job",
            "taskID": "task",
            "taskType": task,
            "gpus": 1,
            "model": {"name": "acme/model", "path": "/model"},
            "data": {"path": "/data"},
            "lora": {"loraDropout": dropout},
            "train": train,
            "outputDir": "/out",
            "checkpointDir": "/checkpoints",
        }
    )


@pytest.mark.parametrize(("task", "train", "told"), TOLD)
def test_what_a_method_does_nothing_with_is_told(task: str, train: dict[str, Any], told: dict[str, str]) -> None:
    clamps = without_effect(run_of(task, 0.1, **train))
    assert {clamp.field: clamp.reason for clamp in clamps} == told
    for clamp in clamps:
        assert clamp.requested != clamp.effective
        assert clamp.message


@pytest.mark.parametrize("task", ["InstructText", "Chat", "DPO", "GRPO", "Image"])
def test_of_the_defaults_nothing_is_told(task: str) -> None:
    assert without_effect(run_of(task, 0.0)) == ()
