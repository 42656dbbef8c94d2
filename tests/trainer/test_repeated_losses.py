"""Losses whose noise is fixed: how near a loaded picture adapter has to come to what it did in training."""

from __future__ import annotations

import math

import pytest

from taskoffer.api.contract import ExitCode
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.verify import check_repeated

pytestmark = pytest.mark.trainer

# Loss after loading, in training, and of the base model. Real losses of SDXL are near 0.1, Flux's are a few tenths.
TAKEN = [
    (0.1, 0.1, 0.105),
    # A quarter of what the training changed is 0.00125, half a percent 0.0005.
    (0.1004, 0.1, 0.105),
    (0.0996, 0.1, 0.105),
    # Rounding is allowed where the training changed next to nothing, and where nothing is known of the base model.
    (0.10004, 0.1, 0.1),
    (0.1004, 0.1, None),
    (0.7, None, 0.8),
]
REFUSED = [
    # 19 % off, which 2 % of at least 1 would take.
    (0.119, 0.1, 0.105),
    (0.119, 0.1, None),
    (0.081, 0.1, 0.105),
    (0.1006, 0.1, 0.105),
    # As the base model: the adapter did not arrive.
    (0.105, 0.1, 0.105),
    (0.101, 0.1, 0.101),
    (0.1002, 0.1, 0.1002),
    # 0.0001 is a quarter of the change.
    (0.10015, 0.1, 0.1004),
    (math.nan, 0.1, 0.105),
    (math.inf, None, None),
]


@pytest.mark.parametrize(("loss", "measured", "before"), TAKEN)
def test_a_loss_that_repeats_is_taken(loss: float, measured: float | None, before: float | None) -> None:
    check_repeated(loss, measured, before)


@pytest.mark.parametrize(("loss", "measured", "before"), REFUSED)
def test_a_loss_that_does_not_repeat_is_refused_with_the_numbers(
    loss: float, measured: float | None, before: float | None
) -> None:
    with pytest.raises(TrainerError) as refused:
        check_repeated(loss, measured, before)
    assert refused.value.code is ExitCode.VERIFY_FAILED
    if math.isfinite(loss):
        assert f"its held-out loss is {loss:.6f} after loading, and was 0.100000" in str(refused.value)
