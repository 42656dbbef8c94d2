"""Folders of Hugging Face data sets are fetched from a hub and a bucket as what they are, and then read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskoffer.api.contract import DataConfig, ExitCode
from taskoffer_trainer.data import read_rows

from .conftest import merge
from .step_runs import Place, contents, dataset
from .test_hf_folder import OTHER, ROWS, WANTED, saved, write
from .test_prepare_buckets import KEYS, bucket_item

pytestmark = pytest.mark.trainer


def rows_of(place: Place, job: str = "job", **data: Any) -> list[dict[str, Any]]:
    return read_rows(DataConfig.model_validate({"path": str(place.item(job=job)), **data}), ["text"])


def one(folder: Path) -> Path:
    return saved(folder, None)


def splits(folder: Path) -> Path:
    return saved(folder, {"train": ROWS, "train_gen": OTHER, "test": OTHER})


def held_out(folder: Path) -> Path:
    return saved(folder, {"train": OTHER, "test": ROWS})


def repository(folder: Path) -> Path:
    write(folder / "data/train-00000-of-00001.parquet", ROWS)
    write(folder / "data/test-00000-of-00001.parquet", OTHER)
    return folder


def evaluation(folder: Path) -> Path:
    write(folder / "validation.jsonl", ROWS)
    write(folder / "train.jsonl", OTHER)
    return folder


def configurations(folder: Path) -> Path:
    saved(folder / "de", {"train": ROWS})
    saved(folder / "en", {"train": OTHER})
    return folder


ON_A_HUB: dict[str, tuple[Any, dict[str, Any], str]] = {
    "saved": (one, {}, "hf"),
    "saved in splits": (splits, {}, "hf"),
    "another split of a saved one": (held_out, {"split": "test"}, "hf"),
    "a saved subset": (configurations, {"configName": "de"}, "hf"),
    "parquet": (repository, {}, "parquet"),
    "another split than train": (evaluation, {"split": "validation"}, "jsonl"),
}


@pytest.mark.parametrize("said", [{}, {"fileFormat": "hf"}], ids=["unsaid", "hf"])
@pytest.mark.parametrize(("make", "hub", "found"), ON_A_HUB.values(), ids=ON_A_HUB.keys())
def test_a_data_sets_folder_on_a_hub_is_read_as_what_is_found_there(
    make: Any, hub: dict[str, Any], found: str, said: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    there = contents(make(tmp_path / "set"))
    place.hub.add("acme/data", {"README.md": b"# Rows", **there}, kind="dataset")
    ended = place.prepare(dataset(source={"hub": hub}, **said))
    # The operator tells the training no format of data from a hub, whether the offer says hf or nothing.
    assert rows_of(place) == WANTED
    assert len(contents(place.item())) < len(there) or make is one
    assert ended.fetched[0].file_format == (said.get("fileFormat") or found)


def test_several_saved_data_sets_of_one_split_are_named(place: Place, tmp_path: Path) -> None:
    place.hub.add("acme/data", contents(configurations(tmp_path / "set")), kind="dataset")
    error = place.refusal(dataset())
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "SplitAmbiguous")
    assert "2 saved data sets of split 'train' (de/train, en/train); set split or configName" in error.message


@pytest.mark.parametrize("make", [one, splits, repository])
def test_a_data_sets_folder_in_a_bucket_comes_whole_and_is_read(make: Any, place: Place, tmp_path: Path) -> None:
    there = contents(make(tmp_path / "set"))
    place.hub.buckets["rows"] = {f"set/{path}": content for path, content in there.items()}
    signed = {"credentials": {"s3CredentialsFile": place.secret("aws", KEYS)}}
    place.prepare(merge(bucket_item(place, "set/"), {"fileFormat": "hf"}), **signed)
    assert contents(place.item()) == there
    assert rows_of(place, fileFormat="hf") == WANTED
    nothing = place.refusal(merge(bucket_item(place, "none/"), {"fileFormat": "hf"}), jobName="other", **signed)
    assert (nothing.reason, "holds no objects" in nothing.message) == ("NothingToFetch", True)


ODD_CARDS = ["configs: 5", "configs: [{data_files: [{split: train, path: null}]}, x]", "configs: {a: 1}", "- x"]


@pytest.mark.parametrize("front", ODD_CARDS)
def test_a_card_that_is_written_otherwise_is_no_fault_of_the_step(front: str, place: Place) -> None:
    """Either the names of the files decide, or what is lacking is said."""
    card = f"---\n{front}\n---\n".encode()
    place.hub.add("acme/data", {"train.csv": b"a", "README.md": card}, kind="dataset")
    if "path" in front:
        assert place.refusal(dataset()).reason == "SplitMissing"
    else:
        place.prepare(dataset())
        assert contents(place.item()) == {"train.csv": b"a"}


def test_of_several_subsets_without_a_default_one_has_to_be_named(place: Place) -> None:
    card = b"""---
configs:
- {config_name: main, data_files: [{split: train, path: main/train-*}]}
- {config_name: socratic, data_files: [{split: train, path: socratic/train-*}]}
---
"""
    files = {"main/train-0.csv": b"m", "socratic/train-0.csv": b"s", "README.md": card}
    place.hub.add("acme/data", files, kind="dataset")
    error = place.refusal(dataset())
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "SplitAmbiguous")
    assert "2 subsets and none is the default (main, socratic); name one in configName" in error.message
    place.prepare(dataset(source={"hub": {"configName": "socratic"}}))
    assert contents(place.item()) == {"socratic/train-0.csv": b"s"}
