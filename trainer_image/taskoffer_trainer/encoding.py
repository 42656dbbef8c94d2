"""Pictures and captions are encoded once, before the training; then the VAE and the text encoders leave the memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from taskoffer.api.contract import Clamp, ExitCode, RunConfig
from taskoffer_trainer.denoising import Denoiser, Encoded
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.image_data import Pair, PairSplit, open_picture, square
from taskoffer_trainer.models import Device
from taskoffer_trainer.pipelines import assemble, layout_of, load_component, load_text, vae_factor

__all__ = ["EncodedData", "encode_split"]

_Texts = dict[str, dict[str, torch.Tensor]]
"""What the text encoders make of each text."""


@dataclass(frozen=True)
class EncodedData:
    """What the training needs of pictures and texts.

    Attributes:
        train: Pairs to learn from.
        held_out: Pairs that are only measured.
        prompts: What a pipeline without text encoders needs to generate from each sample prompt.
        edge: Edge length of all pictures in pixels.
        clamps: Settings that could not be taken literally.
    """

    train: list[Encoded]
    held_out: list[Encoded]
    prompts: _Texts
    edge: int
    clamps: tuple[Clamp, ...]


def _edge(config: RunConfig, multiple: int) -> tuple[int, tuple[Clamp, ...]]:
    assert config.data.image is not None  # noqa: S101 - said when the pairs were read.
    wanted = config.data.image.resolution
    edge = wanted // multiple * multiple
    if edge == wanted:
        return edge, ()
    if edge == 0:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "ConfigInvalid",
            f"data.image.resolution: {wanted} pixels are less than the {multiple} that this model takes at once",
        )
    clamp = Clamp(
        field="data.image.resolution",
        requested=str(wanted),
        effective=str(edge),
        reason="ResolutionRounded",
        message=f"The edges of this model's pictures are multiples of {multiple} pixels.",
    )
    return edge, (clamp,)


def encode_split(
    config: RunConfig,
    split: PairSplit,
    prompts: Sequence[str],
    denoiser: Denoiser,
    device: Device,
    between: Callable[[], None],
) -> EncodedData:
    """Encode all pairs, captions first, with one encoder in memory after the other.

    Of the VAE's distribution its most likely point (mode) is taken and not a sample: it is the same in every attempt
    and process, and the distribution is so narrow that a sample would teach nothing more. The VAE computes in float32,
    because that of SDXL overflows in half precision.

    Args:
        config: the run.
        split: the pairs.
        prompts: what to generate pictures from later.
        denoiser: the architecture.
        device: where the network will be.
        between: called between pieces of work; may raise to leave early.

    Raises:
        TrainerError: ``NO_MODEL`` when an encoder cannot be loaded or returns numbers that are not finite,
            ``BAD_CONFIG`` for a resolution of nothing.
    """
    place = torch.device("cuda", torch.cuda.current_device()) if device.cuda else torch.device("cpu")
    pairs = [*split.train, *split.held_out]
    captions = sorted({pair.caption for pair in pairs})
    told, asked = _encode_texts(config, captions, prompts, denoiser, device, place, between)
    vae = load_component(config, "vae", torch.float32).to(place)
    edge, clamps = _edge(config, denoiser.edge_multiple(vae_factor(vae)))
    encoded = [
        _encode_picture(pair, vae, denoiser, edge, told[pair.caption], between)
        for pair in _told(pairs, "pictures encoded")
    ]
    for one in encoded:
        if not all(bool(tensor.isfinite().all()) for tensor in (one.latents, *one.conditions.values())):
            raise TrainerError(
                ExitCode.NO_MODEL,
                "ModelUnusable",
                f"the encoders of {config.model.name} return numbers that are not finite; are the weights whole?",
            )
    del vae
    _empty(device)
    border = len(split.train)
    return EncodedData(encoded[:border], encoded[border:], asked, edge, clamps)


def _told(items: Sequence[Any], what: str) -> Any:
    """Go through items and say every two seconds how far that is."""
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said > 2:
            print(f"data: {number} of {len(items)} {what}", flush=True)
            said = time.monotonic()
        yield item


def _empty(device: Device) -> None:
    gc.collect()
    if device.cuda:
        torch.cuda.empty_cache()


def _encode_texts(
    config: RunConfig,
    captions: Sequence[str],
    prompts: Sequence[str],
    denoiser: Denoiser,
    device: Device,
    place: Any,
    between: Callable[[], None],
) -> tuple[_Texts, _Texts]:
    """Encode each different caption and each prompt once."""
    parts = load_text(config, device.dtype)
    for _, encoder in layout_of(config).text:
        parts[encoder].to(place)
    pipeline = assemble(config, parts)
    _say_cut(captions, *denoiser.words_of(pipeline, config.train.max_length))
    told: _Texts = {}
    asked: _Texts = {}
    work: list[tuple[str, _Texts, Callable[..., dict[str, torch.Tensor]]]] = [
        *((caption, told, denoiser.conditions) for caption in captions),
        *((prompt, asked, denoiser.prompt) for prompt in prompts),
    ]
    with torch.no_grad():
        for text, into, encode in _told(work, "texts encoded"):
            between()
            found = encode(pipeline, text, config.train.max_length, place)
            into[text] = {name: tensor.cpu() for name, tensor in found.items()}
    del parts, pipeline
    _empty(device)
    return told, asked


def _say_cut(captions: Sequence[str], tokenizer: Any, most: int) -> None:
    """Say how many captions are longer than what is read of them; the pipeline cuts them in silence."""
    cut = [caption for caption in captions if len(tokenizer(caption)["input_ids"]) > most]
    if cut:
        print(
            f"data: {len(cut)} of {len(captions)} different captions are longer than {most} tokens and were cut; the "
            f"first begins {cut[0][:60]!r}",
            flush=True,
        )


def _encode_picture(
    pair: Pair,
    vae: Any,
    denoiser: Denoiser,
    edge: int,
    told: dict[str, torch.Tensor],
    between: Callable[[], None],
) -> Encoded:
    between()
    picture, cut = square(open_picture(pair), edge)
    # The VAE takes colours from -1 to 1, channels first.
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.device)).latent_dist.mode()
    conditions = {**told, **denoiser.sizes((pair.height, pair.width), cut, edge)}
    return Encoded(
        pair.digest,
        denoiser.scale(latents, vae)[0].cpu(),
        {name: tensor[0] for name, tensor in conditions.items()},
    )
