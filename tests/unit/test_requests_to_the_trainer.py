"""What is harmful or impossible as the strategy documents write it, as far as the trainer is who says so.

The rows that the operator changes are in ``test_strategy_requests.py``. Here are those that the trainer changes while
it runs, those that change a running job, and those that are claims.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from taskoffer.api.contract import (
    AdaptiveLR,
    Clamp,
    FigureChange,
    Report,
    RunConfig,
    Termination,
    TrainSettings,
    Tuning,
)
from taskoffer.decision.memory import Layout
from taskoffer.decision.micro_batch import Bounds, fewer_rows, more_rows
from taskoffer_trainer.attention import attention_clamp
from taskoffer_trainer.fallback import lowered
from taskoffer_trainer.schedule import LearningRate
from taskoffer_trainer.tuning import MicroBatch

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")


def run(**changes: Any) -> RunConfig:
    """Return a run with the first document's settings of a small model."""
    asked = {
        "jobName": "job",
        "taskID": "task",
        "taskType": "InstructText",
        "gpus": 2,
        "model": {"name": "acme/model", "path": "/m"},
        "data": {"path": "/d", "instruct": {}},
        "lora": {"r": 358, "loraAlpha": 90, "loraDropout": 0.05},
        "train": {"learningRate": 4.8e-4, "emaDecay": 0.9999, "adaptiveLr": {}, "attnImplementation": ATTENTION},
        "outputDir": "/o",
        "checkpointDir": "/c",
    }
    return RunConfig.model_validate(asked | changes)


def changing(sizes: list[int]) -> Clamp | None:
    """Return what is said of compiling after steps with so many rows at once."""
    from taskoffer_trainer.compiling import Compiling

    compiling = Compiling()
    for size in sizes:
        compiling.choose(object(), size)
    return compiling.clamp()


def attention_without_packages() -> Clamp | None:
    """Return what is said of attention on a machine without a GPU."""
    weights = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), parameters=lambda: iter([weights]))
    return next(iter(attention_clamp(run(), model)), None)


def after(profile: int, field: str) -> Clamp | None:
    """Return what is said of a setting after failures that lead to this profile."""
    return next((clamp for clamp in lowered(run(), profile)[1] if clamp.field == field), None)


def more(size: int, since_fewer: timedelta | None) -> Clamp | None:
    """Return what is said of a fifth more where eight rows fit."""
    return more_rows(size, Decimal("0.2"), Bounds(1, 8), since_fewer, timedelta(minutes=10)).clamp


ROWS: list[tuple[str, Callable[[], Clamp | None], tuple[str, str, str, str], str]] = [
    # What is asked, what says so; field, requested, effective and reason; a part of the message.
    (
        "torch.compile with a batch that changes",
        lambda: changing([16, 8, 16, 8]),
        ("train.torchCompile", "true", "false", "CompileOff"),
        "The rows at once have changed 3 times; each change may compile it again.",
    ),
    (
        "flash attention: true, where its package is absent",
        attention_without_packages,
        ("train.attnImplementation", ", ".join(ATTENTION), "sdpa", "AttentionFallback"),
        "There is no GPU for flash_attention_3 here, or no package of it.",
    ),
    (
        "LR 4e-4 x1.2, once gradients were not finite",
        lambda: after(3, "train.learningRate"),
        ("train.learningRate", "0.00048", "0.00024", "FallbackProfile"),
        "an earlier attempt failed with what was asked for",
    ),
    (
        "LR x1.05, once gradients were not finite",
        lambda: after(3, "train.adaptiveLr"),
        ("train.adaptiveLr", "on", "none", "FallbackProfile"),
        "goes on from its last checkpoint with less",
    ),
    (
        "EMA .9999, once gradients were not finite",
        lambda: after(3, "train.emaDecay"),
        ("train.emaDecay", "0.9999", "none", "FallbackProfile"),
        "goes on from its last checkpoint with less",
    ),
    (
        "lora_dropout .05, once memory has run out",
        lambda: after(1, "lora.loraDropout"),
        ("lora.loraDropout", "0.05", "0", "FallbackProfile"),
        "Profile 1",
    ),
    (
        "memory > 90 %: batch -10 %, of one row",
        lambda: fewer_rows(1, Decimal("0.1"), Bounds(1, 8)).clamp,
        ("tuning.microBatch", "1 -10 %", "1", "BatchAtMinimum"),
        "1 at a time is the fewest that go through together",
    ),
    (
        "efficiency < 80 %: batch +20 %, of four rows",
        lambda: more(4, None),
        ("tuning.microBatch", "4 +20 %", "5", "BatchClamped"),
        "4 +20 % is 4.8; rows are whole",
    ),
    (
        "efficiency < 80 %: batch +20 %, of all that fit",
        lambda: more(8, None),
        ("tuning.microBatch", "8 +20 %", "8", "BatchAtMaximum"),
        "8 at a time is the most that is predicted to fit",
    ),
    (
        "efficiency < 80 %: batch +20 %, while memory > 90 % has just taken some",
        lambda: more(4, timedelta(minutes=9)),
        ("tuning.microBatch", "4 +20 %", "4", "BatchSettles"),
        "it was lowered 540 s ago, and nothing is added within 600 s of that",
    ),
]


@pytest.mark.parametrize(("asked", "said", "fields", "message"), ROWS, ids=[row[0] for row in ROWS])
def test_what_a_running_job_cannot_take_literally_is_changed_and_told(
    asked: str, said: Callable[[], Clamp | None], fields: tuple[str, str, str, str], message: str
) -> None:
    clamp = said()
    assert clamp is not None, asked
    assert (clamp.field, clamp.requested, clamp.effective, clamp.reason) == fields
    assert message in clamp.message


def test_compiling_goes_on_through_two_changes_of_the_rows_at_once() -> None:
    assert changing([16, 8, 16]) is None


def test_a_learning_rate_of_4e_4_times_1_2_is_kept_until_an_attempt_has_failed() -> None:
    assert after(2, "train.learningRate") is None
    assert lowered(run(), 2)[0].train.learning_rate == 4.8e-4


@pytest.mark.parametrize(("losses", "factor"), [(range(200, 0, -1), 1.5), ([1.0] * 200, 0.05)])
def test_the_factor_on_the_learning_rate_stays_within_what_its_clamp_says(losses: list[float], factor: float) -> None:
    rate = LearningRate(TrainSettings(adaptive_lr=AdaptiveLR(increase=1.05, decrease=0.8)), 1000)
    factors = []
    for loss in losses:
        rate.observe(float(loss))
        factors.append(rate.factor)
    assert factors[-1] == factor
    assert all(0.05 <= one <= 1.5 for one in factors)


def test_one_evaluation_without_an_improvement_lowers_no_learning_rate() -> None:
    rate = LearningRate(TrainSettings(adaptive_lr=AdaptiveLR(increase=1.05, decrease=0.8)), 1000)
    assert [rate.observe(loss) for loss in (2.0, 2.0, 2.0)] == [1.05, None, pytest.approx(1.05 * 0.8)]


# "Batch -10 %" and "+20 %" of a running job


def test_a_tenth_off_one_row_is_no_request_that_can_be_written() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Tuning(generation=1, micro_batch=int(1 * 0.9))


@pytest.mark.parametrize(
    ("what", "rows", "asked", "effective"),
    [
        ("a fifth more than four is four", MicroBatch(4), int(4 * 1.2), 4),
        ("a tenth off sixteen", MicroBatch(16), int(16 * 0.9), 14),
        ("completions of a prompt stay together, downwards", MicroBatch(16, unit=4), int(16 * 0.9), 12),
        ("and are never fewer than one group", MicroBatch(4, unit=4), int(4 * 0.9), 4),
        ("no more than memory has allowed", MicroBatch(8, fits=8), int(8 * 1.2), 8),
        ("no more than a step has", MicroBatch(16, most=16), int(16 * 1.2), 16),
    ],
)
def test_the_rows_at_once_of_a_running_job_follow_a_request_as_far_as_they_can(
    what: str, rows: MicroBatch, asked: int, effective: int
) -> None:
    rows.asked = asked
    assert rows.size == effective, what


def test_what_did_not_fit_is_remembered_as_a_bound_on_later_requests() -> None:
    rows = MicroBatch(12, unit=4)
    assert rows.too_large(12)
    assert (rows.fits, rows.size) == (4, 4)
    rows.asked = 32
    assert rows.size == 4
    assert not rows.too_large(4)


# Claims


def test_nothing_says_that_a_model_is_split_within_its_layers() -> None:
    """Tensor parallelism: GPUs hold copies of a model, or shares of its parameters."""
    assert {Layout(4).name, Layout(4, sharded=True).name} == {"4 GPUs, DDP", "4 GPUs, FSDP"}
    crds = "".join(path.read_text("utf-8") for path in (ROOT / "crds").glob("*.yaml"))
    assert not re.search(r"tensor.?parallel|\btpSize\b", crds, flags=re.I)
    page = " ".join((ROOT / "docs" / "explanation" / "presets.md").read_text("utf-8").split())
    assert '"Tensor parallelism" there is none: GPUs hold copies of the model, or shares of its parameters.' in page


def test_what_is_reported_of_a_result_is_measured_and_promises_no_gain() -> None:
    """Accuracy +40 to 60 %, first place above 95 %: the held-out loss before and after, and nothing else."""
    assert {"eval_loss_before", "eval_loss_after"} <= set(Termination.model_fields)
    assert {"before", "after"} <= set(FigureChange.model_fields)
    for reported in (Termination, Report, FigureChange):
        assert not re.search(r"accuracy|gain|probability|win_?rate", " ".join(reported.model_fields))
