"""Which evaluations of rewards count, and how completions are found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskoffer_trainer.drawing import Completion
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.kept_completions import KeptCompletions
from taskoffer_trainer.reward_figures import RewardFigures, RewardSums

pytestmark = pytest.mark.trainer

WEIGHTS = {"right": 0.75, "brief": 0.25, "told": 0.0}
ALL = {"right": [1.0, 0.0], "brief": [0.5, None], "told": [7.0, 7.0]}
BASE = {"reward_right": 0.1, "reward_brief": 0.1, "eval_loss": -0.1, "reward": 0.1, "kl": 0.0}


def figures(base: dict[str, float] | None = BASE, limit: int = 3) -> RewardFigures:
    made = RewardFigures(WEIGHTS, 0.5, limit)
    if base is not None:
        made.expect(base)
    return made


def sums(**changes: Any) -> list[float]:
    made = RewardSums(list(WEIGHTS))
    made.add({**ALL, **changes})
    made.diverge(1.0, 10)
    return made.numbers()


def test_the_score_is_the_weighted_sum_of_the_means_less_the_divergence() -> None:
    found = figures().of(sums())
    assert found == pytest.approx(
        {
            "reward_right": 0.5,
            "reward_brief": 0.5,
            "reward_told": 7.0,
            "reward": 0.5,
            "kl": 0.1,
            "eval_loss": 0.05 - 0.5,
        }
    )


COUNTED: list[tuple[str, dict[str, Any], dict[str, float] | None, bool]] = [
    ("all have a value", {}, BASE, True),
    ("the base model is measured", {}, None, True),
    ("one of weight 0 failed", {"told": None}, BASE, True),
    ("one failed", {"brief": None}, BASE, False),
    ("one failed for the base model", {"brief": None}, None, False),
    ("one applies to nothing any more", {"brief": [None, None]}, BASE, False),
    ("one never applied", {"brief": [None, None]}, {"reward_right": 0.1}, True),
    ("one never applied to the base model", {"brief": [None, None]}, None, True),
    ("only what has no weight applies", {"right": [None], "brief": [None]}, None, False),
]


@pytest.mark.parametrize(("changes", "base", "counts"), [one[1:] for one in COUNTED], ids=[one[0] for one in COUNTED])
def test_an_evaluation_counts_when_no_term_of_its_sum_is_missing(
    changes: dict[str, Any], base: dict[str, float] | None, counts: bool
) -> None:
    found = figures(base).of(sums(**changes))
    assert ("eval_loss" in found, "reward" in found) == (counts, counts)
    assert found["kl"] == pytest.approx(0.1)


def test_evaluations_in_a_row_that_do_not_count_end_the_run() -> None:
    made = figures()
    for missing in (True, True, False, True, True):
        made.of(sums(brief=None) if missing else sums())
    with pytest.raises(TrainerError, match=r"in 3 evaluations in a row brief gave no value") as ended:
        made.of(sums(brief=None))
    assert (ended.value.code, ended.value.reason) == (64, "RewardFailed")
    assert "mend it or remove it" in ended.value.message


KEPT = KeptCompletions(4, [Completion([1, 2], 9, [3, 4]), Completion([1], 8, [5])], -2.0, {"reward": 0.5})


def test_completions_are_found_again_in_their_checkpoint(tmp_path: Path) -> None:
    assert KeptCompletions.read(tmp_path) is None
    KEPT.write(tmp_path)
    found = KeptCompletions.read(tmp_path)
    assert found is not None
    assert (found.step, found.log_prob, found.figures) == (4, -2.0, {"reward": 0.5})
    assert [(one.prompt_ids, one.ids) for one in found.completions] == [([1, 2], [3, 4]), ([1], [5])]


@pytest.mark.parametrize("log_prob", [-2.0, -2.039, -1.961])
def test_rounding_is_no_difference(log_prob: float) -> None:
    KEPT.check(log_prob)


@pytest.mark.parametrize("log_prob", [-2.05, -1.9, float("nan")])
def test_a_model_that_finds_them_less_likely_or_more_is_another_one(log_prob: float) -> None:
    with pytest.raises(TrainerError, match=r"2 completions is .* after loading, and was -2\.0000 in training") as ended:
        KEPT.check(log_prob)
    assert ended.value.reason == "VerifyFailed"
