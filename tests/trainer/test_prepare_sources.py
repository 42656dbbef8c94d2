"""What the prepare step brings from a hub, an address, a bucket and a path, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from file_server import WebFile, sha256
from taskoffer.api.contract import ExitCode, expiry
from taskoffer_trainer.addresses import shown, without_signature
from taskoffer_trainer.model_files import choose_model_files

from .conftest import merge
from .step_runs import Place, contents, dataset, model, web

INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": INDEX.encode(),
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": os.urandom(70_000),
    "model-00002-of-00002.safetensors": os.urandom(50_000),
    "README.md": b"# A model",
}
NOT_READ = {
    "pytorch_model.bin": b"a pickle",
    "modeling_acme.py": b"print('foreign code')",
    "original/consolidated.safetensors": b"again",
    "onnx/model.onnx": b"other",
    ".gitattributes": b"x",
}


def test_a_model_of_the_hub_comes_without_pickles_code_and_copies(place: Place) -> None:
    commit = place.hub.add("acme/model", {**MODEL, **NOT_READ}).refs["main"]
    ended = place.prepare(model())
    assert contents(place.item("model")) == MODEL
    (item,) = ended.fetched
    assert (item.revision, item.files, item.bytes) == (commit, len(MODEL), sum(map(len, MODEL.values())))
    assert item.fetched_bytes == item.bytes


UNET, ENCODER = "unet/diffusion_pytorch_model", "text_encoder/model"
TWICE: dict[str, tuple[list[str], list[str]]] = {
    "Mistral's own file beside parts with an index": (
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "params.json"],
        ["consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated-00001-of-00003.safetensors"],
    ),
    "half precision in parts beside other parts": (
        ["model_index.json", f"{UNET}-00001-of-00003.safetensors", f"{UNET}.safetensors.index.json"],
        [f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.safetensors.index.fp16.json"],
    ),
    "variants in one file": (
        ["model_index.json", f"{UNET}.safetensors", f"{ENCODER}.safetensors"],
        [f"{UNET}.non_ema.safetensors", f"{ENCODER}.fp16.safetensors", f"{UNET}.fp16-00001-of-00002.safetensors"],
    ),
    "half precision alone": (
        ["model_index.json", f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.safetensors.index.fp16.json"], [],
    ),
    "an adapter's and other names": (["config.json", "adapter_model.safetensors", "model.safetensors"], []),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "again"), TWICE.values(), ids=TWICE.keys())
def test_of_weights_that_are_there_twice_those_come_that_training_reads(wanted: list[str], again: list[str]) -> None:
    assert sorted(choose_model_files(sorted(wanted + again))) == sorted(wanted)


PARTS = {f"model-0000{n}-of-00002.safetensors": b"w%d" % n for n in (1, 2)}
SDXL = json.dumps({"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]})
CONFIG = {"config.json": b"{}"}
NOT_READY: dict[str, tuple[dict[str, bytes], str, list[str]]] = {
    "pickles": (
        {**CONFIG, "pytorch_model-00001-of-00002.bin": b"p", "tokenizer.json": b"{}"},
        "PicklesOnly",
        ["acme/model@main", "pytorch_model-00001-of-00002.bin", "convert them to safetensors"],
    ),
    "no weights": ({**CONFIG, "model.gguf": b"g"}, "ModelIncomplete", ["no weights beside config.json", "safetensors"]),
    "Mistral's file alone": ({**CONFIG, "consolidated.safetensors": b"c"}, "ModelIncomplete", ["no weights beside"]),
    "a part": (
        {**CONFIG, "model.safetensors.index.json": INDEX.encode(), "model-00001-of-00002.safetensors": b"w"},
        "ModelIncomplete",
        ["1 of the files that its index names", "model-00002-of-00002.safetensors"],
    ),
    "parts without their index": (
        {**CONFIG, **PARTS},
        "ModelIncomplete",
        ["its parts and model.safetensors.index.json"],
    ),
    "a variant alone": (
        {**CONFIG, "model.fp16.safetensors": b"h", "pytorch_model.bin": b"p"},
        "ModelIncomplete",
        ["the name of a variant (model.fp16.safetensors)", "store them without one", "name a model, or a revision"],
    ),
    "a variant alone in parts": (
        {**CONFIG, "model.fp16-00001-of-00001.safetensors": b"h", "model.safetensors.index.fp16.json": b"{}"},
        "ModelIncomplete",
        ["the name of a variant (model.fp16-00001-of-00001.safetensors)"],
    ),
    "a component": (
        {"model_index.json": SDXL.encode(), f"{UNET}.safetensors": b"u", "vae/diffusion_pytorch_model.bin": b"p"},
        "ModelIncomplete",
        ["no weights (*.safetensors) of vae"],
    ),
}


@pytest.mark.parametrize(("files", "reason", "words"), NOT_READY.values(), ids=NOT_READY.keys())
def test_a_model_that_training_could_not_load_is_not_ready(
    files: dict[str, bytes], reason: str, words: list[str], place: Place
) -> None:
    place.hub.add("acme/model", files)
    error = place.refusal(model())
    assert (error.code, error.reason) == (ExitCode.NO_MODEL, reason), error.message
    for word in words:
        assert word in error.message
    assert not place.item("model").exists()


def test_a_model_in_parts_is_ready_with_all_that_its_index_names(place: Place) -> None:
    files = {**CONFIG, **PARTS, "model.safetensors.index.json": INDEX.encode()}
    place.hub.add("acme/model", files)
    place.prepare(model())
    assert contents(place.item("model")) == files


PICKLES = {f"pytorch_model-0000{n}-of-00002.bin": b"p%d" % n for n in (1, 2)}
INDEX_OF_PICKLES = {
    "pytorch_model.bin.index.json": json.dumps({"weight_map": dict(zip("ab", PICKLES, strict=True))}).encode()
}


def test_a_model_with_its_weights_as_safetensors_and_as_pickles_is_ready_without_the_pickles(place: Place) -> None:
    wanted = {**CONFIG, **PARTS, "model.safetensors.index.json": INDEX.encode()}
    place.hub.add("acme/model", {**wanted, **PICKLES, **INDEX_OF_PICKLES})
    place.prepare(model())
    assert contents(place.item("model")) == wanted
    # What somebody has chosen otherwise can hold the index alone, which nobody reads.
    place.prepare(model(source={"hub": {"allowPatterns": ["*.json", "*.safetensors"]}}), jobName="b")
    assert contents(place.item("model", "b")) == {**wanted, **INDEX_OF_PICKLES}


def test_pickles_that_would_be_loaded_have_to_be_all_there(place: Place) -> None:
    first = next(iter(PICKLES))
    place.hub.add("acme/model", {**CONFIG, first: PICKLES[first], "model.fp16.safetensors": b"h", **INDEX_OF_PICKLES})
    error = place.refusal(model(source={"hub": {"allowPatterns": ["*"]}}))
    assert (error.code, error.reason) == (ExitCode.NO_MODEL, "ModelIncomplete")
    assert "the first is pytorch_model-00002-of-00002.bin" in error.message


def test_a_pipeline_of_the_hub_comes_once_and_in_full_precision(place: Place) -> None:
    wanted = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"u" * 100,
        "vae/diffusion_pytorch_model.fp16.safetensors": b"v" * 100,
        "tokenizer/merges.txt": b"m",
    }
    more = {"sd_xl_base_1.0.safetensors": b"all" * 99, "unet/diffusion_pytorch_model.fp16.safetensors": b"h" * 50}
    place.hub.add("acme/model", {**wanted, **more})
    place.prepare(model())
    assert contents(place.item("model")) == wanted


def test_patterns_take_the_place_of_the_choice(place: Place) -> None:
    place.hub.add("acme/model", {**MODEL, **NOT_READ})
    patterns = {"allowPatterns": ["*.json", "*.bin", "onnx/"], "ignorePatterns": ["tokenizer*", "model*"]}
    place.prepare(model(source={"hub": patterns}))
    assert contents(place.item("model")).keys() == {"config.json", "pytorch_model.bin", "onnx/model.onnx"}


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: "rows/a*.jsonl"
  - split: test
    path: rows/z.jsonl
- config_name: small
  data_files:
  - split: train
    path: ["rows/a1.jsonl"]
---
# Rows
"""
SHARDS = {f"data/train-0000{n}-of-00002.parquet": b"PAR1%d" % n for n in range(2)}
SPLITS = [
    ({**SHARDS, "data/test-00000-of-00001.parquet": b"t", "README.md": b"none"}, {}, "parquet", set(SHARDS)),
    ({**SHARDS, "data/test-0.parquet": b"t"}, {"split": "test"}, "parquet", {"data/test-0.parquet"}),
    ({"rows/a1.jsonl": b"1", "rows/a2.jsonl": b"2", "rows/z.jsonl": b"3", "README.md": CARD}, {}, "jsonl",
     {"rows/a1.jsonl", "rows/a2.jsonl"}),
    ({"rows/a1.jsonl": b"1", "rows/a2.jsonl": b"2", "README.md": CARD}, {"configName": "small"}, "jsonl",
     {"rows/a1.jsonl"}),
    ({"one.csv": b"a,b", "dataset_infos.json": b"{}"}, {}, "csv", {"one.csv"}),
    ({"en/train.json": b"[]", "de/train.json": b"[]"}, {"configName": "de"}, "json", {"de/train.json"}),
    ({"train.csv": b"c", "train.parquet": b"p"}, {}, "parquet", {"train.parquet"}),
]  # fmt: skip


@pytest.mark.parametrize(("files", "hub", "found", "chosen"), SPLITS, ids=[str(sorted(c[3])) for c in SPLITS])
def test_the_files_of_the_wanted_split_come_in_one_format(
    files: dict[str, bytes], hub: dict[str, Any], found: str, chosen: set[str], place: Place
) -> None:
    place.hub.add("acme/data", files, kind="dataset")
    ended = place.prepare(dataset(source={"hub": hub}))
    assert contents(place.item()) == {path: files[path] for path in chosen}
    assert ended.fetched[0].file_format == found


def test_a_branch_that_moves_does_not_move_the_data_of_a_job(place: Place) -> None:
    repository = place.hub.add("acme/data", {"train.csv": b"old"}, kind="dataset")
    place.prepare(dataset())
    repository.commit({"train.csv": b"new"})
    assert place.prepare(dataset()).fetched[0].fetched_bytes == 0
    assert contents(place.item()) == {"train.csv": b"old"}
    place.prepare(dataset(), jobName="later")
    assert contents(place.item(job="later")) == {"train.csv": b"new"}


def test_a_pinned_commit_in_the_cache_needs_no_hub(place: Place) -> None:
    commit = place.hub.add("acme/model", MODEL).refs["main"]
    pinned = model(source={"hub": {"revision": commit}})
    place.prepare(pinned)
    place.hub.repositories.clear()
    assert place.prepare(pinned, jobName="other").fetched[0].fetched_bytes == 0
    assert contents(place.item("model", "other")) == MODEL


def test_the_token_goes_to_the_hub_and_nowhere_else(place: Place) -> None:
    place.hub.token = "hf_secret"
    place.hub.add("acme/model", MODEL, private=True)
    token = {"hubTokenFile": place.secret("token", "hf_secret\n")}
    place.prepare(model(), credentials=token)
    assert contents(place.item("model")) == MODEL
    asked = place.hub.asked
    assert all(one.headers.get("authorization") == "Bearer hf_secret" for one in asked if "/cdn/" not in one.path)
    assert not [one for one in asked if "/cdn/" in one.path and "authorization" in one.headers]


HUB_REFUSALS: list[tuple[dict[str, Any], dict[str, Any], ExitCode, str, list[str]]] = [
    ({}, {"repository": "acme/none"}, ExitCode.NO_ACCESS, "AccessDenied", ["acme/none", "hubTokenFile"]),
    ({"private": True}, {}, ExitCode.NO_ACCESS, "AccessDenied", ["acme/model", "missing, or the token may not"]),
    ({"gated": True}, {}, ExitCode.NO_ACCESS, "AccessDenied", ["gated"]),
    ({}, {"revision": "v9"}, ExitCode.NO_MODEL, "NotFound", ["acme/model@v9", "no such revision"]),
    ({}, {"allowPatterns": ["*.gguf"]}, ExitCode.NO_MODEL, "NothingToFetch", ["patterns"]),
    ({}, {"allowPatterns": ["*.md"]}, ExitCode.NO_MODEL, "ModelIncomplete", ["config.json", "README.md"]),
]


@pytest.mark.parametrize(
    ("about", "hub", "code", "reason", "words"), HUB_REFUSALS, ids=[str(c[:2]) for c in HUB_REFUSALS]
)
def test_what_the_hub_does_not_give_is_named(
    about: dict[str, Any], hub: dict[str, Any], code: ExitCode, reason: str, words: list[str], place: Place
) -> None:
    place.hub.add("acme/model", MODEL, **about)
    error = place.refusal(model(source={"hub": hub}))
    assert (error.code, error.reason) == (code, reason), error.message
    for word in words:
        assert word in error.message


def test_a_wrong_token_is_no_access(place: Place) -> None:
    place.hub.token = "hf_right"
    place.hub.add("acme/model", MODEL, private=True)
    error = place.refusal(model(), credentials={"hubTokenFile": place.secret("token", "hf_wrong")})
    assert (error.code, error.reason) == (ExitCode.NO_ACCESS, "AccessDenied")
    assert "hf_wrong" not in error.message


def test_a_split_that_is_not_there_is_named_with_what_is(place: Place) -> None:
    place.hub.add("acme/data", {"test.csv": b"1", "dev.csv": b"2"}, kind="dataset")
    error = place.refusal(dataset())
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "SplitMissing")
    assert "'train'" in error.message
    assert "dev.csv" in error.message


def test_a_file_behind_an_address_comes_under_the_name_of_its_format(place: Place) -> None:
    place.hub.files["rows"] = WebFile(b'{"a": 1}\n', '"v1"')
    ended = place.prepare(web(f"{place.hub.url}/files/rows", sha256=sha256(b'{"a": 1}\n')))
    assert contents(place.item()) == {"data.jsonl": b'{"a": 1}\n'}
    assert (ended.exit_code, ended.fetched[0].file_format) == (0, "jsonl")


def test_another_signature_of_the_same_object_fetches_nothing(place: Place) -> None:
    place.hub.files["rows"] = WebFile(b"row\n" * 1000, '"v1"')
    address = f"{place.hub.url}/signed/rows?X-Amz-Signature=good&X-Amz-Date="
    place.prepare(web(address + "1"))
    before = place.hub.sent("rows")
    assert place.prepare(web(address + "2"), jobName="other").fetched[0].fetched_bytes == 0
    assert place.hub.sent("rows") == before
    place.hub.files["rows"] = WebFile(b"new\n", '"v2"')
    place.prepare(web(address + "3"), jobName="third")
    assert contents(place.item(job="third")) == {"data.jsonl": b"new\n"}
    assert contents(place.item(job="other")) == {"data.jsonl": b"row\n" * 1000}


WEB_REFUSALS: list[tuple[str, dict[str, Any], ExitCode, str, list[str]]] = [
    ("/signed/rows?X-Amz-Signature=bad", {}, ExitCode.NO_ACCESS, "UrlExpired", ["Request has expired", "a new one"]),
    (
        "/signed/rows?X-Amz-Signature=good&X-Amz-Date=20250101T000000Z&X-Amz-Expires=60",
        {},
        ExitCode.NO_ACCESS,
        "UrlExpired",
        ["2025-01-01T00:01:00Z"],
    ),
    ("/files/rows", {"source": {"url": {"expiresAt": "2025-01-01T00:00:00Z"}}}, ExitCode.NO_ACCESS, "UrlExpired", []),
    ("/files/nothing", {}, ExitCode.BAD_DATA, "NotFound", ["404"]),
    ("/files/rows", {"sha256": "0" * 64}, ExitCode.BAD_DATA, "ChecksumMismatch", ["0" * 64, sha256(b"rows"), "twice"]),
    ("/files/rows", {"sizeLimit": 3}, ExitCode.BAD_DATA, "TooLarge", ["4 bytes", "leaves it 3"]),
    ("/files/endless", {"sizeLimit": 50_000}, ExitCode.BAD_DATA, "TooLarge", ["sizeLimit"]),
    ("/files/empty", {}, ExitCode.BAD_DATA, "Empty", ["no bytes"]),
    ("/files/packed", {}, ExitCode.BAD_DATA, "Refused", ["compressed"]),
    ("/files/rows", {"fileFormat": "zip"}, ExitCode.BAD_DATA, "NotAnArchive", ["data.zip"]),
]


@pytest.mark.parametrize(
    ("path", "changes", "code", "reason", "words"), WEB_REFUSALS, ids=[c[0] + c[3] for c in WEB_REFUSALS]
)
def test_an_address_that_does_not_give_the_data_is_named_without_its_signature(
    path: str, changes: dict[str, Any], code: ExitCode, reason: str, words: list[str], place: Place
) -> None:
    place.hub.files |= {
        "rows": WebFile(b"rows", '"v1"'),
        "endless": WebFile(b"x" * 100_000, length=False),
        "empty": WebFile(b"", '"v1"'),
        "packed": WebFile(b"zz", encoding="gzip"),
    }
    error = place.refusal(web(place.hub.url + path, **changes))
    assert (error.code, error.reason) == (code, reason), error.message
    assert "Signature" not in error.message
    for word in words:
        assert word in error.message
    assert not place.item().exists()


def test_an_archive_of_pictures_stays_an_archive(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.txt", "a circle")
    place.hub.files["pictures"] = WebFile(path.read_bytes(), '"v1"')
    place.prepare(web(f"{place.hub.url}/files/pictures", fileFormat="zip"))
    assert contents(place.item()) == {"data.zip": path.read_bytes()}


def test_a_folder_of_the_pod_is_copied_and_no_link_leads_out_of_it(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jsonl").write_bytes(b"1")
    item = {"name": "data", "kind": "data", "source": {"path": str(folder)}}
    place.prepare(item)
    (folder / "sub" / "a.jsonl").write_bytes(b"changed")
    assert contents(place.item()) == {"sub/a.jsonl": b"1"}
    (folder / "out.jsonl").symlink_to("/etc/passwd")
    error = place.refusal(item, jobName="other")
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "NameRefused")
    missing = place.refusal(merge(item, {"source": {"path": "/nowhere/rows"}}), jobName="third")
    assert (missing.reason, "/nowhere/rows" in missing.message) == ("NotFound", True)


EXPIRIES = [
    ("https://b.example/k?X-Amz-Date=20260102T030405Z&X-Amz-Expires=3600&X-Amz-Signature=s", (2026, 1, 2, 4, 4, 5)),
    ("https://g.example/k?X-Goog-Date=20260102T030405Z&X-Goog-Expires=60&X-Goog-Signature=s", (2026, 1, 2, 3, 5, 5)),
    ("https://b.example/k?AWSAccessKeyId=a&Signature=s&Expires=1767322800", (2026, 1, 2, 3, 0, 0)),
    ("https://a.example/k?sv=1&se=2026-01-02T03:00:00Z&sig=s", (2026, 1, 2, 3, 0, 0)),
    ("https://a.example/k?expires=never", None),
    ("https://a.example/k?X-Amz-Date=yesterday&X-Amz-Expires=1", None),
    ("https://a.example/k", None),
]  # fmt: skip


@pytest.mark.parametrize(("url", "moment"), EXPIRIES, ids=[case[0][8:40] for case in EXPIRIES])
def test_an_address_says_itself_when_it_expires(url: str, moment: tuple[int, ...] | None) -> None:
    found = expiry(url)
    assert found == (None if moment is None else datetime(*moment, tzinfo=UTC))  # type: ignore[misc,arg-type]


def test_a_signature_is_neither_shown_nor_part_of_what_an_address_names() -> None:
    one = "https://me:pw@b.example:8443/k?version=3&X-Amz-Signature=aaa&X-Amz-Date=1"
    two = "https://me:pw@b.example:8443/k?version=3&X-Amz-Signature=bbb&X-Amz-Date=2"
    assert without_signature(one) == without_signature(two) == "https://me:pw@b.example:8443/k?version=3"
    assert shown(one) == "https://b.example:8443/k?…"
    assert without_signature("https://b.example/k?expires=5") == "https://b.example/k?expires=5"


def test_an_address_that_is_still_good_for_a_while_is_taken(place: Place) -> None:
    place.hub.files["rows"] = WebFile(b"row", '"v1"')
    stamp = (datetime.now(UTC) - timedelta(seconds=10)).strftime("%Y%m%dT%H%M%SZ")
    place.prepare(web(f"{place.hub.url}/signed/rows?X-Amz-Signature=good&X-Amz-Date={stamp}&X-Amz-Expires=600"))
    assert contents(place.item()) == {"data.jsonl": b"row"}
