"""Loads the base model and its tokenizer from a folder, without network and without foreign code."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, RunConfig
from taskoffer_trainer.attention import load_with_attention
from taskoffer_trainer.context import stretched
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.out_of_memory import is_out_of_memory

__all__ = ["Device", "choose_device", "load_again", "load_model", "load_tokenizer"]

_NVIDIA_CONTROL = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Device:
    """Where and in which precision a run computes, and why."""

    cuda: bool
    dtype: Any
    why: str
    clamps: tuple[Clamp, ...] = ()

    @property
    def half(self) -> bool:
        """Whether the model is in half precision."""
        return bool(self.dtype.itemsize == 2)


def choose_device(config: RunConfig) -> Device:
    """Choose bfloat16 on a GPU and float32 on the CPU, unless TASKOFFER_CPU_BF16=1 asks for bfloat16 there too.

    Raises:
        TrainerError: ``RESTART`` when the pod has a GPU that torch cannot use, which training on the CPU
        would hide,
            or has fewer GPUs than processes.
    """
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count < config.gpus:
            raise TrainerError(
                ExitCode.RESTART,
                "GPUMissing",
                f"the run needs {config.gpus} GPUs and torch sees {count} in this pod",
            )
        name = torch.cuda.get_device_name()
        if config.train.bf16 and torch.cuda.is_bf16_supported():
            return Device(True, torch.bfloat16, f"bfloat16 on {name}")
        return Device(True, torch.float32, f"float32 on {name}", _no_bf16(config, f"{name} has no bfloat16."))
    if _NVIDIA_CONTROL.exists():
        raise TrainerError(
            ExitCode.RESTART,
            "GPUUnusable",
            f"{_NVIDIA_CONTROL} is there but torch {torch.__version__} sees no GPU; does the driver fit?",
        )
    if config.train.bf16 and os.environ.get("TASKOFFER_CPU_BF16") == "1":
        return Device(False, torch.bfloat16, "bfloat16 on the CPU, because TASKOFFER_CPU_BF16=1 asks for it")
    reason = "There is no GPU here; on a CPU bfloat16 is slower and less exact than float32."
    return Device(False, torch.float32, "float32 on the CPU, because there is no GPU here", _no_bf16(config, reason))


def _no_bf16(config: RunConfig, message: str) -> tuple[Clamp, ...]:
    if not config.train.bf16:
        return ()
    return (Clamp(field="train.bf16", requested="true", effective="false", reason="NoBF16", message=message),)


def _no_model(config: RunConfig, message: str) -> TrainerError:
    return TrainerError(ExitCode.NO_MODEL, "ModelUnusable", f"{config.model.name} in {config.model.path}: {message}")


def load_tokenizer(config: RunConfig) -> Any:
    """Load the tokenizer and make sure that it can end and pad a text.

    Raises:
        TrainerError: ``NO_MODEL``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_model(config, f"the tokenizer cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise _no_model(config, "the tokenizer has no end-of-text token, so the model could never learn to stop")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: RunConfig, device: Device, rank: int = 0) -> Any:
    """Load the base model with every weight from disk, onto the CPU.

    Where the parameters are going to be shared out over the ranks, only rank 0 reads them; the others get the model
    without values (on the meta device), which :func:`taskoffer_trainer.sharding.share_out` fills.

    Raises:
        TrainerError: ``NO_MODEL`` when it cannot be loaded or weights are missing (transformers would fill them with
            random numbers and only warn); ``BAD_CONFIG`` when it cannot be stretched as is asked for.
    """
    if config.train.fsdp and rank > 0:
        return _skeleton(config, device)
    return _loaded(config, device)


def load_again(config: RunConfig, device: Device) -> Any:
    """Load the base model where it computes, for an adapter that is to be verified.

    A model that was shared out is spread over the GPUs of the pod, layer by layer; nobody else uses them by now.

    Raises:
        TrainerError: as :func:`load_model`.
    """
    if not device.cuda:
        return _loaded(config, device)
    if config.train.fsdp:
        return _loaded(config, device, device_map="balanced")
    return _loaded(config, device).to("cuda")


def _skeleton(config: RunConfig, device: Device) -> Any:
    """Build the base model with shapes and types but no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings = stretched(config)
    if settings is None:
        settings = AutoConfig.from_pretrained(config.model.path, local_files_only=True, trust_remote_code=False)

    def build(attention: str | None) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                settings, dtype=device.dtype, attn_implementation=attention, trust_remote_code=False
            )

    model = load_with_attention(build, config.train.attn_implementation, device.half)
    if (Path(config.model.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(config.model.path, local_files_only=True)
    return model.eval()


def _loaded(config: RunConfig, device: Device, **placement: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    def load(attention: str | None) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=device.dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )

    started = time.monotonic()
    try:
        if (settings := stretched(config)) is not None:
            placement["config"] = settings
        model, report = load_with_attention(load, config.train.attn_implementation, device.half)
    except (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise _no_model(config, f"the model cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise _no_model(config, f"{len(missing)} weights are missing, the first is {missing[0]}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model: {config.model.name}, {parameters:,} parameters as {device.why}; loaded in "
        f"{time.monotonic() - started:.1f} s",
        flush=True,
    )
    return model
