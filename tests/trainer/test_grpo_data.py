"""Prompts of a GRPO task: what is read, what is left out, and what is refused with the row's number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.grpo_data import Prompt, read_grpo, tokenize_prompts

LENGTH: dict[str, Any] = {"name": "length", "builtin": {"name": "LengthTarget", "words": 5}}
EXACT: dict[str, Any] = {"name": "exact", "builtin": {"name": "ExactMatch"}}


def config(path: Path, reward: dict[str, Any] = LENGTH, **grpo: Any) -> RunConfig:
    data = {"path": str(path), "evalFraction": 0.2, "grpo": {"rewardFunctions": [reward], **grpo}}
    return RunConfig.model_validate(
        {
            "jobName": "job",
            "taskID": "task",
            "taskType": "GRPO",
            "gpus": 1,
            "model": {"name": "m", "path": "/m"},
            "data": data,
            "lora": {},
            "train": {},
            "outputDir": "/o",
            "checkpointDir": "/c",
        }
    )


def rows(folder: Path, *values: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def many(folder: Path, **more: Any) -> Path:
    return rows(folder, *({"prompt": f"question {number}", **more} for number in range(20)))


def test_prompts_come_with_their_extra_column_as_it_is(tmp_path: Path) -> None:
    answer = {"any": ["value", 1, None]}
    split = read_grpo(config(many(tmp_path, answer=answer, other="x"), extraColumn="answer"))
    assert (len(split.train), len(split.held_out)) == (16, 4)
    assert all(prompt.extra == answer for prompt in split.train + split.held_out)
    assert {prompt.text for prompt in split.train}.isdisjoint(prompt.text for prompt in split.held_out)


def test_rows_of_one_prompt_are_all_trained_or_all_held_out(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"prompt": f"question {number % 5}", "answer": number} for number in range(20)))
    split = read_grpo(config(path, extraColumn="answer"))
    assert {prompt.text for prompt in split.train}.isdisjoint(prompt.text for prompt in split.held_out)


def test_rows_without_a_prompt_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = many(tmp_path)
    path.write_text(path.read_text() + '{"prompt": "  "}\n{"prompt": null}\n')
    split = read_grpo(config(path))
    assert len(split.train) + len(split.held_out) == 20
    assert dict(split.left_out) == {"noText": 2}
    assert "2 of 22 rows have no text in the prompt column, left out; the first is row 21" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "reward", "grpo", "reason", "said"),
    [
        ([{"question": "q"}], LENGTH, {}, "ColumnMissing", r"column 'prompt' is not in .*; its columns are question"),
        ([{"prompt": "q"}], EXACT, {"extraColumn": "answer"}, "ColumnMissing", r"column 'answer' is not in"),
        ([{"prompt": ""}] * 3, LENGTH, {}, "DataEmpty", r"none of the 3 rows has text in the column 'prompt'"),
        ([{"prompt": ["q"]}], LENGTH, {}, "DataUnreadable", r"row 1: column 'prompt' holds list, not text"),
        (
            [{"prompt": "q", "answer": "a"}, {"prompt": "r", "answer": {"a": 1}}],
            EXACT,
            {"extraColumn": "answer"},
            "DataUnreadable",
            r"row 2: column 'answer' holds dict, and the reward exact compares it as text",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    values: list[dict[str, Any]], reward: dict[str, Any], grpo: dict[str, Any], reason: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=said) as refused:
        read_grpo(config(rows(tmp_path, *values), reward, **grpo))
    assert (refused.value.code, refused.value.reason) == (65, reason)


def test_an_extra_column_that_is_no_json_is_refused() -> None:
    from datetime import date

    from taskoffer_trainer.grpo_data import build_prompts

    columns = config(Path("x"), extraColumn="day").data.grpo
    assert columns is not None
    assert build_prompts([{"prompt": "q", "day": "today"}], columns) == [Prompt("q", "today")]
    with pytest.raises(TrainerError, match="row 1: column 'day' holds date, which cannot be handed to"):
        build_prompts([{"prompt": "q", "day": date(2026, 1, 31)}], columns)


class Words:
    """A tokenizer with a token for each word, and one more at the beginning."""

    chat_template = None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert add_special_tokens
        return {"input_ids": [[0, *range(1, len(text.split()) + 1)] for text in texts]}


def test_prompts_that_leave_no_room_for_a_completion_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [Prompt("one two"), Prompt("one two three"), Prompt("one")]
    kept = tokenize_prompts(prompts, Words(), 3, "training")
    assert [(one.prompt.text, one.ids) for one in kept] == [("one two", [0, 1, 2]), ("one", [0, 1])]
    assert "1 of 3 training prompts are longer than 3 tokens, which is train.maxLength less" in capsys.readouterr().out
    with pytest.raises(TrainerError, match="all 3 held-out prompts are longer than 1 tokens") as refused:
        tokenize_prompts(prompts, Words(), 1, "held-out")
    assert (refused.value.code, refused.value.reason) == (65, "DataTooLong")
