"""From files of rows to examples: reading, columns and templates, the held-out split. No heavy library."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import DataConfig, ExitCode, FileFormat, InstructColumns, RunConfig
from taskoffer_trainer.failures import TrainerError

__all__ = ["Example", "Split", "bad_data", "build_examples", "read_rows", "read_split", "split_rows"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row ready for the tokenizer: what the model is given, and what it should say.

    ``system`` and ``user`` are empty for plain completion, where the whole text is what the model should say.
    """

    system: str
    user: str
    answer: str

    @property
    def digest(self) -> str:
        """SHA-256 of the texts; equal rows have equal digests."""
        return hashlib.sha256("\0".join((self.system, self.user, self.answer)).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Training and held-out examples; no text is in both."""

    train: list[Example]
    held_out: list[Example]


def bad_data(reason: str, message: str) -> TrainerError:
    """Build the error for data that cannot be used."""
    return TrainerError(ExitCode.BAD_DATA, reason, message)


def _files(path: Path, file_format: FileFormat) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise bad_data("DataMissing", f"data.path: {path} does not exist")
    found = sorted(child for child in path.rglob(f"*.{file_format.value}") if child.is_file())
    if not found:
        present = sorted({child.suffix or child.name for child in path.rglob("*") if child.is_file()})
        raise bad_data(
            "DataMissing",
            f"data.path: {path} holds no file that ends in .{file_format.value} "
            f"(data.fileFormat is {file_format.value}; found {', '.join(present[:8]) or 'nothing'})",
        )
    return found


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise bad_data("DataUnreadable", f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise bad_data("DataUnreadable", f"{path} line {number} is not an object but {type(row).__name__}")
            yield row


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise bad_data("DataUnreadable", f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [key for key, member in value.items() if isinstance(member, list)]
        if len(lists) != 1:
            raise bad_data(
                "DataUnreadable",
                f"{path} is an object with {len(lists)} lists; it should hold one list of rows",
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise bad_data("DataUnreadable", f"{path} holds {type(value).__name__}; it should hold a list of rows")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise bad_data("DataUnreadable", f"{path} row {number} is not an object but {type(row).__name__}")
        yield row


def _read_csv(path: Path, columns: list[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or [])
            for name in columns:
                if name not in header:
                    raise _missing_column(path, name, header)
            for row in reader:
                if None in row:
                    raise bad_data("DataUnreadable", f"{path} line {reader.line_num} has more cells than the header")
                yield row
        except csv.Error as error:
            raise bad_data("DataUnreadable", f"{path} line {reader.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            missing = [name for name in columns if name not in present]
            if missing:
                raise _missing_column(path, missing[0], file.schema_arrow.names)
            for batch in file.iter_batches(columns=present):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise bad_data("DataUnreadable", f"{path} is not Parquet: {error}") from error


def _read(path: Path, file_format: FileFormat, columns: list[str]) -> Iterator[Row]:
    if file_format is FileFormat.JSONL:
        return _read_jsonl(path)
    if file_format is FileFormat.JSON:
        return _read_json(path)
    if file_format is FileFormat.CSV:
        return _read_csv(path, columns)
    if file_format is FileFormat.PARQUET:
        return _read_parquet(path, columns)
    raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"data.fileFormat: {file_format.value} is not text")


def _missing_column(path: Path, column: str, available: list[str]) -> TrainerError:
    names = ", ".join(sorted(available)[:20]) or "none"
    return bad_data("ColumnMissing", f"column {column!r} is not in {path}; its columns are {names}")


def _wanted(columns: InstructColumns) -> list[str]:
    names = (columns.field_instruction, columns.field_input, columns.field_output, columns.field_system)
    return [name for name in names if name is not None]


def read_rows(data: DataConfig, columns: InstructColumns) -> list[Row]:
    """Read the wanted columns of all rows, in the order of the files.

    A row may lack a column that other rows have (JSON leaves empty fields out), but a column that no row of a
    file has is an error.

    Raises:
        TrainerError: ``BAD_DATA`` with the file, the line or the column, and the columns that are there.
    """
    wanted = _wanted(columns)
    rows: list[Row] = []
    for path in _files(Path(data.path), data.file_format):
        seen: set[str] = set()
        before = len(rows)
        try:
            for row in _read(path, data.file_format, wanted):
                seen.update(row)
                rows.append({name: row.get(name) for name in wanted})
        except UnicodeDecodeError as error:
            raise bad_data("DataUnreadable", f"{path} is not UTF-8 text: {error}") from error
        if len(rows) == before:
            raise bad_data("DataEmpty", f"{path} holds no rows")
        for name in wanted:
            if name not in seen:
                raise _missing_column(path, name, list(seen))
    return rows


def _text(row: Row, column: str | None, number: int) -> str:
    if column is None:
        return ""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value).strip()
    raise bad_data("DataUnreadable", f"row {number}: column {column!r} holds {type(value).__name__}, not text")


def _user_message(columns: InstructColumns, instruction: str, context: str) -> str:
    if context:
        if columns.format is None:
            return f"{instruction}\n{context}" if instruction else context
        texts = {"instruction": instruction, "input": context}
        # One pass over the template, so that braces in the texts stay as they are.
        return re.sub(r"\{(instruction|input)\}", lambda match: texts[match[1]], columns.format)
    return (columns.no_input_format or "{instruction}").replace("{instruction}", instruction)


def build_examples(rows: list[Row], columns: InstructColumns) -> list[Example]:
    """Apply columns and templates; rows without instruction or answer are left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when a cell is not text or no row is left.
    """
    examples = []
    for number, row in enumerate(rows, 1):
        instruction = _text(row, columns.field_instruction, number)
        if columns.field_output is None:
            if instruction:
                examples.append(Example("", "", instruction))
            continue
        answer = _text(row, columns.field_output, number)
        context = _text(row, columns.field_input, number)
        if not answer or not (instruction or context):
            continue
        system = _text(row, columns.field_system, number) or columns.system_prompt
        if system:
            system = columns.system_format.replace("{system}", system)
        examples.append(Example(system, _user_message(columns, instruction, context), answer))
    if len(examples) < len(rows):
        print(f"data: {len(rows) - len(examples)} of {len(rows)} rows have no text in a needed column, left out")
    if not examples:
        raise bad_data("DataEmpty", f"none of the {len(rows)} rows has text in the needed columns {_wanted(columns)}")
    return examples


def split_rows(examples: list[Example], data: DataConfig, seed: int) -> Split:
    """Hold rows out: the same ones in every attempt and every process, whatever the order of the rows.

    Rows are ordered by a hash of seed and text; the first ``eval_fraction`` of them (at least one, at most
    ``eval_rows_max``) are held out, with every row of equal text, so that nothing is both trained and tested.

    Raises:
        TrainerError: ``BAD_DATA`` when nothing would be left to train on.
    """
    keys = [hashlib.sha256(f"{seed}:{example.digest}".encode()).digest() for example in examples]
    count = min(max(1, round(len(examples) * data.eval_fraction)), data.eval_rows_max)
    border = sorted(set(keys))[:count][-1]
    held_out = [example for example, key in zip(examples, keys, strict=True) if key <= border]
    train = [example for example, key in zip(examples, keys, strict=True) if key > border]
    if not train:
        raise bad_data(
            "DataEmpty",
            f"{len(examples)} rows with {len(set(keys))} different texts leave nothing to train on after "
            f"holding {len(held_out)} out; at least two different rows are needed",
        )
    return Split(train, held_out[: data.eval_rows_max])


def read_split(config: RunConfig) -> Split:
    """Read the rows of a run and hold some out. Needs none of the heavy libraries.

    Raises:
        TrainerError: ``BAD_DATA``, or ``BAD_CONFIG`` without columns.
    """
    columns = config.data.instruct
    if columns is None:
        raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", "data.instruct: the columns are missing")
    return split_rows(build_examples(read_rows(config.data, columns), columns), config.data, config.train.seed)
