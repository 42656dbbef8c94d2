"""Shares of a micro-batch: "batch -10 %" and "batch +20 %" of the first strategy document, requested and effective."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskoffer.decision.micro_batch import Bounds, Next, fewer_rows, more_rows

TENTH, FIFTH = Decimal("0.1"), Decimal("0.2")
SETTLE = timedelta(minutes=10)

FEWER = [
    # Rows, unit; the next size, the reason, a part of the message
    (20, 1, 18, None, ""),
    (16, 1, 14, "BatchClamped", "16 -10 % is 14.4; rows are whole"),
    (4, 1, 3, "BatchClamped", "4 -10 % is 3.6; rows are whole"),
    (2, 1, 1, "BatchClamped", "2 -10 % is 1.8; rows are whole"),
    (1, 1, 1, "BatchAtMinimum", "1 at a time is the fewest that go through together"),
    (16, 4, 12, "BatchClamped", "rows are whole in groups of 4"),
    (40, 4, 36, None, ""),
    (4, 4, 4, "BatchAtMinimum", "4 at a time is the fewest"),
]


@pytest.mark.parametrize(("size", "unit", "effective", "reason", "message"), FEWER)
def test_a_tenth_less_is_one_unit_less_at_least(
    size: int, unit: int, effective: int, reason: str | None, message: str
) -> None:
    check(fewer_rows(size, TENTH, Bounds(unit, 64)), f"{size} -10 %", effective, reason, message)


MORE = [
    # Rows, unit, the most that fit, seconds since the last decrease; the next size, the reason, a part of the message
    (10, 1, 64, None, 12, None, ""),
    (4, 1, 64, None, 5, "BatchClamped", "4 +20 % is 4.8; rows are whole"),
    (1, 1, 64, None, 2, "BatchClamped", "1 +20 % is 1.2; rows are whole"),
    (8, 4, 64, None, 12, "BatchClamped", "8 +20 % is 9.6; rows are whole in groups of 4"),
    (20, 1, 22, None, 22, "BatchClamped", "20 +20 % is 24; rows are whole and at most 22, which fit"),
    (8, 1, 8, None, 8, "BatchAtMaximum", "8 at a time is the most that is predicted to fit"),
    (12, 4, 12, None, 12, "BatchAtMaximum", "12 at a time is the most"),
    (8, 1, 64, 599, 8, "BatchSettles", "it was lowered 599 s ago, and nothing is added within 600 s of that"),
    (10, 1, 64, 600, 12, None, ""),
]


@pytest.mark.parametrize(("size", "unit", "most", "ago", "effective", "reason", "message"), MORE)
def test_a_fifth_more_is_one_unit_more_at_least_and_never_more_than_fits_or_too_soon(
    size: int, unit: int, most: int, ago: int | None, effective: int, reason: str | None, message: str
) -> None:
    since = timedelta(seconds=ago) if ago is not None else None
    found = more_rows(size, FIFTH, Bounds(unit, most), since, SETTLE)
    check(found, f"{size} +20 %", effective, reason, message)


def check(found: Next, requested: str, effective: int, reason: str | None, message: str) -> None:
    assert found.size == effective
    if reason is None:
        assert found.clamp is None
        return
    assert found.clamp is not None
    said = found.clamp
    assert (said.field, said.requested, said.effective, said.reason) == (
        "tuning.microBatch",
        requested,
        str(effective),
        reason,
    )
    assert message in said.message


@given(
    units=st.integers(1, 200), unit=st.sampled_from([1, 2, 4, 8]), most=st.integers(1, 200), share=st.integers(1, 99)
)
def test_a_size_moves_where_it_can_stays_within_its_bounds_and_whole(
    units: int, unit: int, most: int, share: int
) -> None:
    size, bounds, part = min(units, most) * unit, Bounds(unit, most * unit), Decimal(share) / 100
    fewer = fewer_rows(size, part, bounds).size
    more = more_rows(size, part, bounds, None, SETTLE).size
    assert fewer < size or size == unit
    assert more > size or size == bounds.most
    assert unit <= fewer <= size <= more <= bounds.most
    assert fewer % unit == more % unit == 0
