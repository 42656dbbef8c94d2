"""A result leaves only whole and as it was verified, arrives as it left, and arrives once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from file_server import sha256
from taskoffer.api.contract import ExitCode, SubmitConfig
from taskoffer_trainer.cache import Cache
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit import submit
from taskoffer_trainer.submit_verify import with_base_model

from .conftest import merge
from .step_runs import Place, contents, wait_for

WEIGHTS = "adapter_model.safetensors"
TOKEN = "hf_write"


@pytest.fixture(scope="session")
def plain_adapter(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all linear layers of the tiny model in PEFT's names, without card and manifest."""
    folder, rank = tmp_path_factory.mktemp("adapter"), 4
    layers: dict[str, tuple[int, int]] = {}
    with safe_open(fixtures_dir / "llama" / "model.safetensors", framework="np") as base:
        for name in base.keys():  # noqa: SIM118 - it is no dictionary.
            if ".layers." in name and name.endswith("_proj.weight"):
                layers[name.removesuffix(".weight")] = tuple(base.get_slice(name).get_shape())
    random = np.random.default_rng(3)
    tensors = {}
    for layer, (outer, inner) in layers.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = random.random((rank, inner), dtype=np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = random.random((outer, rank), dtype=np.float32)
    save_file(tensors, folder / WEIGHTS)
    modules = sorted({layer.rpartition(".")[2] for layer in layers})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest that fits the files of a folder."""
    files = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in contents(folder).items()}
    files.pop("manifest.json", None)
    answers = [{"prompt": "Say hello.", "before": "", "after": "Hello."}]
    base = {"taskID": "task", "files": files, "sampleAnswers": answers, "evalLossBefore": 2.0, "evalLossAfter": 1.0}
    (folder / "manifest.json").write_text(json.dumps({**base, **changes}))


@pytest.fixture
def adapter(plain_adapter: Path, tmp_path: Path) -> Path:
    """A result as a training leaves it."""
    folder = tmp_path / "result" / "adapter"
    shutil.copytree(plain_adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "acme/tiny-llama"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text('---\nbase_model: "acme/tiny-llama"\ntags:\n- lora\n---\n# Adapter\n')
    write_manifest(folder)
    return folder


def config(place: Place, adapter: Path, target: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {
        "jobName": "job",
        "taskID": "task",
        "adapterDir": str(adapter),
        "baseModel": "acme/tiny-llama",
        "target": target,
        "network": place.config()["network"],
        "credentials": {"hubTokenFile": place.secret("token", TOKEN)},
    }
    return merge(base, changes)


HUB = {"hub": {"repository": "miner/0b8f-expected-name"}}


def refusal(place: Place, what: dict[str, Any]) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        place.submit(what)
    return caught.value


def on_hub(place: Place, name: str = "miner/0b8f-expected-name") -> dict[str, bytes]:
    files = dict(place.hub.repositories[name].head)
    files.pop(".gitattributes", None)
    return files


def test_a_result_is_on_the_hub_under_exactly_the_expected_name(
    place: Place, adapter: Path, fixtures_dir: Path
) -> None:
    place.hub.token = TOKEN
    ended = place.submit(config(place, adapter, HUB, baseModelPath=str(fixtures_dir / "llama")))
    assert on_hub(place) == contents(adapter)
    repository = place.hub.repositories["miner/0b8f-expected-name"]
    assert repository.private
    assert len(repository.commits) == 2
    assert ended.published is not None
    assert ended.published.revision == repository.refs["main"]
    assert ended.published.to == f"{place.hub.url}/miner/0b8f-expected-name"
    assert ended.adapter_sha256 == sha256((adapter / WEIGHTS).read_bytes())
    # To the store of large files, which is another host, the token does not go.
    assert place.hub.requests("PUT", "/lfs/")
    assert not [one for one in place.hub.requests("PUT", "/lfs/") if "authorization" in one.headers]


def test_what_was_completed_is_on_the_hub_as_well(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    (adapter / "README.md").write_text("# An adapter\n")
    write_manifest(adapter)
    place.submit(config(place, adapter, HUB))
    assert on_hub(place)["README.md"].startswith(b'---\nbase_model: "acme/tiny-llama"\n')
    manifest = json.loads(on_hub(place)["manifest.json"])
    assert manifest["files"]["README.md"]["sha256"] == sha256(on_hub(place)["README.md"])
    assert on_hub(place)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()


def test_an_upload_that_breaks_half_way_is_made_again_from_its_beginning(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    place.hub.faults.break_uploads = 1
    place.submit(config(place, adapter, HUB))
    assert on_hub(place) == contents(adapter)
    assert len(place.hub.requests("PUT", "/lfs/")) == 2


def test_the_deadline_ends_an_upload(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    submitting = SubmitConfig.model_validate(config(place, adapter, HUB))
    interrupt = Interrupt()
    place.hub.on_upload = lambda: setattr(interrupt, "deadline", datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(TrainerError) as caught:
        submit(submitting, interrupt)
    assert caught.value.reason == "DeadlinePassed"
    assert set(on_hub(place)) <= {".gitattributes"}


def test_a_subfolder_and_a_public_repository_are_as_asked(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    place.submit(config(place, adapter, merge(HUB, {"hub": {"subfolder": "checkpoints", "private": False}})))
    assert on_hub(place) == {f"checkpoints/{name}": data for name, data in contents(adapter).items()}
    assert not place.hub.repositories["miner/0b8f-expected-name"].private


def test_a_second_submit_uploads_nothing(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    first = place.submit(config(place, adapter, HUB))
    place.hub.asked.clear()
    assert place.submit(config(place, adapter, HUB)).published == first.published
    assert not place.hub.requests("PUT", "") + place.hub.requests("POST", "/commit/")


def test_a_submit_that_is_killed_at_any_request_is_finished_by_the_next(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    what = config(place, adapter, HUB)
    whole = place.start("submit", what, name="whole")
    assert whole.wait(90) == 0, place.log("whole")
    requests = len(place.hub.asked)
    assert requests > 6
    for number in range(2, requests, 4):
        place.hub.repositories.clear()
        place.hub.lfs.clear()
        begun = len(place.hub.asked)
        process = place.start("submit", what)
        wait_for(lambda begun=begun, number=number: len(place.hub.asked) >= begun + number)  # type: ignore[misc]
        process.kill()
        process.wait()
        for repository in place.hub.repositories.values():
            assert repository.head.keys() in ({".gitattributes"}, {".gitattributes", *contents(adapter)})
    process = place.start("submit", what)
    assert process.wait(90) == 0, place.log()
    assert on_hub(place) == contents(adapter)
    assert place.end()["published"]["files"] == len(contents(adapter))


def lose_a_byte(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the weights and let the manifest name what they are now."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    write_manifest(folder)


def make_infinite(tensors: dict[str, Any]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("inf")


def make_empty(tensors: dict[str, Any]) -> None:
    tensors[sorted(tensors)[0]] = tensors[sorted(tensors)[0]][:0]


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors[sorted(tensors)[0]]


def drop_a_layer(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def widen(tensors: dict[str, Any]) -> None:
    name = next(name for name in sorted(tensors) if ".lora_A." in name)
    tensors[name] = np.concatenate([tensors[name], tensors[name]], axis=1)


def learn_nothing(tensors: dict[str, Any]) -> None:
    """Leave the second matrices as they begin."""
    for name in tensors:
        if ".lora_B." in name:
            tensors[name] = np.zeros_like(tensors[name])


def half_precision_of_nothing(folder: Path) -> None:
    rewrite(folder, learn_nothing)
    make_half_precision(folder, 0.5)


def make_half_precision(folder: Path, value: float) -> None:
    """Write the weights in bfloat16, one of them with this value."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_torch(folder / WEIGHTS).items()}
    next(iter(tensors.values()))[0, 0] = value
    save_torch(tensors, folder / WEIGHTS)
    write_manifest(folder)


def empty_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x00" * 40)
    write_manifest(folder)


BROKEN: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("nothing was left", shutil.rmtree, "ResultEmpty", "has left nothing"),
    ("an empty folder", lambda f: [path.unlink() for path in f.iterdir()], "ResultEmpty", "has left nothing"),
    ("no manifest", lambda f: (f / "manifest.json").unlink(), "ManifestMissing", "manifest.json"),
    ("half a manifest", lambda f: (f / "manifest.json").write_text('{"files": {'), "ManifestBroken", "not JSON"),
    ("a manifest without files", lambda f: (f / "manifest.json").write_text("{}"), "ManifestBroken", "names no files"),
    ("a file outside", lambda f: write_manifest(f, files={"../x": {}}), "ManifestBroken", "'../x'"),
    ("no weights", lambda f: ((f / WEIGHTS).unlink(), write_manifest(f)), "ResultEmpty", "no .safetensors"),
    ("a missing file", lambda f: (f / "README.md").unlink(), "FileMissing", "README.md"),
    ("a changed file", lose_a_byte, "FileChanged", WEIGHTS),
    ("forty bytes", empty_file, "AdapterBroken", WEIGHTS),
    ("a value that is not finite", lambda f: rewrite(f, make_infinite), "AdapterBroken", "not finite"),
    ("a value in bfloat16", lambda f: make_half_precision(f, float("nan")), "AdapterBroken", "not finite"),
    ("an empty tensor", lambda f: rewrite(f, make_empty), "AdapterBroken", "is empty"),
    ("half a pair", lambda f: rewrite(f, drop_one), "AdapterBroken", "is there without"),
    ("nothing learned", lambda f: rewrite(f, learn_nothing), "NothingLearned", "changes nothing"),
    ("nothing learned in bfloat16", half_precision_of_nothing, "NothingLearned", "changes nothing"),
    ("a layer too few", lambda f: rewrite(f, drop_a_layer), "AdapterDoesNotFit", "are missing"),
    ("another width", lambda f: rewrite(f, widen), "AdapterDoesNotFit", "needs (4, "),
    ("no evidence", lambda f: write_manifest(f, sampleAnswers=[{"after": " "}]), "NoEvidence", "sampleAnswers"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "spoil", "reason", "words"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_empty_or_cannot_be_verified_is_not_handed_over(
    what: str, spoil: Callable[[Path], Any], reason: str, words: str, place: Place, adapter: Path, fixtures_dir: Path
) -> None:
    place.hub.token = TOKEN
    spoil(adapter)
    error = refusal(place, config(place, adapter, HUB, baseModelPath=str(fixtures_dir / "llama")))
    assert (error.code, error.reason) == (ExitCode.VERIFY_FAILED, reason), f"{what}: {error.message}"
    assert words in error.message
    assert place.hub.asked == []


def test_weights_in_bfloat16_are_handed_over(place: Place, adapter: Path, tmp_path: Path) -> None:
    make_half_precision(adapter, 0.5)
    place.submit(config(place, adapter, {"folder": str(tmp_path / "out")}))
    assert contents(tmp_path / "out") == contents(adapter)


def test_an_adapter_of_another_model_does_not_fit(place: Place, adapter: Path, fixtures_dir: Path) -> None:
    error = refusal(place, config(place, adapter, HUB, baseModelPath=str(fixtures_dir / "phi3")))
    assert (error.code, error.reason) == (ExitCode.VERIFY_FAILED, "AdapterDoesNotFit")


def test_a_picture_is_evidence_too(place: Place, adapter: Path, tmp_path: Path) -> None:
    (adapter / "after-1.png").write_bytes(b"not a picture")
    write_manifest(adapter, sampleAnswers=[])
    target = {"folder": str(tmp_path / "out")}
    assert refusal(place, config(place, adapter, target)).reason == "NoEvidence"
    (adapter / "after-1.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    write_manifest(adapter, sampleAnswers=[])
    place.submit(config(place, adapter, target))
    assert (tmp_path / "out" / "after-1.png").is_file()


def test_card_and_settings_get_the_public_name_of_the_base_model(place: Place, adapter: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "/cache/jobs/job/model"})
    )
    (adapter / "README.md").unlink()
    write_manifest(adapter)
    out = tmp_path / "out"
    place.submit(config(place, adapter, {"folder": str(out)}))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny-llama"
    assert (out / "README.md").read_text().startswith('---\nbase_model: "acme/tiny-llama"\n')
    assert "evalLossAfter: 1.0" in (out / "README.md").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    for name, about in manifest["files"].items():
        assert about == {"bytes": (out / name).stat().st_size, "sha256": sha256((out / name).read_bytes())}
    assert set(contents(out)) == {*manifest["files"], "manifest.json"}


CARDS = [
    ("# Plain\n", '---\nbase_model: "a/b"\nlibrary_name: peft\n---\n\n# Plain\n'),
    ("---\ntags:\n- x\n---\n# T\n", '---\nbase_model: "a/b"\ntags:\n- x\n---\n# T\n'),
    ("---\nbase_model: /local\ntags: []\n---\n# T\n", '---\nbase_model: "a/b"\ntags: []\n---\n# T\n'),
    ("---\nbase_model:\n- /local\n- two\nlicense: x\n---\n", '---\nbase_model: "a/b"\nlicense: x\n---\n'),
    ('---\nbase_model: "a/b"\n---\n# T\n', '---\nbase_model: "a/b"\n---\n# T\n'),
]


@pytest.mark.parametrize(("card", "complete"), CARDS, ids=[repr(case[0]) for case in CARDS])
def test_a_card_is_completed_and_otherwise_left(card: str, complete: str) -> None:
    assert with_base_model(card, "a/b") == complete
    assert with_base_model(complete, "a/b") == complete


def test_a_name_that_the_hub_knows_otherwise_is_refused(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    place.hub.add("miner/renamed", {"x": b""}, private=True)
    place.hub.add("miner/0b8f-expected-name", {"x": b""}, private=True)
    place.hub.renamed["miner/0b8f-expected-name"] = "miner/renamed"
    error = refusal(place, config(place, adapter, HUB))
    assert (error.code, error.reason) == (ExitCode.VERIFY_FAILED, "NameMismatch")


def test_a_private_result_does_not_go_to_a_public_repository(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    place.hub.add("miner/0b8f-expected-name", {"x": b""})
    error = refusal(place, config(place, adapter, HUB))
    assert (error.code, error.reason) == (ExitCode.VERIFY_FAILED, "RepositoryPublic")
    assert on_hub(place) == {"x": b""}


HUB_FAULTS: list[tuple[str, str, dict[str, Any], ExitCode, str]] = [
    ("a wrong token", "hf_other", {}, ExitCode.NO_ACCESS, "AccessDenied"),
    ("a hub that is down", TOKEN, {"statuses": [503] * 99}, ExitCode.RESTART, "HubUnavailable"),
    ("an upload that is lost", TOKEN, {"lose_upload": 99}, ExitCode.VERIFY_FAILED, "SubmitRefused"),
]


@pytest.mark.parametrize(
    ("what", "token", "faults", "code", "reason"), HUB_FAULTS, ids=[case[0] for case in HUB_FAULTS]
)
def test_what_the_hub_does_not_take_is_no_success(
    what: str, token: str, faults: dict[str, Any], code: ExitCode, reason: str, place: Place, adapter: Path
) -> None:
    place.hub.token = token
    for name, value in faults.items():
        setattr(place.hub.faults, name, value)
    error = refusal(place, config(place, adapter, HUB))
    assert (error.code, error.reason) == (code, reason), f"{what}: {error.message}"
    assert TOKEN not in error.message


def test_a_commit_that_fails_for_a_moment_is_made_again(place: Place, adapter: Path) -> None:
    place.hub.token = TOKEN
    place.hub.faults.refuse_commits = 1
    place.submit(config(place, adapter, HUB))
    assert on_hub(place) == contents(adapter)


def test_a_folder_gets_all_at_once_and_what_was_there_is_replaced(place: Place, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "claim" / "task"
    out.mkdir(parents=True)
    (out / "older.txt").write_text("of another attempt")
    ended = place.submit(config(place, adapter, {"folder": str(out)}))
    assert contents(out) == contents(adapter)
    assert ended.published is not None
    assert ended.published.to == str(out)
    before = {path: path.stat().st_ino for path in out.iterdir()}
    place.submit(config(place, adapter, {"folder": str(out)}))
    assert {path: path.stat().st_ino for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["task"]


def test_a_bucket_gets_every_file_and_is_read_back(place: Place, adapter: Path) -> None:
    place.hub.buckets["results"] = {}
    keys = "[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = secret\n"
    target = {"s3": {"url": "s3://results/task-one/", "endpoint": f"{place.hub.url}/s3"}}
    what = config(place, adapter, target, credentials={"s3CredentialsFile": place.secret("aws", keys)})
    place.submit(what)
    assert place.hub.buckets["results"] == {f"task-one/{name}": data for name, data in contents(adapter).items()}
    assert place.hub.requests("PUT", "")[-1].path.endswith("manifest.json")
    place.hub.asked.clear()
    place.submit(what)
    assert place.hub.requests("PUT", "") == []
    place.hub.buckets["results"].clear()
    place.hub.faults.lose_upload = 1
    assert refusal(place, what).reason == "UploadMismatch"
    place.hub.region = "eu-central-1"
    elsewhere = refusal(place, what)
    assert (elsewhere.code, elsewhere.reason) == (ExitCode.BAD_CONFIG, "WrongRegion")
    assert "s3Region of the policy to eu-central-1" in elsewhere.message
    no_keys = config(place, adapter, target)
    assert refusal(place, no_keys).reason == "SecretMissing"


def test_what_the_job_held_in_the_cache_is_given_up_at_the_end_and_not_before(
    place: Place, adapter: Path, tmp_path: Path
) -> None:
    place.hub.add("acme/model", {"config.json": b"{}", "model.safetensors": b"w"})
    place.prepare({"name": "model", "kind": "model", "source": {"hub": {"repository": "acme/model"}}})
    what = config(place, adapter, {"folder": "/proc/nowhere/out"}, cache={"path": str(place.cache)})
    assert refusal(place, what).reason == "FolderNotWritable"
    cache = Cache.open(place.cache, Interrupt())
    assert cache.lease("job") is not None
    place.submit(merge(what, {"target": {"folder": str(tmp_path / "out")}}))
    assert not cache.job("job").exists()
    place.submit(merge(what, {"target": {"folder": str(tmp_path / "out")}}))
