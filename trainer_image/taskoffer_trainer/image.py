"""Fine-tuning of a LoRA adapter on pictures with captions, for SDXL and Flux, with diffusers and PEFT."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from taskoffer.api.contract import Architecture, RunConfig, Termination
from taskoffer_trainer.checkpoints import ADAPTER_FILE, Checkpoint, read_run
from taskoffer_trainer.course import Course
from taskoffer_trainer.denoising import Denoiser, Encoded, NoisyRow, collate, noisy
from taskoffer_trainer.encoding import EncodedData, encode_split
from taskoffer_trainer.flux import Flux
from taskoffer_trainer.image_data import PairSplit
from taskoffer_trainer.lora import lora_config
from taskoffer_trainer.pictures import DIFFUSERS_FILE, check_changed, export_lora, generate, load_lora, scales_of
from taskoffer_trainer.pipelines import assemble, check_layout, layout_of, load_component, load_scheduler
from taskoffer_trainer.sdxl import SDXL
from taskoffer_trainer.steps import PieceLoss
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.trainer import CourseTrainer, training_arguments
from taskoffer_trainer.verify import Verified, check_repeated, load_adapter
from taskoffer_trainer.without_effect import without_effect

__all__ = ["ImageTrainer", "train"]

TIMES = 8
"""Times at which each held-out picture is measured: the middles of as many parts that training draws equally often."""


class ImageTrainer(CourseTrainer, Trainer):  # type: ignore[misc]
    """transformers' trainer, whose loss is the mean over the step's pictures of what the network gets wrong."""

    course: _Pictures

    def step_inputs(self, rows: list[Encoded]) -> list[NoisyRow]:
        """Draw noise and time of the whole step before it is cut, each row's by its position in the stream."""
        steps = self.steps
        positions = steps.plan.span(self.state.global_step)[steps.world.rank :: steps.world.size]
        return [noisy(row, steps.config.train.seed, place) for row, place in zip(rows, positions, strict=True)]

    def piece_loss(self, model: Any, piece: list[NoisyRow]) -> PieceLoss:
        """Return the sum of the pictures' losses."""
        batch = self._prepare_inputs(collate(piece))
        losses = self.course.denoiser.losses(model, batch, self.course.device.dtype, weighted=True)
        return PieceLoss(losses.sum(), len(piece))


def train(config: RunConfig, split: PairSplit, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Train, verify and export one adapter; or leave a checkpoint when asked to stop.

    Args:
        config: what to do.
        split: the pairs of picture and caption, the same in every rank.
        run_dir: folder for the progress report.
        rank: number of this process, from 0.
        stop: where signals are noted.

    Raises:
        TrainerError: for every failure that has a place in the contract.
        StopRequestedError: when asked to stop outside of the training loop.
    """
    return _Pictures(config, split, run_dir, rank, stop).run()


class _Pictures(Course):
    """Pictures with captions: the network learns to draw such pictures."""

    def __init__(self, config: RunConfig, split: PairSplit, run_dir: Path, rank: int, stop: Stop) -> None:
        super().__init__(config, run_dir, rank, stop)
        for logging in (transformers_logging, diffusers_logging):
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        self.split, self.layout = split, layout_of(config)
        self.denoiser: Denoiser
        self.data: EncodedData
        self.scales: dict[str, float] = {}
        """Of each layer, for an export when the model that was trained is gone."""

    @property
    def place(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.device.cuda else torch.device("cpu")

    def read(self) -> None:
        check_layout(self.config)
        self.denoiser = SDXL(self.config) if self.config.model.architecture is Architecture.SDXL else Flux(self.config)

    def arguments(self) -> TrainingArguments:
        return TrainingArguments(**training_arguments(self.config, self.device))

    def prepare(self, arguments: TrainingArguments) -> ImageTrainer:
        config = self.config
        self.data = encode_split(config, self.split, self.prompts(), self.denoiser, self.device, self.between())
        # The verification loads the network again and encodes nothing again.
        began = time.monotonic()
        network = load_component(config, self.layout.network, self.device.dtype)
        self.timings.load = time.monotonic() - began
        settings, clamps = lora_config(network, config.lora, self.denoiser.target_modules)
        settled = (*without_effect(config), *self.denoiser.clamps, *self.data.clamps)
        self.progress.clamps = (*self.device.clamps, *settled, *clamps)
        if config.train.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        set_seed(config.train.seed)
        model = get_peft_model(network, settings)
        self.scales = scales_of(model)
        return ImageTrainer(
            model=model,
            args=arguments,
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out,
        )

    def lengths(self) -> None:
        return None

    def counts(self) -> dict[str, int]:
        return {"train": len(self.split.train), "held_out": len(self.split.held_out)}

    def rows_measured(self) -> int:
        return TIMES * len(self.split.held_out)

    def prompts(self) -> list[str]:
        return list(self.config.sample_prompts) or [self.split.held_out[0].caption]

    def measure(self, model: Any, shared: bool, between: Callable[[], None]) -> dict[str, float]:
        """Measure the mean squared error, unweighted, at fixed noise and times: comparable over all steps and runs."""
        seed, dtype = self.config.train.seed, self.device.dtype
        rows = [(one, number) for one in self.data.held_out for number in range(TIMES)]
        device = next(model.parameters()).device

        def work(piece: Sequence[tuple[Encoded, int]]) -> tuple[float]:
            drawn = [noisy(one, seed, f"{one.digest}:{k}", (k + 0.5) / TIMES) for one, k in piece]
            tensors = {name: tensor.to(device) for name, tensor in collate(drawn).items()}
            return (float(self.denoiser.losses(model, tensors, dtype, weighted=False).double().sum()),)

        most = self.steps.micro_batch.size
        (total,) = self.evaluation.over(model, rows, work, 1, shared, between, most)
        return {"eval_loss": total / len(rows)}

    def answer(self, model: Any, between: Callable[[], None]) -> list[str]:
        """Draw a picture of each prompt with the base model, kept beside the checkpoints; returns their names."""
        pipeline = self._pipeline(model.get_base_model())
        folder = Path(self.config.checkpoint_dir)
        return self._draw(pipeline, folder, "before", between)

    def accompany(self, folder: Path) -> None:
        """Write the adapter in diffusers' format too, for what lies in the output folder before it was verified."""
        if not (folder / DIFFUSERS_FILE).exists():
            self._export(self.scales, load_file(folder / ADAPTER_FILE), folder)

    def _export(self, scales: dict[str, float], weights: dict[str, torch.Tensor], folder: Path) -> None:
        export_lora(scales, weights, getattr(diffusers, self.layout.pipeline), self.layout.network, folder)

    def verify(self, folder: Path, checkpoint: Checkpoint) -> Verified:
        config, check = self.config, self.stop.check
        network = load_component(config, self.layout.network, self.device.dtype).to(self.place)
        check()
        model, parameters = load_adapter(folder, network, self.tensors)
        self._export(scales_of(model), get_peft_model_state_dict(model, save_embedding_layers=False), folder)
        # From here on only the exported file counts: it goes through diffusers onto the bare network.
        network = model.unload()
        del model
        pipeline = self._pipeline(network)
        kept = Path(config.checkpoint_dir)
        names = [_picture("before", number) for number in range(1, len(self.prompts()) + 1)]
        if not all((kept / name).is_file() for name in names):
            self._draw(pipeline, kept, "before", check)
        load_lora(pipeline, self.layout.network, folder)
        figures = self.measure(network, False, check)
        untrained = read_run(config).get("figures_before", {}).get("eval_loss")
        check_repeated(figures["eval_loss"], checkpoint.eval_loss, untrained)
        drawn = self._draw(pipeline, folder, "after", check)
        for before, after in zip(names, drawn, strict=True):
            shutil.copyfile(kept / before, folder / before)
            check_changed(folder / before, folder / after)
        return Verified(figures, drawn, parameters)

    def _pipeline(self, network: Any) -> Any:
        """Return a pipeline around a network; the prompts are encoded already."""
        vae = load_component(self.config, "vae", torch.float32).to(self.place)
        parts = {self.layout.network: network, "vae": vae, "scheduler": load_scheduler(self.config)}
        return assemble(self.config, parts)

    def _draw(self, pipeline: Any, folder: Path, when: str, between: Callable[[], None]) -> list[str]:
        names = []
        for number, prompt in enumerate(self.prompts(), 1):
            asked, edge = self.data.prompts[prompt], self.data.edge
            dtype, seed = self.device.dtype, self.config.train.seed
            picture = generate(pipeline, self.denoiser, asked, edge, seed, dtype, between)
            names.append(_picture(when, number))
            # A later attempt takes what it finds for a picture, so that there must never be half of one.
            partial = folder / f".{names[-1]}.tmp"
            picture.save(partial, format="PNG")
            partial.replace(folder / names[-1])
        return names


def _picture(when: str, number: int) -> str:
    """Return the name of a sample picture's file."""
    return f"{when}-{number}.png"
