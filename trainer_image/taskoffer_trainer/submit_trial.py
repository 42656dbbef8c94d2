"""Uses a foreign adapter once on its base model, on the CPU: the model answers, or the pipeline draws a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from taskoffer.api.contract import (
    Architecture,
    DataConfig,
    LoraSettings,
    ModelConfig,
    RunConfig,
    SubmitConfig,
    TaskType,
    TrainSettings,
)
from taskoffer_trainer.held_out import answers
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.models import Device, load_again, load_tokenizer
from taskoffer_trainer.submit_verify import check_learned, failed
from taskoffer_trainer.verify import check_answers, load_adapter, verify_failed

__all__ = ["Trial", "try_picture", "try_text"]

PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "Count from one to five.")
"""What a foreign adapter is asked, until it has answered one of them; what it was trained for is not known here, so
that any answer will do."""
TOKENS = 16
"""Longest answer in tokens. Each token takes a pass over all weights on a pod without a GPU: seconds for a large
model, of which there are few before a deadline."""
DRAWN = "A lighthouse on a cliff by the sea"
EDGE, STEPS, SEED = 256, 4, 1
"""Edge in pixels and denoising steps of the picture: the fewest that go through every layer at a usual ratio of
latents. It shows that the adapter works, not how well."""


@dataclass(frozen=True)
class Trial:
    """What was seen of an adapter in use; pictures are PNG files by their names."""

    tensors: int
    parameters: int
    answers: list[dict[str, str]]
    pictures: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def try_text(config: SubmitConfig, folder: Path, tensors: int, interrupt: Interrupt) -> Trial:
    """Load an adapter onto its language model and let it answer.

    Args:
        config: the step's configuration.
        folder: the adapter in PEFT's format, with settings that we wrote.
        tensors: number of tensors that it has.
        interrupt: ends the work.

    Raises:
        TrainerError: ``VERIFY_FAILED``, or ``NO_MODEL`` when the base model cannot be loaded.
    """
    weights = next(folder.glob("*.safetensors"))
    check_learned(weights)
    _be_quiet()
    run = _run(config)
    tokenizer = load_tokenizer(run)
    base = load_again(run, _device(Path(run.model.path)))
    interrupt.check()
    model, parameters = load_adapter(folder, base, tensors)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not bool(model(input_ids=ids).logits.isfinite().all()):
            raise verify_failed("what it answers has numbers that are not finite")
    longest = run.train.max_length
    said: list[dict[str, str]] = []
    for prompt in PROMPTS:
        (text,) = answers(model, tokenizer, (prompt,), longest, interrupt.check, TOKENS, interrupt.check)
        said.append({"prompt": prompt, "before": "", "after": text})
        if text:
            break
    if not any(one["after"] for one in said):
        with model.disable_adapter():
            before = answers(model, tokenizer, PROMPTS, longest, interrupt.check, TOKENS, interrupt.check)
        check_answers([one["after"] for one in said], before)
    return Trial(tensors, parameters, said, versions=_versions("transformers", "peft"))


def try_picture(config: SubmitConfig, weights: Path, folder: Path | None, tensors: int, interrupt: Interrupt) -> Trial:
    """Load an adapter onto its pipeline and draw a picture.

    Args:
        config: the step's configuration.
        weights: its file.
        folder: the adapter in PEFT's format, with settings that we wrote; None for weights in diffusers' or
            kohya's format, which have no settings beside them.
        tensors: number of tensors that it has.
        interrupt: ends the work.

    Raises:
        TrainerError: ``VERIFY_FAILED``, or ``NO_MODEL`` when the pipeline cannot be loaded.
    """
    from taskoffer_trainer.flux import Flux
    from taskoffer_trainer.pictures import generate
    from taskoffer_trainer.pipelines import architecture_in, check_layout, layout_of, vae_factor
    from taskoffer_trainer.sdxl import SDXL

    check_learned(weights)
    _be_quiet()
    run = _run(config, architecture=architecture_in(Path(config.base_model_path or "")))
    check_layout(run)
    device = _device(Path(run.model.path) / layout_of(run).network)
    denoiser = Flux(run) if run.model.architecture is Architecture.FLUX else SDXL(run)
    pipeline, parameters = _pipeline(run, device, weights, folder, tensors)
    interrupt.check()
    multiple = denoiser.edge_multiple(vae_factor(pipeline.vae))
    edge = max(EDGE // multiple, 1) * multiple
    with torch.no_grad():
        prompt = denoiser.prompt(pipeline, DRAWN, run.train.max_length, torch.device("cpu"))
    picture = generate(pipeline, denoiser, prompt, edge, SEED, device.dtype, interrupt.check, STEPS)
    content, name = io.BytesIO(), "after-1.png"
    picture.save(content, "PNG")
    said = [{"prompt": DRAWN, "before": "", "after": name}]
    return Trial(tensors, parameters, said, {name: content.getvalue()}, _versions("diffusers", "peft"))


def _pipeline(run: RunConfig, device: Device, weights: Path, folder: Path | None, tensors: int) -> tuple[Any, int]:
    """Return the whole pipeline with the adapter on it, and the adapter's parameters."""
    from taskoffer_trainer.pipelines import assemble, layout_of, load_component, load_scheduler, load_text

    layout, parameters = layout_of(run), 0
    network = load_component(run, layout.network, device.dtype)
    if folder is not None:
        model, parameters = load_adapter(folder, network, tensors)
        network = model.get_base_model()
    parts: dict[str, Any] = {**load_text(run, device.dtype), layout.network: network}
    parts |= {"vae": load_component(run, "vae", torch.float32), "scheduler": load_scheduler(run)}
    pipeline = assemble(run, parts)
    if folder is None:
        parameters = _load_lora(pipeline, [network, *(parts[encoder] for _, encoder in layout.text)], weights)
    return pipeline, parameters


def _be_quiet() -> None:
    """Let the libraries say nothing but errors, as in a training."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for logging in (of_transformers, of_diffusers):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _run(config: SubmitConfig, **about: Any) -> RunConfig:
    """Return what the loaders of a training take; of this run only the model counts."""
    path = str(config.base_model_path)
    return RunConfig(
        job_name=config.job_name,
        task_id=config.task_id,
        task_type=TaskType.IMAGE if about else TaskType.INSTRUCT_TEXT,
        gpus=1,
        model=ModelConfig(name=config.base_model, path=path, **about),
        data=DataConfig(path=config.adapter_dir),
        lora=LoraSettings(),
        train=TrainSettings(),
        output_dir=config.adapter_dir,
        checkpoint_dir=config.adapter_dir,
    )


def _device(folder: Path) -> Device:
    """Compute in bfloat16 where the weights are stored in half precision: nothing else halves the pod's memory."""
    for path in sorted(folder.glob("*.safetensors")):
        for _name, tensor in _headers(path):
            if tensor.get_dtype() in ("BF16", "F16"):
                return Device(False, torch.bfloat16, "bfloat16 on the CPU, because its weights are no wider")
            return Device(False, torch.float32, "float32 on the CPU, as its weights are")
    return Device(False, torch.float32, "float32 on the CPU")


def _headers(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary.
                yield name, file.get_slice(name)
    except SafetensorError as error:
        raise verify_failed(f"{path} cannot be read: {error}") from error


def _load_lora(pipeline: Any, bearers: list[Any], weights: Path) -> int:
    """Load weights in diffusers' or kohya's format onto a pipeline and return their parameters.

    One pair may become several layers (kohya's scripts join the projections of Flux), but none may get lost.
    """
    from peft import get_peft_model_state_dict

    try:
        pipeline.load_lora_weights(
            weights.parent, weight_name=weights.name, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise verify_failed(f"{weights.name} cannot be loaded onto the pipeline: {error}") from error
    loaded: dict[str, Any] = {}
    for number, bearer in enumerate(bearers):
        for adapter in getattr(bearer, "peft_config", {}):
            state = get_peft_model_state_dict(bearer, adapter_name=adapter)
            loaded |= {f"{number}.{name}": tensor for name, tensor in state.items()}
    first = (".lora_A.", ".lora_down.", ".lora.down.")
    pairs = sum(any(mark in name for mark in first) for name, _ in _headers(weights))
    arrived = sum(".lora_A." in name for name in loaded)
    if not pairs or arrived < pairs:
        raise failed(
            "AdapterDoesNotFit", f"{weights}: only {arrived} of {pairs} pairs of tensors have a place in the pipeline"
        )
    return sum(tensor.numel() for tensor in loaded.values())


def _versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in ("torch", *names)}
