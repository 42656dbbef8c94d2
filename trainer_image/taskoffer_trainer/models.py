"""Loads the base model and its tokenizer from a folder, without network and without foreign code."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Clamp, ExitCode, RunConfig
from taskoffer_trainer.failures import TrainerError

__all__ = ["Device", "choose_device", "load_model", "load_tokenizer"]

_NVIDIA_CONTROL = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Device:
    """Where and in which precision a run computes, and why."""

    cuda: bool
    dtype: Any
    why: str
    clamps: tuple[Clamp, ...] = ()


def choose_device(config: RunConfig) -> Device:
    """Choose bfloat16 on a GPU and float32 on the CPU.

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


def load_model(config: RunConfig, device: Device) -> Any:
    """Load the base model with every weight from disk, and place it on its device.

    Raises:
        TrainerError: ``NO_MODEL`` when it cannot be loaded or weights are missing (transformers would fill
        them with
            random numbers and only warn).
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    started = time.monotonic()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=device.dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
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
