"""Data set folders as they come from Hugging Face: the training split is found, and said, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import DataConfig
from taskoffer_trainer.data import read_rows
from taskoffer_trainer.failures import TrainerError

pytestmark = pytest.mark.trainer

ROWS: list[dict[str, Any]] = [{"text": f"row {number}", "more": number} for number in range(6)]
WANTED = [{"text": row["text"]} for row in ROWS]
OTHER = [{"text": "not to be read", "more": 0}]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("".join(f"{row['text']},{row['more']}\n" for row in [{"text": "text", "more": "more"}, *rows]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path) -> list[dict[str, Any]]:
    return read_rows(DataConfig.model_validate({"path": str(folder), "fileFormat": "hf"}), ["text"])


LAYOUTS: dict[str, tuple[dict[str, list[dict[str, Any]]], str]] = {
    "shards below data": (
        {
            "data/train-00000-of-00002.parquet": ROWS[:4],
            "data/train-00001-of-00002.parquet": ROWS[4:],
            "data/test-00000-of-00001.parquet": OTHER,
        },
        "split train of .*, 2 .parquet file.* not read: test",
    ),
    "a file for each split": (
        {"train.jsonl": ROWS, "dev.jsonl": OTHER, "test.jsonl": OTHER},
        "split train .*not read: test, validation",
    ),
    "a folder for each split": (
        {"train/0.csv": ROWS[:3], "train/1.csv": ROWS[3:], "validation/0.csv": OTHER},
        "split train of .*, 2 .csv",
    ),
    "no split": ({"part-1.json": ROWS[:2], "part-2.json": ROWS[2:], "dataset_infos.json": OTHER}, "the only split"),
    "no name for the training split": ({"all.jsonl": ROWS, "all-test.jsonl": OTHER}, "not read: test"),
    "parquet beside its source": ({"train.parquet": ROWS, "train.jsonl": OTHER}, "1 .parquet file"),
    "train beside another one": (
        {"train-0.jsonl": ROWS[:5], "train-1.jsonl": ROWS[5:], "train_gen.jsonl": OTHER},
        "2 .jsonl",
    ),
    "a hidden cache": ({"train.jsonl": ROWS, ".cache/train.jsonl": OTHER}, "1 .jsonl file"),
}


@pytest.mark.parametrize(("files", "said"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_training_split_of_a_repository_is_read_and_said(
    files: dict[str, list[dict[str, Any]]], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    for name, rows in files.items():
        write(tmp_path / name, rows)
    assert read(tmp_path) == WANTED
    assert re.search(said, capsys.readouterr().out)


def saved(folder: Path, splits: dict[str, list[dict[str, Any]]] | None) -> Path:
    """Save with the library itself, in two files, so that what it writes today is what is read."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    if splits is None:
        Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    else:
        DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def test_a_saved_data_set_is_read_in_the_order_of_its_rows(tmp_path: Path) -> None:
    assert read(saved(tmp_path / "one", None)) == WANTED


def test_of_saved_splits_the_training_split_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(saved(tmp_path / "three", {"test": OTHER, "train": ROWS, "validation": OTHER})) == WANTED
    assert "split train of" in capsys.readouterr().out
    assert read(saved(tmp_path / "renamed", {"python": ROWS})) == WANTED


def test_only_listed_files_of_the_folder_itself_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", None)
    state = json.loads((folder / "state.json").read_text())
    secret = tmp_path / "elsewhere.arrow"
    secret.write_bytes((folder / state["_data_files"][0]["filename"]).read_bytes())
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(TrainerError, match=r"names elsewhere\.arrow, which is not there"):
        read(folder)


FAULTS: dict[str, tuple[dict[str, list[dict[str, Any]]], str, str]] = {
    "empty": ({}, "DataMissing", r"holds no file that ends in \.parquet"),
    "only a test split": ({"test.jsonl": ROWS}, "SplitMissing", "no split named train, only test"),
    "two configurations": (
        {"de/train-00000.parquet": ROWS, "en/train-00000.parquet": ROWS},
        "SplitAmbiguous",
        r"2 configurations or splits to train on \(de/train, en/train\); name the folder",
    ),
    "two splits to train on": (
        {"data/train_gen-00000-of-00001.parquet": ROWS, "data/train_sft-00000-of-00001.parquet": ROWS},
        "SplitAmbiguous",
        r"\(train_gen, train_sft\)",
    ),
    "a column is missing": ({"train.parquet": [{"words": "a"}]}, "ColumnMissing", "'text' is not in .*words"),
}


@pytest.mark.parametrize(("files", "reason", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_what_cannot_be_chosen_is_refused_with_what_is_there(
    files: dict[str, list[dict[str, Any]]], reason: str, words: str, tmp_path: Path
) -> None:
    for name, rows in files.items():
        write(tmp_path / name, rows)
    with pytest.raises(TrainerError, match=words) as error:
        read(tmp_path)
    assert (error.value.code, error.value.reason) == (65, reason)


def test_saved_data_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", None)
    with pytest.raises(TrainerError, match=r"'words' is not in .*its columns are more, text"):
        read_rows(DataConfig.model_validate({"path": str(folder), "fileFormat": "hf"}), ["words"])
    first = json.loads((folder / "state.json").read_text())["_data_files"][0]["filename"]
    (folder / first).write_bytes(b"not arrow")
    with pytest.raises(TrainerError, match="is not an Arrow stream"):
        read(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(TrainerError, match=r"state\.json cannot be read"):
        read(folder)
    with pytest.raises(TrainerError, match="only evaluation"):
        read(saved(tmp_path / "dict", {"evaluation": ROWS}))
    with pytest.raises(TrainerError, match="2 splits to train on"):
        read(saved(tmp_path / "two", {"train_sft": ROWS, "train_gen": ROWS}))
    with pytest.raises(TrainerError, match=r"is a file; data\.fileFormat hf wants"):
        read(folder / "state.json")
