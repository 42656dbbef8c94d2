"""How Flux is trained: it predicts the way from the picture to the noise at a continuous time (flow matching)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline

from taskoffer.api.contract import Clamp, RunConfig
from taskoffer_trainer.denoising import Denoiser
from taskoffer_trainer.pipelines import vae_factor

__all__ = ["Flux"]

GUIDANCE = 3.5
"""Guidance that a Flux whose config embeds one is told in training, as in diffusers' training script for Flux."""

LONGEST_CAPTION = 512
"""Tokens of the longest caption that Flux was trained with."""


class Flux(Denoiser):
    """Predicts the way from picture to noise at a continuous time (flow matching, Esser et al. 2024).

    Times are distributed by the logit-normal distribution (0, 1) of that paper (section 3.1).
    """

    target_modules = (
        r"(single_)?transformer_blocks\.\d+\."
        r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )

    def __init__(self, config: RunConfig) -> None:
        if config.train.snr_gamma is not None:
            self.clamps = (
                Clamp(
                    field="train.snrGamma",
                    requested=f"{config.train.snr_gamma:g}",
                    effective="off",
                    reason="NotForFlowMatching",
                    message="Min-SNR weighting belongs to the noise schedule of SDXL; Flux weighs its times by how "
                    "often they are drawn.",
                ),
            )

    def edge_multiple(self, vae_factor: int) -> int:
        """Return twice the VAE's factor: two by two latents make one token."""
        return 2 * vae_factor

    def scale(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Bring the latents to zero mean and unit variance, as the VAE's config says."""
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def unscale(self, latents: torch.Tensor, vae: Any, edge: int) -> torch.Tensor:
        """Undo :meth:`scale`, and the packing of two by two latents into a token."""
        unpacked = FluxPipeline._unpack_latents(latents, edge, edge, vae_factor(vae))
        return unpacked / vae.config.scaling_factor + vae.config.shift_factor

    def prompt(self, pipeline: Any, text: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a prompt; Flux is told the guidance and needs no empty prompt."""
        told = self.conditions(pipeline, text, length, device)
        return {"prompt_embeds": told["text"], "pooled_prompt_embeds": told["pooled"]}

    def conditions(self, pipeline: Any, caption: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a caption of at most :data:`LONGEST_CAPTION` tokens."""
        _, length = self.words_of(pipeline, length)
        text, pooled, _ = pipeline.encode_prompt(caption, prompt_2=None, device=device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}

    def words_of(self, pipeline: Any, length: int) -> tuple[Any, int]:
        """Return what T5 reads of a caption; CLIP reads its beginning only, for the style as a whole."""
        return pipeline.tokenizer_2, min(length, LONGEST_CAPTION)

    def losses(self, network: Any, batch: dict[str, torch.Tensor], dtype: Any, weighted: bool) -> torch.Tensor:
        """Compare what the network says of the way from picture to noise with the way."""
        latents, noise = batch["latents"], batch["noise"]
        rows, channels, height, width = latents.shape
        # The quantile of the logit-normal distribution at the row's place.
        times = torch.special.ndtri(batch["place"]).sigmoid().float()
        share = times.view(-1, 1, 1, 1)
        way = noise - latents
        packed = FluxPipeline._pack_latents((latents + share * way).to(dtype), rows, channels, height, width)
        text = batch["text"].to(dtype)
        device = latents.device
        said = network(
            hidden_states=packed,
            timestep=times.to(dtype),
            guidance=torch.full((rows,), GUIDANCE, device=device) if network.config.guidance_embeds else None,
            pooled_projections=batch["pooled"].to(dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, device, dtype),
        ).sample
        target = FluxPipeline._pack_latents(way, rows, channels, height, width)
        return (said.float() - target).square().flatten(1).mean(1)
