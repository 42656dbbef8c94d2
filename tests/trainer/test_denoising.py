"""Noise, times and losses of SDXL and Flux, and the way of a pipeline's parts from and to the disk."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from taskoffer.api.contract import Architecture, LoraSettings, RunConfig, rank_cap
from taskoffer.decision.memory import IMAGE_MODELS
from taskoffer_trainer.denoising import Denoiser, Encoded, NoisyRow, collate, noisy
from taskoffer_trainer.encoding import EncodedData, encode_split
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.flux import GUIDANCE, Flux
from taskoffer_trainer.image_data import read_pair_split
from taskoffer_trainer.lora import linear_shapes, lora_config, plan_ranks
from taskoffer_trainer.models import Device
from taskoffer_trainer.pictures import check_changed, export_lora, generate, load_lora, scales_of
from taskoffer_trainer.pipelines import assemble, check_layout, load_component, load_scheduler
from taskoffer_trainer.sdxl import SDXL

from .conftest import merge

pytestmark = pytest.mark.trainer

CONDITIONS = {"text": torch.zeros(3, 4), "pooled": torch.zeros(4), "time_ids": torch.zeros(6)}
PAIR = Encoded("digest", torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1)), CONDITIONS)


def config_of(folder: Path, kind: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "jobName": "job",
        "taskID": "task",
        "taskType": "Image",
        "gpus": 1,
        "model": {"name": f"acme/tiny-{kind}", "path": str(folder / kind), "architecture": kind},
        "data": {"path": str(folder / "data"), "fileFormat": "zip", "image": {"resolution": 64}},
        "lora": {},
        "train": {},
        "outputDir": "/tmp/out",
        "checkpointDir": "/tmp/checkpoints",
    }
    return RunConfig.model_validate(merge(settings, changes))


# Noise and time of a row.


def test_noise_and_time_depend_on_seed_and_position_alone() -> None:
    row = noisy(PAIR, 7, 11)
    again = noisy(Encoded("another", PAIR.latents + 1, {}), 7, 11)
    assert torch.equal(row.noise, again.noise)
    assert row.place == again.place
    others = [noisy(PAIR, 7, 12), noisy(PAIR, 8, 11), noisy(PAIR, 7, "digest:11")]
    assert not any(torch.equal(row.noise, other.noise) or row.place == other.place for other in others)


def test_places_are_spread_evenly_and_noise_is_normal() -> None:
    rows = [noisy(PAIR, 1, position) for position in range(2000)]
    places = torch.tensor([row.place for row in rows])
    assert torch.histc(places, 10, 0, 1).tolist() == pytest.approx([200] * 10, abs=60)
    noise = torch.stack([row.noise for row in rows])
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.02)


def test_a_given_place_leaves_the_noise_as_it_is() -> None:
    assert torch.equal(noisy(PAIR, 1, 2, 0.25).noise, noisy(PAIR, 1, 2).noise)
    assert noisy(PAIR, 1, 2, 0.25).place == 0.25


# What the networks are asked and what counts as an error.


class Recorder:
    """Stands for a network: remembers what it is given and returns what it is told to."""

    def __init__(self, answer: Callable[..., torch.Tensor], **config: Any) -> None:
        self.answer, self.config = answer, SimpleNamespace(**config)
        self.given: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = ("sample", "timestep", "encoder_hidden_states")
        self.given = {**dict(zip(names, args, strict=False)), **kwargs}
        return SimpleNamespace(sample=self.answer(**self.given))


def zeros(hidden_states: torch.Tensor | None = None, sample: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
    given = sample if hidden_states is None else hidden_states
    assert given is not None
    return torch.zeros_like(given)


def rows_at(*places: float) -> dict[str, torch.Tensor]:
    return collate([NoisyRow(PAIR, noisy(PAIR, 1, number).noise, place) for number, place in enumerate(places)])


def sdxl_with(folder: Path, tmp_path: Path, gamma: float | None = None, **schedule: Any) -> SDXL:
    """SDXL with a noise schedule that differs from the tiny model's."""
    copy = tmp_path / "sdxl"
    shutil.copytree(folder / "sdxl" / "scheduler", copy / "scheduler", dirs_exist_ok=True)
    shutil.copyfile(folder / "sdxl" / "model_index.json", copy / "model_index.json")
    settings = copy / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **schedule}))
    return SDXL(config_of(tmp_path, "sdxl", train={"snrGamma": gamma}))


PLACES = (0.0, 0.01, 0.2, 0.5, 0.9, 0.9999)


def signal_to_noise(place: float) -> float:
    """SNR of Stable Diffusion's schedule: betas are squares of 1,000 even steps between two roots."""
    low, high, kept = math.sqrt(0.00085), math.sqrt(0.012), 1.0
    for step in range(min(999, int(place * 1000)) + 1):
        kept *= 1 - (low + (high - low) * step / 999) ** 2
    return kept / (1 - kept)


@pytest.mark.parametrize(
    ("gamma", "prediction", "weight"),
    [
        (None, "epsilon", lambda snr: 1.0),
        (5.0, "epsilon", lambda snr: min(snr, 5.0) / snr),
        (1.0, "epsilon", lambda snr: min(snr, 1.0) / snr),
        (5.0, "v_prediction", lambda snr: min(snr, 5.0) / (snr + 1)),
    ],
)
def test_min_snr_weighs_the_losses_of_sdxl_as_its_paper_says(
    pipelines_dir: Path, tmp_path: Path, gamma: float | None, prediction: str, weight: Callable[[float], float]
) -> None:
    sdxl, batch = sdxl_with(pipelines_dir, tmp_path, gamma, prediction_type=prediction), rows_at(*PLACES)
    plain = sdxl.losses(Recorder(zeros), batch, torch.float32, weighted=False)
    weighted = sdxl.losses(Recorder(zeros), batch, torch.float32, weighted=True)
    expected = [weight(signal_to_noise(place)) for place in PLACES]
    assert (weighted / plain).tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_who_predicts_what_was_added_has_no_loss(pipelines_dir: Path, tmp_path: Path, prediction: str) -> None:
    sdxl, batch = sdxl_with(pipelines_dir, tmp_path, prediction_type=prediction), rows_at(*PLACES)
    alphas = sdxl.schedule.alphas_cumprod[[min(999, int(place * 1000)) for place in PLACES]].view(-1, 1, 1, 1)
    velocity = alphas.sqrt() * batch["noise"] - (1 - alphas).sqrt() * batch["latents"]
    right = batch["noise"] if prediction == "epsilon" else velocity
    losses = sdxl.losses(Recorder(lambda **_: right), batch, torch.float32, weighted=False)
    assert losses.tolist() == pytest.approx([0] * len(PLACES), abs=1e-10)


def test_a_schedule_that_cannot_be_trained_with_is_refused(pipelines_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="prediction_type sample") as refusal:
        sdxl_with(pipelines_dir, tmp_path, prediction_type="sample")
    assert refusal.value.code == 66


def test_flux_is_asked_at_logit_normal_times_for_the_way_to_the_noise(pipelines_dir: Path) -> None:
    flux, batch = Flux(config_of(pipelines_dir, "flux")), rows_at(0.1587, 0.5, 0.8413)
    network = Recorder(zeros, guidance_embeds=True)
    losses = flux.losses(network, batch, torch.float32, weighted=True)
    # One standard deviation below the mean of a normal distribution, the mean, and one above.
    times = [1 / (1 + math.exp(-deviation)) for deviation in (-1, 0, 1)]
    assert network.given["timestep"].tolist() == pytest.approx(times, abs=1e-3)
    assert network.given["guidance"].tolist() == [GUIDANCE] * 3
    assert network.given["hidden_states"].shape == (3, 4, 16)
    way = batch["noise"] - batch["latents"]
    assert losses.tolist() == pytest.approx(way.square().flatten(1).mean(1).tolist(), rel=1e-5)
    # In the middle a picture is half itself and half noise.
    middle = ((batch["noise"] + batch["latents"]) / 2)[1]
    assert sorted(network.given["hidden_states"][1].flatten().tolist()) == pytest.approx(
        sorted(middle.flatten().tolist()), abs=1e-5
    )


def test_flux_without_embedded_guidance_is_told_none(pipelines_dir: Path) -> None:
    network = Recorder(zeros, guidance_embeds=False)
    Flux(config_of(pipelines_dir, "flux")).losses(network, rows_at(0.5), torch.float32, weighted=True)
    assert network.given["guidance"] is None


def test_min_snr_weighting_of_flux_is_turned_off_and_said(pipelines_dir: Path) -> None:
    (clamp,) = Flux(config_of(pipelines_dir, "flux", train={"snrGamma": 5})).clamps
    assert (clamp.field, clamp.requested, clamp.effective) == ("train.snrGamma", "5", "off")
    assert Flux(config_of(pipelines_dir, "flux")).clamps == ()


# Adapters.

DENOISERS: dict[str, tuple[type[Denoiser], str, int]] = {"sdxl": (SDXL, "unet", 40), "flux": (Flux, "transformer", 17)}


@pytest.mark.parametrize("kind", DENOISERS)
def test_all_linear_means_attention_and_feed_forward_of_the_blocks(pipelines_dir: Path, kind: str) -> None:
    denoiser, component, count = DENOISERS[kind]
    network = load_component(config_of(pipelines_dir, kind), component, torch.float32)
    names = [shape.name for shape in linear_shapes(network, "all-linear", denoiser.target_modules)]
    assert len(names) == count
    assert all("transformer_blocks." in name and "norm" not in name for name in names)
    assert {"to_q", "to_k", "to_v"} <= {name.rpartition(".")[2] for name in names}
    assert any(".ff." in name for name in names)
    chosen = linear_shapes(network, "to_q,to_k", denoiser.target_modules)
    assert {shape.suffix for shape in chosen} == {"to_q", "to_k"}


def real_network(kind: str) -> torch.nn.Module:
    """SDXL's UNet or Flux's transformer as published, without memory for its weights."""
    with torch.device("meta"):
        if kind == "flux":
            return FluxTransformer2DModel(guidance_embeds=True)
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.mark.parametrize(("kind", "count"), [("sdxl", 700), ("flux", 418)])
def test_the_operator_reckons_with_the_adapter_that_is_trained(kind: str, count: int) -> None:
    known = IMAGE_MODELS[Architecture(kind)]
    network = real_network(kind)
    shapes = linear_shapes(network, "all-linear", DENOISERS[kind][0].target_modules)
    assert len(shapes) == count
    assert sum(shape.in_features + shape.out_features for shape in shapes) == known.adapter_parameters_per_rank
    assert sum(parameter.numel() for parameter in network.parameters()) == known.parameters


def test_a_rank_that_is_too_great_is_said_once_for_layers_of_one_kind_and_shape() -> None:
    shapes = linear_shapes(real_network("sdxl"), "all-linear", SDXL.target_modules)
    plan = plan_ranks(shapes, LoraSettings(r=256, lora_alpha=256))
    clamps = {clamp.field: clamp.effective for clamp in plan.clamps}
    assert clamps["lora.r[to_q, 640 x 640]"] == clamps["lora.r[to_out.0, 640 x 640]"] == "160"
    assert clamps["lora.r[to_k, 2048 x 640]"] == "243"
    assert len(clamps) == 6
    capped = [shape for shape in shapes if rank_cap(shape.in_features, shape.out_features) < 256]
    assert len(plan.rank_pattern) == len(plan.alpha_pattern) == len(capped)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", DENOISERS)
def test_an_exported_adapter_with_clamped_ranks_does_in_diffusers_what_it_does_in_peft(
    pipelines_dir: Path, tmp_path: Path, kind: str, use_rslora: bool
) -> None:
    denoiser, component, count = DENOISERS[kind]
    config = config_of(pipelines_dir, kind)
    network = load_component(config, component, torch.float32)
    lora = LoraSettings(r=24, lora_alpha=48, use_rslora=use_rslora)
    settings, clamps = lora_config(network, lora, denoiser.target_modules)
    model = get_peft_model(network, settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
            layer = model.get_submodule(name.partition(".lora_")[0])
            assert min(parameter.shape) == min(24, rank_cap(layer.in_features, layer.out_features))
    assert clamps
    assert all(clamp.reason == "RankClamped" for clamp in clamps)

    pipeline = assemble(config, {component: load_component(config, component, torch.float32)})
    export_lora(scales_of(model), get_peft_model_state_dict(model), type(pipeline), component, tmp_path)
    load_lora(pipeline, component, tmp_path)
    modules = dict(getattr(pipeline, component).named_modules())
    compared = 0
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            own, loaded = module.get_delta_weight("default"), modules[name].get_delta_weight("default_0")
            assert torch.allclose(own, loaded, atol=1e-6)
            compared += 1
    assert compared == count


@pytest.mark.parametrize("kind", DENOISERS)
def test_an_adapter_arrives_in_a_network_in_half_precision_rounded_and_whole(
    pipelines_dir: Path, tmp_path: Path, kind: str
) -> None:
    """As on a GPU, where the network is in bfloat16: diffusers gives the adapter the network's data type."""
    denoiser, component, _ = DENOISERS[kind]
    config, half = config_of(pipelines_dir, kind), torch.bfloat16
    network = load_component(config, component, half)
    model = get_peft_model(network, lora_config(network, LoraSettings(r=4, lora_alpha=2), denoiser.target_modules)[0])
    generator = torch.Generator().manual_seed(1)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
    pipeline = assemble(config, {component: load_component(config, component, half)})
    export_lora(scales_of(model), get_peft_model_state_dict(model), type(pipeline), component, tmp_path)
    load_lora(pipeline, component, tmp_path)
    loaded = [one for name, one in getattr(pipeline, component).named_parameters() if ".lora_" in name]
    assert {one.dtype for one in loaded} == {half}
    with torch.no_grad():
        loaded[0].view(-1)[0] += 1
    arrived = getattr(pipeline, component)
    pipeline.load_lora_weights = lambda *_args, **_settings: arrived
    with pytest.raises(TrainerError, match="1 of them unlike"):
        load_lora(pipeline, component, tmp_path)


def test_an_exported_adapter_that_does_not_arrive_whole_is_refused(pipelines_dir: Path, tmp_path: Path) -> None:
    config = config_of(pipelines_dir, "flux")
    network = load_component(config, "transformer", torch.float32)
    model = get_peft_model(network, lora_config(network, LoraSettings(r=4, lora_alpha=4), Flux.target_modules)[0])
    pipeline = assemble(config, {"transformer": load_component(config, "transformer", torch.float32)})
    export_lora(scales_of(model), get_peft_model_state_dict(model), type(pipeline), "transformer", tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    some_layer = next(name for name in tensors if "to_q.lora_A" in name).removesuffix(".lora_A.weight")
    save_file({**tensors, f"{some_layer}.alpha": torch.tensor(1.0)}, path)
    with pytest.raises(TrainerError, match="does not arrive in the pipeline as it is") as refusal:
        load_lora(pipeline, "transformer", tmp_path)
    assert refusal.value.code == 74


# The folder of a pipeline.


def without(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name)


def index_with(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LAYOUTS: dict[str, tuple[Callable[[Path], object], int, str, list[str]]] = {
    "missing component": (lambda at: without(at, "vae"), 66, "ModelUnusable", ["component vae is missing"]),
    "missing tokenizer": (lambda at: without(at, "tokenizer_2"), 66, "ModelUnusable", ["tokenizer_2"]),
    "another architecture": (
        lambda at: index_with(at, _class_name="FluxPipeline"),
        64,
        "ArchitectureMismatch",
        ["it says sdxl", "holds a FluxPipeline", "set model.architecture to flux"],
    ),
    "a pipeline that is not trained": (
        lambda at: index_with(at, _class_name="StableDiffusionPipeline"),
        66,
        "ArchitectureMismatch",
        ["StableDiffusionPipeline", "a StableDiffusionXLPipeline is needed"],
    ),
    "foreign code": (
        lambda at: index_with(at, unet=["my_code", "MyUNet"]),
        66,
        "ModelUnusable",
        ["component unet is my_code.MyUNet", "only diffusers.UNet2DConditionModel"],
    ),
    "no index": (lambda at: (at / "model_index.json").unlink(), 66, "ModelMissing", ["has no model_index.json"]),
    "broken index": (
        lambda at: (at / "model_index.json").write_text("{"),
        66,
        "ModelUnusable",
        ["model_index.json cannot be read"],
    ),
    "no folder": (shutil.rmtree, 66, "ModelMissing", ["does not exist"]),
    "a single file": (
        lambda at: (shutil.rmtree(at), at.write_bytes(b"")),
        66,
        "ModelUnusable",
        ["single file", "diffusers' layout"],
    ),
}


@pytest.mark.parametrize(("damage", "code", "reason", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_folder_that_holds_no_such_pipeline_is_refused_before_anything_is_loaded(
    pipelines_dir: Path, tmp_path: Path, damage: Callable[[Path], object], code: int, reason: str, words: list[str]
) -> None:
    shutil.copytree(pipelines_dir / "sdxl", tmp_path / "sdxl")
    check_layout(config_of(tmp_path, "sdxl"))
    damage(tmp_path / "sdxl")
    with pytest.raises(TrainerError) as refusal:
        check_layout(config_of(tmp_path, "sdxl"))
    assert (refusal.value.code, refusal.value.reason) == (code, reason)
    for word in words:
        assert word in refusal.value.message


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_a_component_without_some_of_its_weights_is_refused(pipelines_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines_dir / "sdxl" / "unet", tmp_path / "sdxl" / "unet")
    path = tmp_path / "sdxl" / "unet" / WEIGHTS
    tensors = load_file(path)
    lost = tensors.pop("conv_in.weight")
    assert lost.numel()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(TrainerError, match=r"unet.*conv_in\.weight"):
        load_component(config_of(tmp_path, "sdxl"), "unet", torch.float32)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainerError, match="component unet cannot be loaded"):
        load_component(config_of(tmp_path, "sdxl"), "unet", torch.float32)


@pytest.mark.parametrize("shard_size", [None, "200KB"], ids=["in one file", "in several"])
def test_weights_that_are_there_as_a_variant_only_are_loaded(
    pipelines_dir: Path, tmp_path: Path, shard_size: str | None
) -> None:
    whole = load_component(config_of(pipelines_dir, "sdxl"), "vae", torch.float32)
    folder = tmp_path / "sdxl" / "vae"
    whole.half().save_pretrained(folder, variant="fp16", **({"max_shard_size": shard_size} if shard_size else {}))
    names = [path.name for path in folder.glob("*.safetensors")]
    assert all(".fp16" in name for name in names)
    assert (len(names) > 1) is (shard_size is not None)
    vae = load_component(config_of(tmp_path, "sdxl"), "vae", torch.float32)
    assert next(vae.parameters()).dtype is torch.float32


def test_a_scheduler_that_is_none_of_diffusers_is_refused(pipelines_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines_dir / "sdxl", tmp_path / "sdxl")
    for given in (["my_code", "MyScheduler"], ["diffusers", "AutoencoderKL"], ["diffusers", "nothing"]):
        index_with(tmp_path / "sdxl", scheduler=given)
        with pytest.raises(TrainerError, match="no scheduler of diffusers"):
            load_scheduler(config_of(tmp_path, "sdxl"))


def test_small_pictures_are_named_before_the_model_is_loaded(
    pipelines_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_pair_split(config_of(pipelines_dir, "sdxl", data={"image": {"resolution": 128}}))
    assert "24 of 24 pictures are smaller than 128 pixels" in capsys.readouterr().out


# Pictures and captions in encoded form.

CPU = Device(False, torch.float32, "float32 on the CPU")


def encoded(folder: Path, kind: str, resolution: int) -> EncodedData:
    config = config_of(folder, kind, data={"image": {"resolution": resolution}}, train={"maxLength": 16})
    split = read_pair_split(config)
    denoiser: Denoiser = SDXL(config) if kind == "sdxl" else Flux(config)
    return encode_split(config, split, ["a red box"], denoiser, CPU, lambda: None)


@pytest.mark.parametrize(
    ("kind", "wanted", "edge", "latents"),
    [("sdxl", 64, 64, 8), ("sdxl", 79, 72, 9), ("flux", 64, 64, 8), ("flux", 79, 64, 8)],
)
def test_a_resolution_is_rounded_to_what_the_model_can_take(
    pipelines_dir: Path, kind: str, wanted: int, edge: int, latents: int
) -> None:
    data = encoded(pipelines_dir, kind, wanted)
    assert data.edge == edge
    assert data.train[0].latents.shape == (4, latents, latents)
    clamps = [(clamp.field, clamp.requested, clamp.effective) for clamp in data.clamps]
    assert clamps == ([] if wanted == edge else [("data.image.resolution", str(wanted), str(edge))])
    # The network itself takes it too.
    config = config_of(pipelines_dir, kind)
    denoiser = SDXL(config) if kind == "sdxl" else Flux(config)
    network = load_component(config, DENOISERS[kind][1], torch.float32)
    with torch.no_grad():
        losses = denoiser.losses(network, collate([noisy(data.train[0], 1, 0)]), torch.float32, weighted=False)
    assert losses.shape == (1,)
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize(("kind", "read"), [("sdxl", 77), ("flux", 512)])
def test_captions_that_are_longer_than_what_is_read_of_them_are_told(
    pipelines_dir: Path, kind: str, read: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(pipelines_dir, kind, train={"maxLength": 2048})
    split = read_pair_split(config)
    train = [replace(pair, caption="word " * 600 if pair is split.train[0] else "word") for pair in split.train]
    denoiser: Denoiser = SDXL(config) if kind == "sdxl" else Flux(config)
    encode_split(config, replace(split, train=train), [], denoiser, CPU, lambda: None)
    said = [line for line in capsys.readouterr().out.splitlines() if "were cut" in line]
    assert len(said) == 1
    assert re.search(rf"1 of \d+ different captions are longer than {read} tokens .* 'word word", said[0])


def test_pairs_are_encoded_the_same_every_time_and_sdxl_is_told_the_sizes(pipelines_dir: Path) -> None:
    once, again = encoded(pipelines_dir, "sdxl", 128), encoded(pipelines_dir, "sdxl", 128)
    for one, other in zip(once.train, again.train, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert all(torch.equal(one.conditions[name], other.conditions[name]) for name in one.conditions)
    assert once.train[0].conditions["time_ids"].tolist() == [64, 64, 0, 0, 128, 128]
    assert set(once.prompts) == {"a red box"}


def test_a_picture_that_stays_as_it_was_does_not_pass(tmp_path: Path) -> None:
    first, same, other = (tmp_path / f"{name}.png" for name in ("first", "same", "other"))
    for path, colour in ((first, "red"), (same, "red"), (other, "blue")):
        Image.new("RGB", (8, 8), colour).save(path)
    check_changed(first, other)
    with pytest.raises(TrainerError, match=r"same\.png is the same as without the adapter") as refusal:
        check_changed(first, same)
    assert refusal.value.code == 74


# diffusers makes an array of a tensor the way that NumPy 2 is about to drop.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_network_in_bfloat16_with_an_adapter_in_float32_trains_and_draws(pipelines_dir: Path, kind: str) -> None:
    """As on a GPU: texts and network in half precision, losses, adapter and VAE in single precision."""
    component, half, config = (
        DENOISERS[kind][1],
        torch.bfloat16,
        config_of(pipelines_dir, kind, train={"maxLength": 16}),
    )
    denoiser: Denoiser = SDXL(config) if kind == "sdxl" else Flux(config)
    device = Device(False, half, "bfloat16")
    data = encode_split(config, read_pair_split(config), ["a red box"], denoiser, device, lambda: None)
    network = load_component(config, component, half)
    model = get_peft_model(network, lora_config(network, LoraSettings(r=4, lora_alpha=4), denoiser.target_modules)[0])
    model.train()
    network.enable_gradient_checkpointing()
    batch = collate([noisy(one, 1, number) for number, one in enumerate(data.train[:2])])
    for manager in (torch.autocast("cpu", half), contextlib.nullcontext()):
        with manager:
            losses = denoiser.losses(model, batch, half, weighted=True)
        losses.sum().backward()
        assert losses.dtype is torch.float32
        assert bool(losses.isfinite().all())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert any(float(parameter.grad.abs().sum()) > 0 for parameter in trained if parameter.grad is not None)
    parts = {
        component: model.eval().get_base_model(),
        "vae": load_component(config, "vae", torch.float32),
        "scheduler": load_scheduler(config),
    }
    drawn = generate(assemble(config, parts), denoiser, data.prompts["a red box"], data.edge, 1, half, lambda: None)
    assert drawn.size == (64, 64)
    assert drawn.getextrema() != ((0, 0),) * 3
