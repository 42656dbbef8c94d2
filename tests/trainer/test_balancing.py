"""A mixture's experts are kept in balance as the library does it, however a step is cut."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Found, found_by
from .preloaded import Preloader

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def found(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, libraries: Preloader) -> Found:
    return found_by("balance_probes.py", base_config, tmp_path_factory.mktemp("balance"), libraries)


def test_the_balance_of_experts_is_trained_as_trl_does_with_one_row_at_once_however_a_step_is_cut(found: Found) -> None:
    said = found["balance"]
    for rows in ("1", "2", "4"):
        assert said[rows] == pytest.approx(said["plain"], rel=1e-4)
    assert said["packed 4"] == pytest.approx(said["packed 1"], rel=1e-4)
    # Two of four experts are chosen for a token: the loss of a perfect balance is 2, with a coefficient of 0.5.
    assert said["plain"][0] > said["plain without"][0] + 1


def test_the_balance_of_experts_counts_by_pairs_however_their_step_is_cut(found: Found) -> None:
    for said in found["balance_of_pairs"].values():
        assert said["pieces"] == pytest.approx(said["whole"], rel=1e-4)
        assert said["single"] == pytest.approx(said["plain"], rel=1e-5)
    without, balanced = (found["balance_of_pairs"][key]["whole"][0] for key in ("0.0", "0.5"))
    assert balanced > without + 1
