"""From files of rows to token ids: reading, columns and templates, the held-out split, tokens and labels."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import DataConfig, ExitCode, FileFormat, InstructColumns
from taskoffer_trainer.failures import TrainerError

__all__ = ["Example", "Split", "TokenRow", "build_examples", "read_rows", "split_rows", "tokenize"]

IGNORED = -100
"""Label of a token that the loss leaves out."""

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


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a row and its labels, which are :data:`IGNORED` where the model is only given the token."""

    input_ids: list[int]
    labels: list[int]


def _bad(reason: str, message: str) -> TrainerError:
    return TrainerError(ExitCode.BAD_DATA, reason, message)


def _files(path: Path, file_format: FileFormat) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise _bad("DataMissing", f"data.path: {path} does not exist")
    found = sorted(child for child in path.rglob(f"*.{file_format.value}") if child.is_file())
    if not found:
        present = sorted({child.suffix or child.name for child in path.rglob("*") if child.is_file()})
        raise _bad(
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
                raise _bad("DataUnreadable", f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise _bad(
                    "DataUnreadable", f"{path} line {number} is not an object but {type(row).__name__}"
                )
            yield row


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise _bad("DataUnreadable", f"{path} is not JSON: {error}") from error
    if isinstance(value, dict):
        lists = [key for key, member in value.items() if isinstance(member, list)]
        if len(lists) != 1:
            raise _bad(
                "DataUnreadable",
                f"{path} is an object with {len(lists)} lists; it should hold one list of rows",
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise _bad("DataUnreadable", f"{path} holds {type(value).__name__}; it should hold a list of rows")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise _bad("DataUnreadable", f"{path} row {number} is not an object but {type(row).__name__}")
        yield row


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise _bad(
                        "DataUnreadable", f"{path} line {reader.line_num} has more cells than the header"
                    )
                yield row
        except csv.Error as error:
            raise _bad("DataUnreadable", f"{path} line {reader.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            missing = [name for name in columns if name not in present]
            if missing:
                raise _missing_column(path, missing[0], file.schema_arrow.names)
            for batch in file.iter_batches(columns=present):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _bad("DataUnreadable", f"{path} is not Parquet: {error}") from error


def _missing_column(path: Path, column: str, available: list[str]) -> TrainerError:
    names = ", ".join(sorted(available)[:20]) or "none"
    return _bad("ColumnMissing", f"column {column!r} is not in {path}; its columns are {names}")


def _wanted(columns: InstructColumns) -> list[str]:
    names = (columns.field_instruction, columns.field_input, columns.field_output, columns.field_system)
    return [name for name in names if name is not None]


def read_rows(data: DataConfig, columns: InstructColumns) -> list[Row]:
    """Read the wanted columns of all rows, in the order of the files.

    A row may lack a column that other rows have (JSON leaves empty fields out), but a column that no row of a file
    has is an error.

    Raises:
        TrainerError: ``BAD_DATA`` with the file, the line or the column, and the columns that are there.
    """
    wanted = _wanted(columns)
    rows: list[Row] = []
    for path in _files(Path(data.path), data.file_format):
        seen: set[str] = set()
        source = {
            FileFormat.JSONL: lambda p: _read_jsonl(p),
            FileFormat.JSON: lambda p: _read_json(p),
            FileFormat.CSV: lambda p: _read_csv(p),
            FileFormat.PARQUET: lambda p: _read_parquet(p, wanted),
        }[data.file_format]
        before = len(rows)
        try:
            for row in source(path):
                seen.update(row)
                rows.append({name: row.get(name) for name in wanted})
        except UnicodeDecodeError as error:
            raise _bad("DataUnreadable", f"{path} is not UTF-8 text: {error}") from error
        if len(rows) == before:
            raise _bad("DataEmpty", f"{path} holds no rows")
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
    raise _bad("DataUnreadable", f"row {number}: column {column!r} holds {type(value).__name__}, not text")


def _user_message(columns: InstructColumns, instruction: str, context: str) -> str:
    if context:
        if columns.format is None:
            return f"{instruction}\n{context}" if instruction else context
        texts = {"instruction": instruction, "input": context}
        # One pass over the template, so that braces in the texts stay as they are.
        return re.sub(r"\{(instruction|input)\}", lambda match: texts[match[1]], columns.format)
    return (columns.no_input_format or "{instruction}").replace("{instruction}", instruction)


def build_examples(rows: list[Row], columns: InstructColumns) -> list[Example]:
    """Apply columns and templates. Rows without an instruction or without an answer are left out and counted aloud.

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
        print(
            f"data: {len(rows) - len(examples)} of {len(rows)} rows have no text in a needed column, left out"
        )
    if not examples:
        raise _bad(
            "DataEmpty", f"none of the {len(rows)} rows has text in the needed columns {_wanted(columns)}"
        )
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
        raise _bad(
            "DataEmpty",
            f"{len(examples)} rows with {len(set(keys))} different texts leave nothing to train on after holding "
            f"{len(held_out)} out; at least two different rows are needed",
        )
    return Split(train, held_out[: data.eval_rows_max])


def prompt_of(example: Example, tokenizer: Any) -> str:
    """Return the text before the answer, in the model's own chat template where it has one."""
    if not example.user and not example.system:
        return ""
    if not tokenizer.chat_template:
        return "".join(f"{part}\n" for part in (example.system, example.user) if part)
    messages = [{"role": "user", "content": example.user}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _full_text(example: Example, prompt: str, tokenizer: Any) -> str:
    if not prompt:
        return example.answer + tokenizer.eos_token
    if not tokenizer.chat_template:
        return prompt + example.answer + tokenizer.eos_token
    messages = [{"role": "user", "content": example.user}, {"role": "assistant", "content": example.answer}]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def tokenize(examples: list[Example], tokenizer: Any, max_length: int, what: str) -> list[TokenRow]:
    """Turn examples into token ids and labels; only the answer counts for the loss.

    The answer starts where the tokens of the prompt and of the whole text part, which is not always at the end of the
    prompt, because tokens can merge across the border. Rows are cut at ``max_length`` tokens; a row whose answer lies
    wholly behind that is left out and counted aloud.

    Raises:
        TrainerError: ``BAD_DATA`` when no row is left.
    """
    rows: list[TokenRow] = []
    cut = too_long = 0
    said = time.monotonic()
    for start in range(0, len(examples), 1000):
        part = examples[start : start + 1000]
        prompts = [prompt_of(example, tokenizer) for example in part]
        texts = [
            _full_text(example, prompt, tokenizer) for example, prompt in zip(part, prompts, strict=True)
        ]
        # Chat templates write the special tokens themselves; plain text needs the tokenizer's own.
        special = not tokenizer.chat_template or not any(prompts)
        whole = tokenizer(texts, add_special_tokens=special)["input_ids"]
        given = tokenizer(prompts, add_special_tokens=special)["input_ids"]
        for prompt, ids, prompt_ids in zip(prompts, whole, given, strict=True):
            begin = _common_prefix(prompt_ids, ids) if prompt else 0
            labels = [IGNORED] * begin + ids[begin:]
            cut += len(ids) > max_length
            if begin >= max_length or len(ids) < 2:
                too_long += 1
                continue
            rows.append(TokenRow(ids[:max_length], labels[:max_length]))
        if time.monotonic() - said > 2:
            print(f"data: {start + len(part)} of {len(examples)} {what} rows tokenized", flush=True)
            said = time.monotonic()
    if cut:
        print(
            f"data: {cut} of {len(examples)} {what} rows are longer than {max_length} tokens; {cut - too_long} were "
            f"cut and {too_long} left out, because their answer would be gone"
        )
    if not rows:
        raise _bad(
            "DataTooLong",
            f"all {len(examples)} {what} rows have prompts of {max_length} tokens and more (train.maxLength)",
        )
    return rows


def _common_prefix(left: list[int], right: list[int]) -> int:
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
