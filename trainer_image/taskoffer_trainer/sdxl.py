"""How SDXL is trained: it predicts the noise at one of 1,000 discrete times."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from taskoffer.api.contract import ExitCode, RunConfig
from taskoffer_trainer.denoising import Denoiser
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.pipelines import load_scheduler

__all__ = ["SDXL"]


class SDXL(Denoiser):
    """Predicts the noise (or the velocity, where the model's schedule says so) at one of 1,000 discrete times."""

    target_modules = r".*\.transformer_blocks\.\d+\.(attn\d\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"

    def __init__(self, config: RunConfig) -> None:
        self.schedule = DDPMScheduler.from_config(load_scheduler(config).config)
        self.prediction = self.schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise TrainerError(
                ExitCode.NO_MODEL,
                "ModelUnusable",
                f"{config.model.name}: its scheduler says prediction_type {self.prediction}; epsilon and v_prediction "
                "are trained",
            )
        self.gamma = config.train.snr_gamma

    def edge_multiple(self, vae_factor: int) -> int:
        """Return the VAE's factor: the UNet itself copes with any number of latents."""
        return vae_factor

    def scale(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """Bring the latents to unit variance, as the VAE's config says."""
        mean, deviation = _distribution(vae, latents)
        return (latents - mean) * vae.config.scaling_factor / deviation

    def unscale(self, latents: torch.Tensor, vae: Any, edge: int) -> torch.Tensor:
        """Undo :meth:`scale`."""
        mean, deviation = _distribution(vae, latents)
        return latents * deviation / vae.config.scaling_factor + mean

    def prompt(self, pipeline: Any, text: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a prompt, and the empty one that guidance moves away from."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, pipeline.encode_prompt(text, device=device), strict=True))

    def conditions(self, pipeline: Any, caption: str, length: int, device: Any) -> dict[str, torch.Tensor]:
        """Encode a caption; CLIP has a fixed length of 77 tokens, to which the pipeline cuts and pads."""
        text, _, pooled, _ = pipeline.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def words_of(self, pipeline: Any, length: int) -> tuple[Any, int]:
        """Return what both encoders, which are of one kind, read of a caption."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    def sizes(self, original: tuple[int, int], cut: tuple[int, int], edge: int) -> dict[str, torch.Tensor]:
        """Return the six numbers of the SDXL paper (arXiv:2307.01952), section 2.2, in its order."""
        return {"time_ids": torch.tensor([[*original, *cut, edge, edge]], dtype=torch.float32)}

    def losses(self, network: Any, batch: dict[str, torch.Tensor], dtype: Any, weighted: bool) -> torch.Tensor:
        """Compare what the network says of the noise (or the velocity) with what was added."""
        latents, noise = batch["latents"], batch["noise"]
        steps = self.schedule.config.num_train_timesteps
        times = (batch["place"] * steps).long().clamp(max=steps - 1)
        said = network(
            self.schedule.add_noise(latents, noise, times).to(dtype),
            times,
            batch["text"].to(dtype),
            added_cond_kwargs={"text_embeds": batch["pooled"].to(dtype), "time_ids": batch["time_ids"].to(dtype)},
        ).sample
        target = noise if self.prediction == "epsilon" else self.schedule.get_velocity(latents, noise, times)
        losses = (said.float() - target).square().flatten(1).mean(1)
        return losses * self._weights(times) if weighted and self.gamma is not None else losses

    def _weights(self, times: torch.Tensor) -> torch.Tensor:
        """Return min(SNR, gamma) / SNR for noise as target, and / (SNR + 1) for velocity.

        Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy (arXiv:2303.09556), section 3.4;
        SNR = alpha_bar / (1 - alpha_bar). At the very end of a schedule with zero SNR the noise gets no weight.
        """
        alphas = self.schedule.alphas_cumprod.to(times.device)[times].float()
        ratio = alphas / (1 - alphas)
        capped = ratio.clamp(max=self.gamma)
        if self.prediction == "v_prediction":
            return capped / (ratio + 1)
        return torch.where(ratio > 0, capped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny), torch.zeros_like(ratio))


def _distribution(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel of the latents, which few models of the family set."""
    found = []
    for name, usual in (("latents_mean", 0.0), ("latents_std", 1.0)):
        given = getattr(vae.config, name, None)
        values = torch.full((latents.shape[1],), usual) if given is None else torch.tensor(given)
        found.append(values.view(1, -1, 1, 1).to(latents))
    return found[0], found[1]
