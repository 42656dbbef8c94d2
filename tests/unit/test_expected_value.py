"""What the preset expected-value expects of an offer, against the formulas of its page worked out on their own."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest

from core_builders import policy_spec, spec_of
from taskoffer.api.reasons import Reason
from taskoffer.decision.evaluate import Evaluation, evaluate

BILLION = 10**9


def judged(**fields: Any) -> Evaluation:
    return evaluate(spec_of(**fields), policy_spec(preset="expected-value"))


def reasons(**fields: Any) -> set[Reason]:
    return {refusal.reason for refusal in judged(**fields).refusals}


LLAMA_LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Weights of the linear layers of Llama 3.1 8B: q and o, k and v, gate, up and down, in 32 blocks."""
LLAMA_ADAPTER = 32 * 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
"""LoRA of rank 64 on all of them."""
LLAMA_FLOPS = 6 * LLAMA_LINEAR + 8 * LLAMA_ADAPTER + 9 * 400 * 4096 * 32 + 6 * 128256 * 4096
"""For each of 400 tokens: linear layers, adapter, attention, output layer, as docs/explanation/prediction.md has it."""


SPREAD = 0.25
"""The preset's durationSpread."""


def seconds_of(rows: int, gpus: int) -> float:
    """Start, and training with a tenth for evaluation at 35 % of an H100's peak."""
    return 300 + 1.10 * rows * 400 * LLAMA_FLOPS / (gpus * 0.35 * 989e12)


def worth_of(rows: int, hours: float, gpus: int, weight: float = 0.35, value: float | None = None) -> float:
    """(P x value - (1 - P) x 1) / GPU-hours, with P = 0.95 x Phi(ln(limit / predicted) / SPREAD)."""
    seconds = seconds_of(rows, gpus)
    won = 2 * math.sqrt(hours * 8.03) * weight if value is None else value
    chance = 0.95 * NormalDist().cdf(math.log(hours * 3600 / seconds) / SPREAD)
    return (chance * won - (1 - chance)) / (gpus * seconds / 3600)


LLAMA = {"model": "meta-llama/Llama-3.1-8B", "parameters": 8_030_000_000}


@pytest.mark.parametrize(
    ("kind", "weight", "rows", "hours", "gpus", "value"),
    [
        ("InstructText", 0.35, 100_000, 5, 1, None),
        ("InstructText", 0.35, 100_000, 5, 2, None),
        ("Chat", 0.35, 100_000, 5, 2, None),
        ("InstructText", 0.35, 300_000, 7.5, 1, None),
        ("InstructText", 0.35, 300_000, 6, 1, None),
        ("InstructText", 0.35, 100_000, 5, 1, 30.0),
    ],
)
def test_an_offer_is_worth_its_expected_value_for_each_gpu_hour(
    kind: str, weight: float, rows: int, hours: float, gpus: int, value: float | None
) -> None:
    owner = {"spec": {"value": str(value)}} if value is not None else {}
    score = judged(**LLAMA, task_type=kind, rows=rows, hours=hours, gpus=gpus, **owner).score
    assert score is not None
    assert float(score.total) == pytest.approx(max(0.0, worth_of(rows, hours, gpus, weight, value)), abs=2e-4)


@pytest.mark.parametrize(
    ("rows", "hours", "gpus"),
    # On one GPU 300,000 rows take 5.05 hours: within 8 as well, but not surely enough.
    [(100_000, 5, 1), (300_000, 9, 1), (300_000, 8, 2), (300_000, 5, 2), (300_000, 4, 4), (300_000, 2, 8)],
)
def test_the_gpus_of_the_highest_expected_value_are_taken(rows: int, hours: float, gpus: int) -> None:
    in_time = [n for n in (1, 2, 4, 8) if seconds_of(rows, n) <= hours * 3600 - 180]
    assert max(in_time, key=lambda n: worth_of(rows, hours, n)) == gpus
    assert judged(**LLAMA, rows=rows, hours=hours).gpus == gpus


def test_what_is_expected_to_cost_more_than_it_earns_is_refused() -> None:
    # 0.95 x 0.05 - 0.05 x 1 is below nothing, 0.95 x 0.06 - 0.05 x 1 above.
    cheap = {**LLAMA, "rows": 10_000, "hours": 15}
    assert reasons(**cheap, spec={"value": "0.05"}) == {Reason.SCORE_TOO_LOW}
    assert reasons(**cheap, spec={"value": "0.06"}) == set()


def test_the_gpus_by_size_count_where_nothing_is_predicted() -> None:
    found = {b: judged(model="x/llama", parameters=b * BILLION).gpus for b in (4, 12, 40, 41)}
    assert found == {4: 1, 12: 2, 40: 4, 41: 8}


PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "expected-value.md"


def example_rows() -> list[str]:
    """Return the rows of the page's example, from the formulas that stand above it there."""
    rows = []
    for gpus in (1, 2, 4, 8):
        hours = seconds_of(300_000, gpus) / 3600
        in_time = NormalDist().cdf(math.log(6 / hours) / SPREAD)
        chance, taken = 0.95 * in_time, gpus * hours
        gain, loss = chance * 2 * math.sqrt(6 * 8.03) * 0.35 / taken, -(1 - chance) / taken
        rows.append(
            f"| {gpus} | {hours:.2f} h | {in_time:.3f} | {chance:.3f} | {taken:.2f} | {gain:.4f} | {loss:.4f} | "
            f"{gain + loss:.4f} |"
        )
    return rows


def test_the_pages_example_follows_from_its_formulas_and_is_what_the_program_says() -> None:
    shown = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(("| 1 |", "| 2 |", "| 4 |", "| 8 |"))
    ]
    assert shown == example_rows()
    for row in shown:
        gpus, *_, gain, loss, total = row.strip("| ").split(" | ")
        score = judged(**LLAMA, rows=300_000, hours=6, gpus=int(gpus)).score
        assert score is not None
        assert [float(term.value) for term in score.terms] == pytest.approx([float(gain), float(loss)], abs=1.01e-4)
        assert float(score.total) == pytest.approx(float(total), abs=1.01e-4)
    assert judged(**LLAMA, rows=300_000, hours=6).gpus == 2


def test_what_nothing_is_predicted_of_has_no_score_and_is_not_refused_for_it() -> None:
    found = judged(**LLAMA, hours=6)
    assert found.score is None
    assert found.rank == 0
    assert found.refusals == ()
