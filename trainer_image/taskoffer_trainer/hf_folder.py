"""Which files of a Hugging Face data set folder hold the rows to train on. Needs no heavy library.

Two layouts are known: what ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` write (Arrow files named by
``state.json``), and what a data set repository holds (``data/train-00000-of-00002.parquet``, ``train.jsonl``,
``train/0.csv``), whose splits are read off the names by the words that the ``datasets`` library looks for
(https://huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from taskoffer_trainer.failures import TrainerError, bad_data

__all__ = ["ARROW", "HfFiles", "chosen_files", "hf_files"]

ARROW = "arrow"
"""Suffix of the files that ``save_to_disk`` writes; not a format of its own in a RunConfig."""

_TRAIN = "train"
_SPLIT_WORDS = {
    "train": _TRAIN,
    "training": _TRAIN,
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# In the order of preference: a repository can hold the same rows in more than one of them.
_SUFFIXES = ("parquet", "jsonl", "json", "csv")
_ABOUT_THE_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


@dataclass(frozen=True)
class HfFiles:
    """The files to read, in order."""

    paths: tuple[Path, ...]
    suffix: str
    """One of parquet, jsonl, json, csv and arrow."""
    split: str
    """Name of the split, empty where the folder has none."""
    others: tuple[str, ...] = ()
    """Splits that are there and not read."""


def hf_files(folder: Path) -> HfFiles:
    """Find the files of the training split.

    Raises:
        TrainerError: ``BAD_DATA`` when there is no data, no training split, or more than one configuration.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise bad_data("DataMissing", f"data.path: {folder} {what}; data.fileFormat hf wants a data set's folder")
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder)
    if (folder / "state.json").is_file():
        return HfFiles(_saved_files(folder), ARROW, "")
    return _repository(folder)


def chosen_files(folder: Path) -> HfFiles:
    """Find the files of the saved data set that was fetched as one split, however that is called.

    Raises:
        TrainerError: ``BAD_DATA`` when there is more than one of them.
    """
    saved = sorted(path.parent for path in folder.rglob("state.json") if not _hidden(path, folder))
    if len(saved) != 1:
        names = [path.relative_to(folder).as_posix() for path in saved]
        raise _ambiguous(folder, "saved data sets", names)
    return HfFiles(_saved_files(saved[0]), ARROW, "" if saved[0] == folder else saved[0].name)


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad_data("DataUnreadable", f"{path} cannot be read: {error}") from error


def _saved_splits(folder: Path) -> HfFiles:
    value = _json(folder / "dataset_dict.json")
    named = value.get("splits") if isinstance(value, dict) else None
    splits = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    split = _chosen(folder, splits)
    others = tuple(name for name in splits if name != split)
    return HfFiles(_saved_files(folder / split), ARROW, split, others)


def _saved_files(folder: Path) -> tuple[Path, ...]:
    value = _json(folder / "state.json")
    listed = value.get("_data_files") if isinstance(value, dict) else None
    names = [item["filename"] for item in listed or () if isinstance(item, dict) and "filename" in item]
    # Only names in the folder itself: the list is part of the data, which nobody vouches for.
    paths = tuple(folder / Path(str(name)).name for name in names)
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"names {missing[0]}, which is not there" if missing else "names no data files"
        raise bad_data("DataMissing", f"{folder / 'state.json'} {what}; was the whole data set copied?")
    return paths


def _chosen(folder: Path, splits: list[str]) -> str:
    """Return the name of the saved split to train on: that of the name, or the only one that its name allows."""
    training = [name for name in splits if _word(name) == _TRAIN]
    if _TRAIN in splits:
        return _TRAIN
    if len(training) > 1:
        raise _ambiguous(folder, "splits to train on", training)
    if training:
        return training[0]
    if len(splits) == 1 and not _word(splits[0]):
        return splits[0]
    raise _no_split(folder, sorted(splits))


def _word(name: str) -> str:
    """Return the split that a name speaks of, as ``train`` for ``train_sft``; empty without one."""
    for word in re.split(r"[^A-Za-z]+", name):
        if word.lower() in _SPLIT_WORDS:
            return _SPLIT_WORDS[word.lower()]
    return ""


def _no_split(folder: Path, splits: list[str]) -> TrainerError:
    return bad_data(
        "SplitMissing",
        f"data.path: {folder} has no split named train, only {', '.join(splits) or 'none'}; "
        "rename the split, or name the folder or file of the one to train on",
    )


def _repository(folder: Path) -> HfFiles:
    found: list[Path] = []
    suffix = ""
    for suffix in _SUFFIXES:
        found = [
            path
            for path in sorted(folder.rglob(f"*.{suffix}"))
            if path.is_file() and path.name not in _ABOUT_THE_DATA and not _hidden(path, folder)
        ]
        if found:
            break
    if not found:
        raise bad_data(
            "DataMissing",
            f"data.path: {folder} is no saved data set and holds no file that ends in .{', .'.join(_SUFFIXES)}",
        )
    by_split: dict[str, list[Path]] = {}
    for path in found:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    named = sorted(name for name in by_split if name)
    if not named:
        return HfFiles(tuple(found), suffix, "")
    if _TRAIN not in by_split:
        # Files without a split's name beside others with one are the rest of the data: the rows to train on.
        if "" not in by_split:
            raise _no_split(folder, named)
        return HfFiles(tuple(_one_configuration(folder, by_split[""])), suffix, "", tuple(named))
    others = tuple(name for name in named if name != _TRAIN)
    return HfFiles(tuple(_one_configuration(folder, by_split[_TRAIN])), suffix, _TRAIN, others)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _split_of(path: Path) -> str:
    """Return the split that a file's name or one of its folders speaks of, the nearest first; empty without one."""
    return next((word for part in (path.stem, *reversed(path.parent.parts)) if (word := _word(part))), "")


def _one_configuration(folder: Path, paths: list[Path]) -> list[Path]:
    """Refuse folders that hold several data sets side by side, as ``en/train.parquet`` and ``de/train.parquet``."""
    named: dict[str, list[Path]] = {}
    for path in paths:
        named.setdefault(_configuration(path.relative_to(folder)), []).append(path)
    if len(named) > 1 and _TRAIN not in named:
        raise _ambiguous(folder, "configurations or splits to train on", sorted(named))
    return named.get(_TRAIN) or paths


_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")


def _configuration(path: Path) -> str:
    """Return what a file belongs to: its folders without ``data``, and the split by its full name."""
    stem = _SHARD.sub("", path.stem)
    kept = [part for part in path.parent.parts if part != "data" and not _word(part)]
    split = stem if _word(stem) else next((part for part in path.parent.parts if _word(part)), "")
    return "/".join([*kept, split] if split else kept) or "."


def _ambiguous(folder: Path, what: str, names: list[str]) -> TrainerError:
    return bad_data(
        "SplitAmbiguous",
        f"data.path: {folder} holds {len(names)} {what} ({', '.join(names[:8])}); name the folder of one of them, or "
        "keep only the files of one",
    )
