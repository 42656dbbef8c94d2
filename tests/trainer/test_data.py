"""Rows become examples as their columns say, and the same rows are held out whatever their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskoffer.api.contract import DataConfig, InstructColumns
from taskoffer_trainer.data import read_rows, split_rows
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.instruct_data import Example, build_examples
from taskoffer_trainer.tokens import IGNORED, Cuts, sample_prompt, tokenize

pytestmark = pytest.mark.trainer

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add", "input": "2 and 3", "output": "5"},
    {"instruction": "Say {input}", "input": "", "output": "no"},
]
NAMES = ["instruction", "input", "output"]
COLUMNS = InstructColumns(field_instruction="instruction", field_input="input", field_output="output")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the file name asks for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("file_format", ["json", "jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_rows(file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{file_format}", [{**row, "more": "x"} for row in ROWS])
    data = DataConfig.model_validate({"path": str(path), "fileFormat": file_format})
    assert read_rows(data, NAMES) == ROWS
    folder = DataConfig.model_validate({"path": str(tmp_path), "fileFormat": file_format})
    assert read_rows(folder, NAMES) == ROWS
    # What prepare has chosen on a hub is called by its format, beside a card.
    (tmp_path / "README.md").write_text("# Rows")
    for found in (path, tmp_path):
        assert read_rows(DataConfig.model_validate({"path": str(found)}), NAMES) == ROWS


@pytest.mark.parametrize("file_format", ["json", "jsonl", "csv"])
def test_a_mark_at_the_beginning_of_a_text_is_no_part_of_it(file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{file_format}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": file_format}), NAMES) == ROWS


LONG = 200_000
"""Characters of a cell; Python's own limit for CSV is 131,072."""


@pytest.mark.parametrize("file_format", ["json", "jsonl", "csv", "parquet"])
def test_a_long_cell_is_read_in_every_format(file_format: str, tmp_path: Path) -> None:
    import csv

    rows = [{**ROWS[0], "output": "a,\n" * (LONG // 3)}, ROWS[1]]
    path = write(tmp_path / f"rows.{file_format}", rows)
    before = csv.field_size_limit()
    assert read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": file_format}), NAMES) == rows
    assert csv.field_size_limit() == before


def test_a_cell_that_never_ends_is_refused_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskoffer_trainer.data.CELL_CHARACTERS", 1000)
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n1,2,3\n4,5,"' + "6\n" * 1000)
    with pytest.raises(TrainerError, match=r"line \d+ .*a cell of more than 1,000 characters") as error:
        read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": "csv"}), NAMES)
    assert (error.value.code, error.value.reason) == (65, "DataUnreadable")


UNREADABLE = [
    ("jsonl", '{"instruction": 1}\n{"instr', "line 2 is not JSON"),
    ("jsonl", "3\n", "line 1 is not an object but int"),
    # The market's data is one list; jsonl is read where an offer does not say.
    ("jsonl", '[{"instruction": 1}]', "line 1 is not an object but list; .* is read with data.fileFormat json"),
    ("jsonl", '[\n{"instruction": 1}\n]', "line 1 is not an object but list; .* is read with data.fileFormat json"),
    ("jsonl", "\n", "holds no rows"),
    ("json", '{"a": [], "b": []}', "object with 2 lists"),
    ("json", "3", "holds int"),
    ("json", "{", "is not JSON"),
    ("jsonl", '{"instruction": ' + "[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
    ("json", "[" * 100_000, "is not JSON: it is nested too deeply"),
    ("csv", "instruction,input,output\n1,2,3,4\n", "line 2 has more cells than the header"),
    ("csv", "instruction,output\n1,2\n", "column 'input' is not in"),
]


@pytest.mark.parametrize(("file_format", "text", "words"), UNREADABLE)
def test_what_cannot_be_read_is_said_with_its_line(file_format: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{file_format}"
    path.write_text(text)
    data = DataConfig.model_validate({"path": str(path), "fileFormat": file_format})
    with pytest.raises(TrainerError, match=words) as error:
        read_rows(data, NAMES)
    assert error.value.code == 65


def test_a_folder_without_matching_files_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n1\n")
    data = DataConfig.model_validate({"path": str(tmp_path), "fileFormat": "jsonl"})
    with pytest.raises(TrainerError, match=r"no file that ends in \.jsonl .*found \.csv"):
        read_rows(data, NAMES)


def test_bytes_that_are_not_text_are_bad_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"instruction": "\xff"}\n')
    data = DataConfig.model_validate({"path": str(tmp_path / "rows.jsonl")})
    with pytest.raises(TrainerError, match="not UTF-8"):
        read_rows(data, NAMES)


@pytest.mark.parametrize("file_format", ["json", "jsonl", "csv"])
def test_the_mark_that_windows_puts_in_front_of_a_text_is_no_part_of_it(file_format: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{file_format}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": file_format}), NAMES) == ROWS


@pytest.mark.parametrize("file_format", ["json", "jsonl"])
def test_a_text_that_was_cut_within_a_character_can_be_trained_and_is_told(
    file_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of a smile has no form in UTF-8, so that it could be neither hashed nor tokenized."""
    rows = [{**ROWS[0], "output": text} for text in ("whole \U0001f600", "half \ud83d", "\\ud83d", "\udc00 behind")]
    path = write(tmp_path / f"rows.{file_format}", rows)
    examples = build_examples(
        read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": file_format}), NAMES), COLUMNS
    )
    assert [one.answer for one in examples] == ["whole \U0001f600", "half \ufffd", "\\ud83d", "\ufffd behind"]
    assert len({one.digest for one in examples}) == 4
    said = "2 rows have half of a character" if file_format == "jsonl" else "there is half of a character"
    assert said in capsys.readouterr().out


def test_whole_characters_beyond_the_first_plane_are_not_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "output": "\U0001f600"}])
    read_rows(DataConfig.model_validate({"path": str(path), "fileFormat": "jsonl"}), NAMES)
    assert "half" not in capsys.readouterr().out


def test_a_text_that_pandas_has_as_missing_is_none() -> None:
    missing = {"instruction": "Add", "input": float("nan"), "output": "5"}
    assert build_examples([missing], COLUMNS) == [Example("", "Add", "5")]


TEMPLATES = [
    (COLUMNS, ROWS[0], Example("", "Add\n2 and 3", "5")),
    (COLUMNS, ROWS[1], Example("", "Say {input}", "no")),
    (COLUMNS.model_copy(update={"format": "{input}: {instruction}"}), ROWS[0], Example("", "2 and 3: Add", "5")),
    (
        COLUMNS.model_copy(update={"format": "{instruction} {input}"}),
        {"instruction": "{input}", "input": "{instruction}", "output": 7},
        Example("", "{input} {instruction}", "7"),
    ),
    (COLUMNS.model_copy(update={"no_input_format": "Q: {instruction}"}), ROWS[1], Example("", "Q: Say {input}", "no")),
    (
        COLUMNS.model_copy(update={"system_prompt": "Be kind.", "system_format": "[{system}]"}),
        ROWS[0],
        Example("[Be kind.]", "Add\n2 and 3", "5"),
    ),
    (
        COLUMNS.model_copy(update={"field_system": "rule", "system_prompt": "Be kind."}),
        {**ROWS[0], "rule": "Be short."},
        Example("Be short.", "Add\n2 and 3", "5"),
    ),
    (InstructColumns(field_instruction="output"), ROWS[0], Example("", "", "5")),
    (InstructColumns(field="input"), ROWS[0], Example("", "", "2 and 3")),
    (COLUMNS.model_copy(update={"field": "rule"}), ROWS[0], Example("", "Add\n2 and 3", "5")),
]


@pytest.mark.parametrize(("columns", "row", "example"), TEMPLATES)
def test_columns_and_templates_make_the_example(
    columns: InstructColumns, row: dict[str, Any], example: Example
) -> None:
    assert build_examples([row], columns) == [example]


def test_rows_without_an_answer_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"instruction": "Why?", "input": "", "output": None}, {"instruction": "", "output": "x"}]
    assert len(build_examples(rows, COLUMNS)) == 2
    assert "2 of 4 rows have no text in a needed column" in capsys.readouterr().out
    with pytest.raises(TrainerError, match="none of the 1 rows"):
        build_examples([{"instruction": "", "input": "", "output": ""}], COLUMNS)


def test_a_cell_that_is_not_text_is_named() -> None:
    with pytest.raises(TrainerError, match="row 1: column 'output' holds list"):
        build_examples([{"instruction": "a", "output": ["b"]}], COLUMNS)


def config(fraction: float, most: int) -> DataConfig:
    return DataConfig(path="/x", eval_fraction=fraction, eval_rows_max=most, min_rows=2)


@given(
    texts=st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=60).filter(lambda found: len(set(found)) > 1),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
def test_the_held_out_rows_do_not_depend_on_the_order_and_are_never_trained(
    texts: list[str], seed: int, order: Any
) -> None:
    examples = [Example("", "", text) for text in texts]
    split = split_rows(examples, config(0.3, 10), seed)
    assert split.held_out
    assert split.train
    assert not set(split.held_out) & set(split.train)
    assert len(split.held_out) <= 10
    shuffled = list(examples)
    order.shuffle(shuffled)
    assert set(split_rows(shuffled, config(0.3, 10), seed).train) == set(split.train)


def test_as_many_rows_are_held_out_as_asked_for() -> None:
    examples = [Example("", "", str(number)) for number in range(1000)]
    assert len(split_rows(examples, config(0.1, 400), 1).held_out) == 100
    assert len(split_rows(examples, config(0.1, 25), 1).held_out) == 25
    assert len(split_rows(examples, config(0.0001, 400), 1).held_out) == 1
    assert split_rows(examples, config(0.1, 400), 1).held_out != split_rows(examples, config(0.1, 400), 2).held_out


def test_rows_that_say_the_same_are_held_out_together_and_no_more_than_asked_for() -> None:
    """Ten texts fifty times each: a tenth of the rows is one text, not all ten."""
    examples = [Example("", "", str(number % 10)) for number in range(500)]
    split = split_rows(examples, config(0.1, 400), 1)
    assert (len(split.held_out), len(set(split.held_out)), len(split.train)) == (50, 1, 450)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("often", "others"), [(999, 1), (900, 20), (3, 5)])
def test_a_text_of_very_many_rows_is_trained_and_not_held_out(often: int, others: int, seed: int) -> None:
    """Whatever the order by hash: neither does it leave the training, nor do all the others."""
    texts = ["often"] * often + [str(number) for number in range(others)]
    split = split_rows([Example("", "", text) for text in texts], config(0.1, 400), seed)
    assert len(split.train) + len(split.held_out) == often + others
    assert len(split.held_out) == max(1, round((others + 1) * 0.1))
    assert Example("", "", "often") not in split.held_out


def test_where_every_text_has_more_rows_than_may_be_held_out_the_one_of_the_fewest_is() -> None:
    examples = [Example("", "", text) for text in "aaaaaabbbccccc"]
    for seed in range(8):
        split = split_rows(examples, config(0.1, 400), seed)
        assert (len(split.train), {one.answer for one in split.held_out}) == (11, {"b"})


def test_too_few_rows_and_rows_that_all_say_the_same_are_refused() -> None:
    few = [Example("", "", str(number)) for number in range(7)]
    with pytest.raises(TrainerError, match=r"7 usable rows; data\.minRows asks for at least 8") as error:
        split_rows(few, DataConfig(path="/x"), 1)
    assert (error.value.code, error.value.reason) == (65, "TooFewRows")
    with pytest.raises(TrainerError, match="9 rows all say the same"):
        split_rows([Example("", "", "a")] * 9, DataConfig(path="/x"), 1)


class WordTokenizer:
    """One token per word; ids are handed out as words come."""

    chat_template = None
    eos_token = " <end>"

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    @property
    def eos_token_id(self) -> int:
        return self.words.setdefault("<end>", len(self.words))

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        ids = [[self.words.setdefault(word, len(self.words)) for word in text.split()] for text in texts]
        return {"input_ids": ids}


def test_only_the_answer_counts_for_the_loss() -> None:
    tokenizer = WordTokenizer()
    (row,) = tokenize([Example("be kind", "two words", "the answer")], tokenizer, Cuts(100, "training", 1))
    assert len(row.input_ids) == 7
    assert row.labels == [IGNORED] * 4 + row.input_ids[4:]
    assert row.labels[-1] == tokenizer.words["<end>"]


@pytest.mark.parametrize(
    ("words", "chosen"), [([500, 100, 20], 100), ([500, 137, 136, 1], 136), ([500, 300, 400], 300)]
)
def test_the_sample_prompt_is_the_first_that_a_row_has_room_for(words: list[int], chosen: int) -> None:
    """Of 200 tokens 64 are for the answer; where no text fits the shortest is taken."""
    texts = [" ".join(["word"] * count) for count in words]
    assert len(sample_prompt(texts, WordTokenizer(), 200).split()) == chosen


def test_a_template_that_refuses_a_row_is_bad_data() -> None:
    from jinja2 import TemplateError

    class Strict(WordTokenizer):
        chat_template = "strict"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise TemplateError("System role not supported")

    with pytest.raises(
        TrainerError, match=r"refuses the row that begins 'Why.*System role not supported; models"
    ) as error:
        tokenize([Example("be kind", "Why?", "So")], Strict(), Cuts(9, "training", 1))
    assert (error.value.code, error.value.reason) == (65, "ChatTemplateRefuses")


def test_long_rows_are_cut_and_rows_without_room_for_an_answer_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    examples = [Example("", "a b", "c d e f"), Example("", "a b c d e f g h", "i"), Example("", "a", "b")]
    rows = tokenize(examples, WordTokenizer(), Cuts(5, "training", 3))
    assert [len(row.input_ids) for row in rows] == [5, 3]
    assert "2 of 3 training rows are longer than 5 tokens; 1 were cut and 1 left out" in capsys.readouterr().out
    with pytest.raises(TrainerError, match=r"train\.maxLength"):
        tokenize(examples[1:2], WordTokenizer(), Cuts(5, "training", 1))
