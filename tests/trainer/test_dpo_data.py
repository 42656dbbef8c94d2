"""Rows become pairs as their columns say, and pairs become tokens with the border where the answers begin."""

from __future__ import annotations

from typing import Any

import pytest

from taskoffer.api.contract import DataConfig, DPOColumns
from taskoffer_trainer.data import LeftOut, split_rows
from taskoffer_trainer.dpo_data import Pair, build_pairs
from taskoffer_trainer.dpo_tokens import TokenPair, tokenize_pairs
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.tokens import Cuts

pytestmark = pytest.mark.trainer

ROW: dict[str, Any] = {"prompt": " Why {system}?\n", "chosen": "So", "rejected": "{chosen}", "rule": "Be kind"}
SYSTEM = DPOColumns(field_system="rule")

READ: dict[str, tuple[DPOColumns, dict[str, Any], Pair]] = {
    "the defaults": (DPOColumns(), ROW, Pair("", "Why {system}?", "So", "{chosen}")),
    "a system column": (SYSTEM, ROW, Pair("Be kind", "Why {system}?", "So", "{chosen}")),
    "an empty system cell": (SYSTEM, {**ROW, "rule": None}, Pair("", "Why {system}?", "So", "{chosen}")),
    "formats": (
        DPOColumns(prompt_format="Q: {prompt}", chosen_format="A: {chosen}", rejected_format="B: {rejected}"),
        ROW,
        Pair("", "Q: Why {system}?", "A: So", "B: {chosen}"),
    ),
    "the system prompt within the prompt": (
        SYSTEM.model_copy(update={"prompt_format": "<{system}> {prompt}"}),
        ROW,
        Pair("", "<Be kind> Why {system}?", "So", "{chosen}"),
    ),
    "other columns": (
        DPOColumns(field_prompt="rule", field_chosen="rejected", field_rejected="chosen"),
        {**ROW, "chosen": 7},
        Pair("", "Be kind", "{chosen}", "7"),
    ),
}


@pytest.mark.parametrize(("columns", "row", "pair"), READ.values(), ids=READ.keys())
def test_columns_and_templates_make_the_pair(columns: DPOColumns, row: dict[str, Any], pair: Pair) -> None:
    assert build_pairs([row], columns) == [pair]


COUNTED: dict[str, tuple[dict[str, Any], str]] = {
    "equal answers": ({"chosen": "So ", "rejected": " So"}, "equalAnswers"),
    "no prompt": ({"prompt": " "}, "noText"),
    "nothing chosen": ({"chosen": None}, "noText"),
    "nothing rejected": ({"rejected": ""}, "noText"),
}


@pytest.mark.parametrize(("change", "reason"), COUNTED.values(), ids=COUNTED.keys())
def test_rows_without_a_preference_are_left_out_and_counted(
    change: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = LeftOut()
    assert len(build_pairs([ROW, {**ROW, **change}], DPOColumns(), left_out)) == 1
    assert left_out.counts == {reason: 1}
    assert "1 of 2 rows have " in capsys.readouterr().out
    with pytest.raises(TrainerError, match="none of the 1 rows has two answers to compare: 1 have") as error:
        build_pairs([{**ROW, **change}], DPOColumns())
    assert (error.value.code, error.value.reason) == (65, "DataEmpty")


def test_a_cell_that_is_not_text_is_named() -> None:
    with pytest.raises(TrainerError, match="row 1: column 'chosen' holds list, not text"):
        build_pairs([{**ROW, "chosen": [{"role": "assistant", "content": "So"}]}], DPOColumns())


def test_all_pairs_of_a_prompt_are_trained_or_all_are_held_out() -> None:
    pairs = [Pair("", f"prompt {number % 20}", f"good {number}", "bad") for number in range(100)]
    split = split_rows(pairs, DataConfig(path="/x", eval_fraction=0.2), seed=3)
    assert len(split.held_out) == 20
    assert not {pair.prompt for pair in split.held_out} & {pair.prompt for pair in split.train}


class Letters:
    """One token per character, without a chat template."""

    chat_template = None
    eos_token = "."
    eos_token_id = ord(".")

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_pair_becomes_one_prompt_and_two_answers_that_end() -> None:
    (pair,) = tokenize_pairs([Pair("s", "p", "yes", "no")], Letters(), Cuts(100, "training", 1))
    assert pair == TokenPair(ids("s\np\n"), ids("yes."), ids("no."))
    assert pair.length == 8


def test_long_pairs_are_cut_and_those_that_cannot_be_compared_any_more_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [
        Pair("", "p", "abcdef", "xyz"),
        Pair("", "p", "abcd", "abce"),
        Pair("", "pppppp", "a", "b"),
        Pair("", "p", "a", "b"),
    ]
    found = tokenize_pairs(pairs, Letters(), Cuts(5, "training", 4))
    assert found == [TokenPair(ids("p\n"), ids("abc"), ids("xyz")), TokenPair(ids("p\n"), ids("a."), ids("b."))]
    assert "3 of 4 training rows are longer than 5 tokens; 1 were cut and 2 left out" in capsys.readouterr().out
    with pytest.raises(TrainerError, match=r"train\.maxLength") as error:
        tokenize_pairs(pairs[1:3], Letters(), Cuts(5, "training", 2))
    assert error.value.reason == "DataTooLong"
