"""Which rows a step has is a function of seed and position; nothing here needs torch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskoffer_trainer.stream import SampleStream, StepBatches, StepPlan

pytestmark = pytest.mark.trainer

LENGTHS = [row % 50 for row in range(200)]


def positions(stream: SampleStream, first: int, count: int) -> list[int]:
    return [stream[position] for position in range(first, first + count)]


def test_every_epoch_has_an_order_of_its_own_also_when_entered_in_its_middle() -> None:
    orders = [SampleStream(200, 1).order(epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(200)) for order in orders)
    assert positions(SampleStream(200, 1), 230, 170) == orders[1][30:]
    assert positions(SampleStream(200, 1), 190, 20) == orders[0][190:] + orders[1][:10]


def test_the_order_depends_on_the_seed_alone() -> None:
    assert SampleStream(200, 1).order(0) == SampleStream(200, 1).order(0) != SampleStream(200, 2).order(0)


def test_rows_of_like_length_come_together_within_a_group() -> None:
    plain, grouped = SampleStream(200, 1).order(0), SampleStream(200, 1, LENGTHS).order(0)
    lengths = [LENGTHS[row] for row in grouped[:64]]
    assert lengths == sorted(lengths, reverse=True)
    assert set(grouped[:64]) == set(plain[:64])


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "steps", "seen"),
    [
        (10, 4, 1.0, -1, 3, 10),
        (10, 4, 2.0, -1, 5, 20),
        (10, 4, 0.5, -1, 2, 5),
        (3, 4, 1.0, -1, 1, 3),
        (10, 4, 1.0, 7, 7, 28),
        (7, 1, 0.1, -1, 1, 1),
    ],
)
def test_a_plan_counts_steps_by_epochs_or_takes_their_number(
    rows: int, batch: int, epochs: float, max_steps: int, steps: int, seen: int
) -> None:
    plan = StepPlan.of(rows, batch, epochs, max_steps)
    assert (plan.total_steps, plan.total_rows) == (steps, seen)
    assert sum(len(plan.span(step)) for step in range(plan.total_steps)) == seen


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 17),
    epochs=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 4]),
    sorted_rows=st.booleans(),
)
def test_every_row_is_seen_once_in_an_epoch_however_many_processes_share_a_step(
    rows: int, batch: int, epochs: int, ranks: int, sorted_rows: bool
) -> None:
    plan = StepPlan.of(rows, batch, epochs, -1)
    lengths = [(row * 7) % 11 for row in range(rows)] if sorted_rows else None
    shares = [list(StepBatches(SampleStream(rows, 3), plan, rank, ranks, lengths)) for rank in range(ranks)]
    alone = list(StepBatches(SampleStream(rows, 3), plan))
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Counter(row for step in alone for row in step) == dict.fromkeys(range(rows), epochs)


def test_a_run_that_goes_on_has_the_steps_that_were_left() -> None:
    plan = StepPlan.of(50, 8, 2.0, -1)
    whole = list(StepBatches(SampleStream(50, 9), plan, 1, 2, LENGTHS))
    assert list(StepBatches(SampleStream(50, 9), plan, 1, 2, LENGTHS, first=5)) == whole[5:]
