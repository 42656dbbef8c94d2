"""From files to rows, and from examples to a split: reading, cells, the held-out rows. No heavy library."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from taskoffer.api.contract import DataConfig, ExitCode, FileFormat
from taskoffer_trainer.failures import TrainerError, bad_data
from taskoffer_trainer.hf_folder import ARROW, chosen_files, hf_files
from taskoffer_trainer.row_files import formats_of

__all__ = [
    "LeftOut",
    "Row",
    "Split",
    "bad_data",
    "cell_text",
    "held_out_keys",
    "parsed_json",
    "read_rows",
    "split_rows",
]

Row = dict[str, Any]

CELL_CHARACTERS = 1 << 24
"""Most characters of a CSV cell. It is a bound at all, so that a quotation mark that is left open takes no more memory.

Python's own of 131,072 is less than a long document has; this is that of some four million tokens.
"""

_TEXT = "utf-8-sig"
"""UTF-8, with the mark at its beginning or without, which some programs write into every text."""


class Digested(Protocol):
    """An example with a digest: examples with equal digests are trained together or held out together."""

    @property
    def digest(self) -> str:
        """SHA-256 as hexadecimal digits."""


E = TypeVar("E", bound=Digested)


@dataclass(frozen=True)
class Split(Generic[E]):
    """Training and held-out examples; no digest is in both."""

    train: list[E]
    held_out: list[E]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the files that are in neither, by the reason in camelCase."""


class LeftOut:
    """Counts the rows that are left out, by reason, and says so aloud."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._said: dict[str, tuple[str, int]] = {}

    def add(self, reason: str, words: str, number: int) -> None:
        """Count one row.

        Args:
            reason: in camelCase, as it stands in the manifest.
            words: what is wrong with such rows, the end of a sentence that begins with their number.
            number: number of the row, from 1; the first one is named.
        """
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._said.setdefault(reason, (words, number))

    def say(self, rows: int) -> None:
        """Print a line for each reason."""
        for reason, (words, number) in self._said.items():
            print(f"data: {self.counts[reason]} of {rows} rows {words}, left out; the first is row {number}")

    def in_words(self) -> str:
        """Name the reasons with their counts, for the error when nothing is left."""
        return "; ".join(f"{self.counts[reason]} {words}" for reason, (words, _) in self._said.items())


def _format_there(path: Path) -> FileFormat:
    """Return the format that the files are called by; a data set of a hub comes in a single one."""
    names = [path.name] if path.is_file() else [child.relative_to(path).as_posix() for child in path.rglob("*")]
    found = next((one for one in formats_of(names) if one is not FileFormat.ZIP), FileFormat.JSONL)
    print(f"data: {path} is read as {found.value}", flush=True)
    return found


def _files(path: Path, file_format: FileFormat | None) -> tuple[list[Path], str]:
    """Return the files to read and what they hold, as a file name's suffix."""
    fetched = file_format is None
    if file_format is None:
        file_format = _format_there(path)
    if file_format is FileFormat.HF:
        # Of what was fetched the split is chosen already; its name need not be that of one to train on.
        found_in = chosen_files(path) if fetched else hf_files(path)
        of = f"split {found_in.split}" if found_in.split else "the only split"
        there = f" (also there, not read: {', '.join(found_in.others)})" if found_in.others else ""
        print(f"data: {of} of {path}, {len(found_in.paths)} .{found_in.suffix} file(s){there}", flush=True)
        return list(found_in.paths), found_in.suffix
    if path.is_file():
        return [path], file_format.value
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
    return found, file_format.value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON escapes one half of a character beyond U+FFFF; in UTF-8 itself there are no halves."""


def parsed_json(text: str) -> tuple[Any, bool]:
    """Parse JSON, and read U+FFFD for half of a character: a surrogate whose other half was cut off.

    Texts that were cut at a number of UTF-16 units end so. No file and no tokenizer takes them.

    Returns:
        The value, and whether there was such a half in it.

    Raises:
        ValueError: when it is no JSON, or nested so deeply that nobody can have meant it.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not _SURROGATE.search(text):
        return value, False
    whole = _whole(value)
    return whole, whole != value


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return {_whole(name): _whole(one) for name, one in value.items()} if isinstance(value, dict) else value


def _say_mended(path: Path, what: str) -> None:
    print(f"data: {path}: {what} half of a character (a surrogate without the other one), read as U+FFFD", flush=True)


def _read_jsonl(path: Path) -> Iterator[Row]:
    mended = 0
    with path.open(encoding=_TEXT) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                raise bad_data(
                    "DataUnreadable",
                    f"{path} line {number} is not an object but list; a file that is one list of rows is read with "
                    "data.fileFormat json",
                )
            try:
                row, changed = parsed_json(line)
            except ValueError as error:
                raise bad_data("DataUnreadable", f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise bad_data("DataUnreadable", f"{path} line {number} is not an object but {type(row).__name__}")
            mended += changed
            yield row
    if mended:
        _say_mended(path, f"{mended} rows have")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding=_TEXT)
    try:
        value, mended = parsed_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise bad_data("DataUnreadable", f"{path} is not JSON: {error}") from error
    if mended:
        _say_mended(path, "there is")
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


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Read cells of up to :data:`CELL_CHARACTERS`; the limit is one of the whole process."""
    before = csv.field_size_limit(CELL_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, columns: list[str]) -> Iterator[Row]:
    with _long_cells(), path.open(encoding=_TEXT, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or [])
            _need(path, columns, header)
            for row in reader:
                if None in row:
                    raise bad_data("DataUnreadable", f"{path} line {reader.line_num} has more cells than the header")
                yield row
        except csv.Error as error:
            if "field limit" in str(error):
                raise bad_data(
                    "DataUnreadable",
                    f"{path} line {reader.line_num} is in a cell of more than {CELL_CHARACTERS:,} characters; is a "
                    "quotation mark left open? data.fileFormat json, jsonl or parquet takes longer cells",
                ) from error
            raise bad_data("DataUnreadable", f"{path} line {reader.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            _need(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise bad_data("DataUnreadable", f"{path} is not Parquet: {error}") from error


def _read_arrow(path: Path, columns: list[str]) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            _need(path, columns, reader.schema.names)
            for batch in reader:
                yield from batch.select(columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise bad_data("DataUnreadable", f"{path} is not an Arrow stream: {error}") from error


def _need(path: Path, columns: list[str], present: list[str]) -> None:
    for name in columns:
        if name not in present:
            raise _missing_column(path, name, present)


def _read(path: Path, suffix: str, columns: list[str]) -> Iterator[Row]:
    if suffix == FileFormat.JSONL:
        return _read_jsonl(path)
    if suffix == FileFormat.JSON:
        return _read_json(path)
    if suffix == FileFormat.CSV:
        return _read_csv(path, columns)
    if suffix == FileFormat.PARQUET:
        return _read_parquet(path, columns)
    if suffix == ARROW:
        return _read_arrow(path, columns)
    raise TrainerError(ExitCode.BAD_CONFIG, "ConfigInvalid", f"data.fileFormat: {suffix} is not text")


def _missing_column(path: Path, column: str, available: list[str]) -> TrainerError:
    names = ", ".join(sorted(available)[:20]) or "none"
    return bad_data("ColumnMissing", f"column {column!r} is not in {path}; its columns are {names}")


def read_rows(data: DataConfig, columns: Sequence[str]) -> list[Row]:
    """Read the wanted columns of all rows, in the order of the files.

    A row may lack a column that other rows have (JSON leaves empty fields out), but a column that no row of a
    file has is an error.

    Raises:
        TrainerError: ``BAD_DATA`` with the file, the line or the column, and the columns that are there.
    """
    wanted = list(dict.fromkeys(columns))
    rows: list[Row] = []
    paths, suffix = _files(Path(data.path), data.file_format)
    for path in paths:
        seen: set[str] = set()
        before = len(rows)
        try:
            for row in _read(path, suffix, wanted):
                seen.update(row)
                rows.append({name: row.get(name) for name in wanted})
        except UnicodeDecodeError as error:
            raise bad_data("DataUnreadable", f"{path} is not UTF-8 text: {error}") from error
        if len(rows) == before:
            raise bad_data("DataEmpty", f"{path} holds no rows")
        _need(path, wanted, list(seen))
    return rows


def cell_text(row: Row, column: str | None, number: int) -> str:
    """Return a cell as text without space around it; empty where there is no column or nothing in it.

    Nothing is in it as well where it holds NaN: what pandas has for a missing text, and JSON of Python's for that.

    Raises:
        TrainerError: ``BAD_DATA`` when the cell holds a list, an object or a truth value.
    """
    if column is None:
        return ""
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value).strip()
    raise bad_data("DataUnreadable", f"row {number}: column {column!r} holds {type(value).__name__}, not text")


def split_rows(examples: list[E], data: DataConfig, seed: int, left_out: LeftOut | None = None) -> Split[E]:
    """Hold rows out: the same ones in every attempt and every process, whatever the order of the rows.

    Which ones says :func:`held_out_keys`, by a hash of seed and digest, so that nothing is both trained and tested.

    Raises:
        TrainerError: ``BAD_DATA`` when there are fewer than ``min_rows``, or all say the same.
    """
    if len(examples) < data.min_rows:
        raise bad_data(
            "TooFewRows", f"{len(examples)} usable rows; data.minRows asks for at least {data.min_rows} to learn from"
        )
    keys = [hashlib.sha256(f"{seed}:{example.digest}".encode()).digest() for example in examples]
    if len(set(keys)) == 1:
        raise bad_data(
            "DataEmpty",
            f"{len(examples)} rows all say the same and leave nothing to train on after holding one out; at least "
            "two different rows are needed",
        )
    chosen = held_out_keys(keys, data)
    held_out = [example for example, key in zip(examples, keys, strict=True) if key in chosen]
    train = [example for example, key in zip(examples, keys, strict=True) if key not in chosen]
    return Split(train, held_out[: data.eval_rows_max], dict(left_out.counts) if left_out else {})


def held_out_keys(keys: Sequence[bytes], data: DataConfig) -> set[bytes]:
    """Choose what is held out: the first keys in their order, with all of their rows.

    They are at most ``eval_fraction`` of the rows and of the different keys, and at most ``eval_rows_max`` rows; at
    least one key is held out, and one is left to train on. A key with more rows than may be held out is passed over,
    or a prompt that half of the rows share would take all of them from the training.

    Args:
        keys: one for each row, equal ones for rows that must not be parted; at least two different ones.
        data: how much is held out.
    """
    rows_of = Counter(keys)
    most = min(max(1, round(len(keys) * data.eval_fraction)), data.eval_rows_max)
    most_keys = min(max(1, round(len(rows_of) * data.eval_fraction)), len(rows_of) - 1)
    chosen: set[bytes] = set()
    held = 0
    for key in sorted(rows_of):
        if len(chosen) == most_keys or held == most:
            break
        if held + rows_of[key] <= most:
            chosen.add(key)
            held += rows_of[key]
    return chosen or {min(sorted(rows_of), key=lambda key: rows_of[key])}
