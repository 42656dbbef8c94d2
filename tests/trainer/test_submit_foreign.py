"""What a foreign trainer has left is handed over only when it is a plain adapter that works on the base model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from file_server import sha256
from taskoffer.api.contract import ExitCode, SubmitConfig
from taskoffer_trainer.failures import TrainerError

from .conftest import merge
from .step_runs import Place, contents

# PEFT asks transformers for something by its older name, and diffusers numpy for an array in its older way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
SECRET = "hf_topsecret"


@pytest.fixture(scope="module")
def trained(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with plain PEFT, and all that a common training script leaves beside the adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(fixtures_dir / "llama", local_files_only=True)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    train(model, lambda ids: model(input_ids=ids, labels=ids).loss, torch.randint(5, 60, (2, 16)))
    model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(fixtures_dir / "llama", local_files_only=True).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: /cache/models/acme--tiny-llama\n---\n# Mine\n")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"\x80\x04.")
    return folder


def train(model: Any, loss_of: Callable[[Any], Any], rows: Any) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    for _step in range(3):
        loss_of(rows).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def result(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "result" / "adapter")
    return tmp_path / "result" / "adapter"


def config(place: Place, folder: Path, base: Path, out: Path | None = None, **changes: Any) -> dict[str, Any]:
    wire = {
        "jobName": "job",
        "taskID": "task",
        "adapterDir": str(folder),
        "baseModel": "acme/tiny-llama",
        "baseModelPath": str(base),
        "unverified": True,
        "network": place.config()["network"],
        "credentials": {"hubTokenFile": place.secret("token", SECRET)},
        "target": None if out is None else {"folder": str(out)},
    }
    return merge(wire, changes)


def test_a_plain_adapter_is_used_once_and_handed_over_without_what_is_no_part_of_it(
    place: Place, result: Path, fixtures_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    what = config(place, result, fixtures_dir / "llama", out)
    ended = place.submit(what)
    found = contents(out)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert found.keys() == {WEIGHTS, SETTINGS, "README.md", "manifest.json", *tokenizer}
    assert found[WEIGHTS] == (result / WEIGHTS).read_bytes()
    assert ended.adapter_sha256 == sha256(found[WEIGHTS])
    settings = json.loads(found[SETTINGS])
    assert (settings["base_model_name_or_path"], settings["r"]) == ("acme/tiny-llama", 4)
    card = found["README.md"].decode()
    assert card.startswith('---\nbase_model: "acme/tiny-llama"\n---\n# Mine\n')
    assert "## How this was checked" in card
    manifest = json.loads(found["manifest.json"])
    assert any(one["after"] for one in manifest["sampleAnswers"])
    assert manifest["tensors"] == len(load_file(out / WEIGHTS))
    assert manifest["leftOut"] == ["checkpoint-3/optimizer.pt", "training_args.bin"]
    for name, about in manifest["files"].items():
        assert about == {"bytes": len(found[name]), "sha256": sha256(found[name])}
    assert "left out, for it is no part of an adapter: checkpoint-3/optimizer.pt" in capfd.readouterr().out
    # What arrived passes as one of ours, and a second submit hands over the very same.
    place.submit({**what, "unverified": False, "adapterDir": str(out), "target": {"folder": str(tmp_path / "again")}})
    place.submit(what)
    assert contents(out) == found


def test_without_a_target_the_result_stays_and_gets_what_it_lacked(
    place: Place, result: Path, fixtures_dir: Path, tmp_path: Path
) -> None:
    before = contents(result)
    what = config(place, result, fixtures_dir / "llama")
    ended = place.submit(what)
    assert ended.published is not None
    assert ended.published.to == str(result)
    after = contents(result)
    assert {name: data for name, data in after.items() if before.get(name) != data}.keys() == {
        "manifest.json", "README.md", SETTINGS,
    }  # fmt: skip
    # As its operator would take it afterwards.
    ours = {**what, "unverified": False, "target": {"folder": str(tmp_path / "out")}}
    assert place.submit(ours).published is not None
    place.submit(what)
    assert contents(result) == after


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors: dict[str, Any], mark: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if mark in name)


def widen(tensors: dict[str, Any]) -> None:
    name = first(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


def no_number(tensors: dict[str, Any]) -> None:
    tensors[first(tensors)][0, 0] = float("nan")


def overflow(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor.fill_(3e38)


def zero(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


def settings(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / SETTINGS
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def only(name: str, content: bytes = b"\x80\x04.") -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)

    return change


def link(name: str, target: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def whole_model(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    only("model.safetensors")(folder)
    save_file({"lm_head.weight": next(iter(tensors.values()))}, folder / "model.safetensors")


def enter_moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


REFUSED: list[tuple[str, Callable[[Path], Any], str, list[str]]] = [
    ("nothing was left", shutil.rmtree, "ResultEmpty", ["has left nothing"]),
    ("an empty folder", lambda f: (shutil.rmtree(f), f.mkdir()), "ResultEmpty", ["has left nothing"]),
    ("pickles only", only("pytorch_model.bin"), "ResultEmpty", ["pytorch_model.bin", "pickle", "save as safetensors"]),
    ("a whole model", whole_model, "ResultEmpty", ["model.safetensors", "no whole model"]),
    ("weights in a checkpoint", only("checkpoint-3/" + WEIGHTS), "ResultEmpty", ["checkpoint-3", "folders below"]),
    ("no settings", lambda f: (f / SETTINGS).unlink(), "AdapterBroken", [SETTINGS]),
    ("a link to a secret", link("README.md", "../../place/token"), "ResultRefused", ["README.md", "symbolic link"]),
    ("weights that are a link", link(WEIGHTS, "/etc/hostname"), "ResultRefused", [WEIGHTS, "symbolic link"]),
    ("a link in a checkpoint", link("checkpoint-3/latest", ".."), "ResultRefused", ["checkpoint-3/latest"]),
    ("a folder that is a link", enter_moved, "ResultEmpty", ["is missing"]),
    ("a pipe", lambda f: os.mkfifo(f / "vocab.json"), "ResultRefused", ["vocab.json", "no regular file"]),
    ("cut short", lambda f: os.truncate(f / WEIGHTS, 3000), "AdapterBroken", ["not a safetensors file"]),
    ("no number", lambda f: rewrite(f, no_number), "AdapterBroken", ["not finite"]),
    ("too large to compute with", lambda f: rewrite(f, overflow), "VerifyFailed", ["not finite"]),
    ("half a pair", lambda f: rewrite(f, lambda t: t.pop(first(t))), "AdapterBroken", ["is there without"]),
    ("another width", lambda f: rewrite(f, widen), "AdapterDoesNotFit", ["result/adapter: tensor", "needs (4, "]),
    ("never trained", lambda f: rewrite(f, zero), "NothingLearned", ["changes nothing"]),
    ("more than an adapter", lambda f: rewrite(f, lambda t: t.update(head=torch.ones(2))), "NotLora", ["tensor head"]),
    ("another method", settings(peft_type="IA3"), "NotLora", ["'IA3'"]),
    ("another rank", settings(r=8), "AdapterDoesNotFit", ["needs (8, "]),
    ("another layer", settings(target_modules=["nowhere"]), "AdapterDoesNotFit", ["nowhere"]),
    ("modules of its own", settings(modules_to_save=["lm_head"]), "AdapterBroken", ["modules_to_save", "plain LoRA"]),
    ("another start", settings(init_lora_weights="pissa"), "AdapterBroken", ["init_lora_weights"]),
    ("a pattern that is none", settings(target_modules="(("), "AdapterBroken", ["target_modules"]),
    ("a rank that is no number", settings(rank_pattern={"x": "y"}), "AdapterBroken", ["rank_pattern"]),
    ("settings that are none", lambda f: (f / SETTINGS).write_text("[" * 5000), "AdapterBroken", ["not JSON"]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "spoil", "reason", "words"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_no_plain_adapter_of_this_model_is_not_handed_over(
    what: str,
    spoil: Callable[[Path], Any],
    reason: str,
    words: list[str],
    place: Place,
    result: Path,
    fixtures_dir: Path,
    tmp_path: Path,
) -> None:
    spoil(result)
    with pytest.raises(TrainerError) as caught:
        place.submit(config(place, result, fixtures_dir / "llama", tmp_path / "out"))
    error = caught.value
    assert (error.code, error.reason) == (ExitCode.VERIFY_FAILED, reason), f"{what}: {error.message}"
    for word in words:
        assert word in error.message
    assert SECRET not in error.message
    assert not (tmp_path / "out").exists()


def mirrored(result: Path, step: int, **about: Any) -> Path:
    """Lay a result down as a training of ours keeps its best adapter so far."""
    folder = result.parent / "provisional" / f"step-{step}-0123456789ab"
    folder.mkdir(parents=True)
    for name in (WEIGHTS, SETTINGS):
        shutil.copy(result / name, folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())} for path in folder.iterdir()
    }
    said = {"provisional": True, "jobName": "job", "attempt": 3, "step": step, "evalLoss": 1.5, "files": files, **about}
    (folder / "manifest.json").write_text(json.dumps(said))
    return folder


def test_of_a_training_that_ended_early_the_latest_of_its_best_adapters_is_handed_over(
    place: Place, result: Path, fixtures_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mirrored(result, 9)
    latest = mirrored(result, 10)
    (latest.parent / ".step-11-aa.tmp").mkdir()
    what = config(place, latest.parent, fixtures_dir / "llama", out, provisional=True)
    ended = place.submit(what)
    assert ended.adapter_dir == str(latest)
    manifest = json.loads((out / "manifest.json").read_text())
    about = {name: manifest[name] for name in ("reason", "step", "attempt", "evalLoss")}
    assert about == {"reason": "BestSoFar", "step": 10, "attempt": 3, "evalLoss": 1.5}
    assert "its best checkpoint, of step 10" in (out / "README.md").read_text()


VERIFIED = {"provisional": False, "jobName": "job", "taskID": "task", "sampleAnswers": [{"after": "yes"}]}


def put_in_place(result: Path, **about: Any) -> Path:
    """Lay down what is left where the node dies when the training has just verified its adapter."""
    said = json.loads((mirrored(result, 10) / "manifest.json").read_text())
    shutil.rmtree(result.parent / "provisional")
    (result / "manifest.json").write_text(json.dumps({**said, **VERIFIED, **about}))
    return result.parent / "provisional"


def test_where_a_training_ended_early_beside_its_verified_adapter_that_one_is_handed_over(
    place: Place, result: Path, fixtures_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    what = config(place, put_in_place(result), fixtures_dir / "llama", out, provisional=True)
    ended = place.submit(what)
    assert ended.adapter_dir == str(result)
    assert ended.message.endswith("the verified adapter, which the training had put in place before it ended")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["provisional"], manifest["sampleAnswers"]) == (False, [{"after": "yes"}])
    assert "reason" not in manifest


@pytest.mark.parametrize("about", [{"provisional": True}, {"jobName": "other"}, {"taskID": "other"}])
def test_an_adapter_in_place_that_this_job_has_not_verified_is_not_handed_over(
    about: dict[str, Any], place: Place, result: Path, fixtures_dir: Path, tmp_path: Path
) -> None:
    what = config(place, put_in_place(result, **about), fixtures_dir / "llama", tmp_path / "out", provisional=True)
    with pytest.raises(TrainerError, match="holds no adapter: the training has left none"):
        place.submit(what)
    assert not (tmp_path / "out").exists()


NOT_THE_BEST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "there is none": (shutil.rmtree, "ResultEmpty"),
    "it is of another job": (
        lambda one: one.joinpath("manifest.json").write_text('{"files": {"a": {}}}'),
        "ManifestBroken",
    ),
    "it has no manifest": (lambda one: one.joinpath("manifest.json").unlink(), "ManifestMissing"),
    "its weights are others": (lambda one: one.joinpath(WEIGHTS).write_bytes(b"x"), "FileChanged"),
}


@pytest.mark.parametrize("case", NOT_THE_BEST)
def test_what_is_not_the_best_adapter_of_this_job_is_not_handed_over(
    case: str, place: Place, result: Path, fixtures_dir: Path, tmp_path: Path
) -> None:
    spoil, reason = NOT_THE_BEST[case]
    folder = mirrored(result, 10)
    spoil(folder)
    what = config(place, folder.parent, fixtures_dir / "llama", tmp_path / "out", provisional=True)
    with pytest.raises(TrainerError) as refused:
        place.submit(what)
    assert (refused.value.code, refused.value.reason) == (ExitCode.VERIFY_FAILED, reason)
    assert not (tmp_path / "out").exists()


def test_too_many_files_are_no_result(
    place: Place, result: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskoffer_trainer.submit_foreign._MAX_ENTRIES", 5)
    with pytest.raises(TrainerError, match="more than 5 files and folders"):
        place.submit(config(place, result, fixtures_dir / "llama"))


def test_a_base_model_is_needed_to_try_a_result(place: Place, result: Path, fixtures_dir: Path) -> None:
    wire = config(place, result, fixtures_dir / "llama", baseModelPath=None)
    with pytest.raises(ValidationError, match="baseModelPath"):
        SubmitConfig.model_validate(wire)
    with pytest.raises(TrainerError) as caught:
        place.submit(config(place, result, fixtures_dir / "data"))
    assert caught.value.code in (ExitCode.NO_MODEL, ExitCode.VERIFY_FAILED)


def unet_lora(base: Path) -> dict[str, torch.Tensor]:
    """Three steps of plain PEFT on the UNet of a pipeline; returns tensors in PEFT's names."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(base / "unet", local_files_only=True)
    model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    shape = (1, unet.config.in_channels, 8, 8)
    text = torch.randn(1, 4, unet.config.cross_attention_dim)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    told = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}

    def loss(latents: torch.Tensor) -> torch.Tensor:
        said = model(latents, torch.tensor([500]), text, added_cond_kwargs=told).sample
        return said.square().mean()  # type: ignore[no-any-return]

    train(model, loss, torch.randn(shape))
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


@pytest.fixture(scope="module")
def drawn(pipelines_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter as PEFT, diffusers and kohya's scripts write it."""
    folder = tmp_path_factory.mktemp("drawn")
    tensors = {name.removeprefix("base_model.model."): t for name, t in unet_lora(pipelines_dir / "sdxl").items()}
    for kind in ("peft", "diffusers", "kohya"):
        (folder / kind).mkdir()
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "peft" / WEIGHTS)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    (folder / "peft" / SETTINGS).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets, "auto_mapping": {"x": 1}})
    )
    save_file(
        {f"unet.{name}": t for name, t in tensors.items()}, folder / "diffusers" / "pytorch_lora_weights.safetensors"
    )
    kohya = {}
    for name, tensor in tensors.items():
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        place = "lora_unet_" + layer.replace(".", "_")
        kohya[f"{place}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor.half()
        kohya[f"{place}.alpha"] = torch.tensor(4.0).half()
    save_file(kohya, folder / "kohya" / "my-style.safetensors")
    return folder


def test_an_adapter_of_flux_draws_a_picture(place: Place, pipelines_dir: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(1)
    network = FluxTransformer2DModel.from_pretrained(pipelines_dir / "flux" / "transformer", local_files_only=True)
    settings = LoraConfig(r=2, target_modules=["to_q", "to_k", "proj_out"], init_lora_weights=False)
    tensors = get_peft_model_state_dict(get_peft_model(network, settings))
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    save_file({name.replace("base_model.model.", "transformer."): t for name, t in tensors.items()}, file)
    place.submit(config(place, tmp_path / "adapter", pipelines_dir / "flux", tmp_path / "out"))
    assert {"after-1.png", file.name} < contents(tmp_path / "out").keys()


@pytest.mark.parametrize("kind", ["peft", "diffusers", "kohya"])
def test_an_adapter_of_a_pipeline_draws_a_picture_in_each_format(
    kind: str, place: Place, drawn: Path, pipelines_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place.submit(config(place, drawn / kind, pipelines_dir / "sdxl", out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sampleAnswers"][0]["after"] == "after-1.png"
    with Image.open(out / "after-1.png") as picture:
        assert picture.size == (256, 256)
    assert manifest["parameters"] == sum(t.numel() for t in load_file(drawn / "peft" / WEIGHTS).values())


def move_away(tensors: dict[str, Any]) -> None:
    """Let part of the layers be of blocks that the network does not have."""
    for name in [name for name in tensors if ".down_blocks." in name]:
        tensors[name.replace(".down_blocks.", ".down_blocks.7")] = tensors.pop(name)


PICTURES_REFUSED: list[tuple[str, Callable[[dict[str, Any]], Any], str, str]] = [
    ("another shape", widen, "VerifyFailed", "cannot be loaded onto the pipeline"),
    ("layers that are not there", move_away, "AdapterDoesNotFit", "have a place"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "change", "reason", "words"), PICTURES_REFUSED, ids=[case[0] for case in PICTURES_REFUSED]
)
def test_an_adapter_that_the_pipeline_has_no_place_for_is_refused(
    what: str,
    change: Callable[[dict[str, Any]], Any],
    reason: str,
    words: str,
    place: Place,
    drawn: Path,
    pipelines_dir: Path,
    tmp_path: Path,
) -> None:
    tensors = load_file(drawn / "diffusers" / "pytorch_lora_weights.safetensors")
    change(tensors)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "last.safetensors")
    with pytest.raises(TrainerError) as caught:
        place.submit(config(place, tmp_path / "adapter", pipelines_dir / "sdxl", tmp_path / "out"))
    assert (caught.value.code, caught.value.reason) == (ExitCode.VERIFY_FAILED, reason), (
        f"{what}: {caught.value.message}"
    )
    assert words in caught.value.message
