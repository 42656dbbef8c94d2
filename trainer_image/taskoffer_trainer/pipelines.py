"""Loads the components of an image pipeline from a folder in diffusers' layout, without network and foreign code.

Components are loaded one by one, each with every weight from disk: so an error names the component, and VAE and
text encoders need not be in memory together with the network that is trained.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import Architecture, ExitCode, RunConfig
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.out_of_memory import is_out_of_memory

__all__ = [
    "Layout",
    "architecture_in",
    "assemble",
    "check_layout",
    "layout_of",
    "load_component",
    "load_scheduler",
    "load_text",
    "vae_factor",
]

INDEX = "model_index.json"
"""The file that names a pipeline's class and components."""


@dataclass(frozen=True)
class Layout:
    """What a pipeline of an architecture consists of.

    Attributes:
        pipeline: Name of its class in diffusers.
        network: The component that is trained.
        models: Class of each component with weights, by its folder, as (library, class).
        text: Pairs of tokenizer and text encoder.
    """

    pipeline: str
    network: str
    models: dict[str, tuple[str, str]]
    text: tuple[tuple[str, str], ...]

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that must be there."""
        return (*self.models, *(tokenizer for tokenizer, _ in self.text), "scheduler")


_TEXT = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
_LAYOUTS = {
    Architecture.SDXL: Layout(
        "StableDiffusionXLPipeline",
        "unet",
        {
            "unet": ("diffusers", "UNet2DConditionModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModel"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        },
        _TEXT,
    ),
    Architecture.FLUX: Layout(
        "FluxPipeline",
        "transformer",
        {
            "transformer": ("diffusers", "FluxTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModel"),
            "text_encoder_2": ("transformers", "T5EncoderModel"),
        },
        _TEXT,
    ),
}


def layout_of(config: RunConfig) -> Layout:
    """Return the layout of the architecture of a run.

    Raises:
        TrainerError: ``BAD_CONFIG`` without an architecture.
    """
    if config.model.architecture is None:
        names = " or ".join(one.value for one in Architecture)
        raise TrainerError(
            ExitCode.BAD_CONFIG, "ConfigInvalid", f"model.architecture: a task of type Image needs {names}"
        )
    return _LAYOUTS[config.model.architecture]


def architecture_in(folder: Path) -> Architecture:
    """Return the architecture of the pipeline in a folder.

    Raises:
        TrainerError: ``NO_MODEL`` when it is none of those that are known here.
    """
    try:
        found = json.loads((folder / INDEX).read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise TrainerError(ExitCode.NO_MODEL, "ModelUnusable", f"{folder / INDEX} cannot be read: {error}") from error
    for architecture, layout in _LAYOUTS.items():
        if layout.pipeline == found:
            return architecture
    known = " and ".join(layout.pipeline for layout in _LAYOUTS.values())
    raise TrainerError(ExitCode.NO_MODEL, "ModelUnusable", f"{folder} holds a {found}, and only {known} are known here")


def _no_model(config: RunConfig, message: str) -> TrainerError:
    return TrainerError(ExitCode.NO_MODEL, "ModelUnusable", f"{config.model.name} in {config.model.path}: {message}")


def _index(config: RunConfig) -> dict[str, Any]:
    folder = Path(config.model.path)
    if folder.is_file():
        raise _no_model(
            config, f"it is a single file; a folder in diffusers' layout with {INDEX} is needed, convert it beforehand"
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"has no {INDEX}" if folder.is_dir() else "does not exist"
        raise TrainerError(
            ExitCode.NO_MODEL,
            "ModelMissing",
            f"model.path: {folder} {what}; it must hold the pipeline of {config.model.name} in diffusers' layout",
        ) from error
    except (OSError, ValueError) as error:
        raise _no_model(config, f"{INDEX} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise _no_model(config, f"{INDEX} is no object")
    return index


def check_layout(config: RunConfig) -> None:
    """Check that the folder holds a pipeline of the architecture with all its components. Loads nothing.

    Raises:
        TrainerError: ``BAD_CONFIG`` when it is of another architecture, ``NO_MODEL`` when something is missing.
    """
    layout, index = layout_of(config), _index(config)
    found = index.get("_class_name")
    if found != layout.pipeline:
        other = next((one for one, its in _LAYOUTS.items() if its.pipeline == found), None)
        remedy = f"set model.architecture to {other.value}" if other else f"a {layout.pipeline} is needed"
        assert config.model.architecture is not None  # noqa: S101 - said by layout_of.
        raise TrainerError(
            ExitCode.BAD_CONFIG if other else ExitCode.NO_MODEL,
            "ArchitectureMismatch",
            f"model.architecture: it says {config.model.architecture.value} and {config.model.path} holds a {found}; "
            f"{remedy}",
        )
    missing = [name for name in layout.folders if not (Path(config.model.path) / name).is_dir()]
    if missing:
        raise _no_model(config, f"component {', '.join(missing)} is missing; copy the whole pipeline")
    for name, expected in layout.models.items():
        given = tuple(index.get(name) or ())
        if given != expected:
            raise _no_model(
                config,
                f"component {name} is {'.'.join(map(str, given)) or 'not in its index'}, and only {'.'.join(expected)} "
                "is loaded",
            )


def _variant(folder: Path) -> str | None:
    """Return the variant (such as fp16) that weights are stored in when there are none without.

    Files are called NAME.safetensors, NAME.VARIANT.safetensors or, in parts, NAME.VARIANT-00001-of-00002.safetensors.
    """
    variants: set[str | None] = set()
    for path in folder.glob("*.safetensors"):
        match = re.fullmatch(r"[^.]+\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors", path.name)
        variants.add(match[1] if match else None)
    return None if None in variants else min((one for one in variants if one), default=None)


def load_component(config: RunConfig, name: str, dtype: Any) -> Any:
    """Load a component with weights, in a data type, on the CPU, in evaluation mode and without gradients.

    Only safetensors are read, for other formats can run code.

    Raises:
        TrainerError: ``NO_MODEL`` with the component when it cannot be loaded or weights are missing.
    """
    import diffusers
    import transformers
    from safetensors import SafetensorError

    library, class_name = layout_of(config).models[name]
    folder = Path(config.model.path) / name
    loader = getattr(diffusers if library == "diffusers" else transformers, class_name)
    settings = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    began = time.monotonic()
    try:
        model, report = loader.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=_variant(folder),
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise _no_model(config, f"component {name} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise _no_model(config, f"component {name}: {len(missing)} weights are missing, the first is {missing[0]}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {name}, {parameters:,} parameters; loaded in {time.monotonic() - began:.1f} s", flush=True)
    return model.eval().requires_grad_(False)


def vae_factor(vae: Any) -> int:
    """Return how many pixels of an edge make one latent: the VAE halves between its blocks."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def load_scheduler(config: RunConfig) -> Any:
    """Load the noise schedule that the pipeline generates with.

    Raises:
        TrainerError: ``NO_MODEL``.
    """
    import diffusers

    library, class_name = _index(config).get("scheduler") or ("", "")
    loader: Any = getattr(diffusers, str(class_name), None)
    known = isinstance(loader, type) and issubclass(loader, diffusers.SchedulerMixin)
    if library != "diffusers" or not known:
        raise _no_model(config, f"component scheduler is {library}.{class_name}, which is no scheduler of diffusers")
    try:
        return loader.from_pretrained(Path(config.model.path) / "scheduler", local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise _no_model(config, f"component scheduler cannot be loaded: {error}") from error


def load_text(config: RunConfig, dtype: Any) -> dict[str, Any]:
    """Load tokenizers and text encoders, by their names in the pipeline.

    Raises:
        TrainerError: ``NO_MODEL`` with the component.
    """
    from transformers import AutoTokenizer

    parts: dict[str, Any] = {}
    for tokenizer, encoder in layout_of(config).text:
        try:
            parts[tokenizer] = AutoTokenizer.from_pretrained(
                Path(config.model.path) / tokenizer, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _no_model(config, f"component {tokenizer} cannot be loaded: {error}") from error
        parts[encoder] = load_component(config, encoder, dtype)
    return parts


def assemble(config: RunConfig, parts: dict[str, Any]) -> Any:
    """Put components together to a pipeline that says nothing while it works.

    Args:
        config: the run.
        parts: components by name; those that the work at hand does not need may be missing.
    """
    import diffusers

    layout, extra = layout_of(config), {}
    if config.model.architecture is Architecture.SDXL:
        # A watermark would be a change of the picture that the adapter did not make.
        extra = {"add_watermarker": False}
        extra["force_zeros_for_empty_prompt"] = bool(_index(config).get("force_zeros_for_empty_prompt", True))
    pipeline = getattr(diffusers, layout.pipeline)(**{**dict.fromkeys(layout.folders), **parts}, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
