"""Pictures out of a pipeline, before and after the training, and the adapter in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from PIL import Image, ImageChops
from safetensors.torch import load_file

from taskoffer_trainer.denoising import Denoiser
from taskoffer_trainer.verify import verify_failed

__all__ = ["DIFFUSERS_FILE", "check_changed", "export_lora", "generate", "load_lora", "scales_of"]

STEPS = 20
"""Denoising steps of a sample picture."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""Name of diffusers' weight file."""
_PEFT_PREFIX = "base_model.model."


def generate(
    pipeline: Any,
    denoiser: Denoiser,
    prompt: dict[str, torch.Tensor],
    edge: int,
    seed: int,
    dtype: Any,
    between: Callable[[], None],
    steps: int = STEPS,
) -> Image.Image:
    """Generate a square picture with the pipeline's own schedule and guidance.

    Args:
        pipeline: with network, VAE (in float32) and scheduler; without text encoders.
        denoiser: its architecture.
        prompt: the encoded prompt.
        edge: edge length in pixels.
        seed: seed of the noise, which is drawn on the CPU and so the same on every device.
        dtype: data type of the network.
        between: called between the steps; may raise to leave early.
        steps: denoising steps.

    Raises:
        TrainerError: ``VERIFY_FAILED`` when the picture has numbers that are not finite.
    """
    place = pipeline.vae.device

    def go_on(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        between()
        return values

    with torch.no_grad():
        latents = pipeline(
            **{name: tensor.to(place, dtype) for name, tensor in prompt.items()},
            height=edge,
            width=edge,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=go_on,
            output_type="latent",
        ).images
        # The VAE of SDXL overflows in half precision.
        pixels = pipeline.vae.decode(denoiser.unscale(latents.float(), pipeline.vae, edge)).sample[0].cpu()
    if not bool(pixels.isfinite().all()):
        raise verify_failed("a picture that it generates has numbers that are not finite")
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    return Image.fromarray(np.asarray(levels, dtype=np.uint8))


def scales_of(model: Any) -> dict[str, float]:
    """Return the scale (alpha / r, or alpha / sqrt(r)) of each layer with PEFT's adapter, by the layer's name."""
    return {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "scaling")}


def export_lora(
    scales: Mapping[str, float],
    weights: Mapping[str, torch.Tensor],
    pipeline_class: Any,
    network: str,
    folder: Path,
) -> None:
    """Write the adapter as ``Pipeline.save_lora_weights`` does.

    Each layer's scale is multiplied into its second matrix, so that the file means the same to every program that reads
    such files: many know no scale but 1, or take another one for layers whose rank was clamped.

    Args:
        scales: see :func:`scales_of`.
        weights: the adapter's weights in PEFT's names.
        pipeline_class: class of the pipeline.
        network: name of the network in the pipeline.
        folder: where to write :data:`DIFFUSERS_FILE`.
    """
    layers = {}
    for name, tensor in weights.items():
        value = tensor.detach().float().cpu()
        module, matrix, _ = name.rpartition(".lora_B.")
        if matrix:
            value = value * scales[module]
        layers[name.removeprefix(_PEFT_PREFIX)] = value.contiguous()
    pipeline_class.save_lora_weights(folder, **{f"{network}_lora_layers": layers}, weight_name=DIFFUSERS_FILE)
    (folder / DIFFUSERS_FILE).chmod(0o644)  # safetensors lets only the owner read.


def load_lora(pipeline: Any, component: str, folder: Path) -> None:
    """Load an exported adapter onto a pipeline as its user will, and check that it arrives there as it is.

    As it is means in the network's data type, which diffusers gives it.

    Args:
        pipeline: a pipeline whose network bears no adapter.
        component: name of the network in the pipeline.
        folder: what :func:`export_lora` wrote.

    Raises:
        TrainerError: ``VERIFY_FAILED`` when it cannot be loaded or does not arrive whole and unscaled.
    """
    try:
        pipeline.load_lora_weights(folder, weight_name=DIFFUSERS_FILE, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise verify_failed(f"{DIFFUSERS_FILE} cannot be loaded: {error}") from error
    network, adapter = getattr(pipeline, component), pipeline.get_active_adapters()[0]
    loaded = get_peft_model_state_dict(network, adapter_name=adapter)
    written = {
        name.removeprefix(f"{component}."): tensor for name, tensor in load_file(folder / DIFFUSERS_FILE).items()
    }
    wrong = [
        name
        for name, tensor in written.items()
        # diffusers gives an adapter the network's data type, so that in half precision it arrives rounded.
        if name not in loaded or not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype))
    ]
    scales = {layer.scaling[adapter] for layer in network.modules() if hasattr(layer, "scaling")}
    if wrong or len(loaded) != len(written) or scales != {1.0}:
        raise verify_failed(
            f"{DIFFUSERS_FILE} does not arrive in the pipeline as it is: {len(loaded)} of {len(written)} tensors, "
            f"{len(wrong)} of them unlike, scales {sorted(scales)}"
        )


def check_changed(before: Path, after: Path) -> None:
    """Refuse an adapter that leaves a picture as the base model draws it.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    with Image.open(before) as first, Image.open(after) as second:
        if first.size != second.size or ImageChops.difference(first, second).getbbox() is not None:
            return
    raise verify_failed(f"the picture {after.name} is the same as without the adapter")
