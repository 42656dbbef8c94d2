"""Which files of a model are fetched, and whether training can load what has come."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

__all__ = ["choose_model_files", "pickles_alone", "what_is_lacking"]

_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.tiktoken", "LICENSE*", "*.md")
_MARKS = ("config.json", "model_index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = r"(model|diffusion_pytorch_model)"
_SHARD = r"(-\d+-of-\d+)?"
_PLAIN = re.compile(rf"{_WEIGHTS}{_SHARD}\.safetensors")
_VARIANT = re.compile(rf"{_WEIGHTS}\.[^.]+?{_SHARD}\.safetensors|{_WEIGHTS}\.safetensors\.index\.[^.]+\.json")
_CONSOLIDATED = re.compile(r"consolidated.*\.safetensors(\.index\.json)?")
_INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_OF_PICKLES = re.compile(r".*\.bin\.index(\.[^.]+)?\.json")
_WITH_VARIANT = re.compile(r"[^./]+\.[^./]+\.(safetensors|bin)")
_LOADED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for beside config.json when it is asked for no variant, in this order."""
_NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
"""Components of the pipelines that are trained here which have weights."""


def choose_model_files(paths: list[str]) -> list[str]:
    """Choose what training reads of a model: no pickles, no code, no weights in other formats, nothing twice.

    Many repositories have their weights a second time: a diffusers pipeline in one file at the top, or with a variant
    in their names (``.fp16``, in one file or in parts); a model of Mistral's as ``consolidated.safetensors``. None of
    these is read where the others are.
    """
    chosen = [
        path
        for path in paths
        if any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in _MODEL_FILES)
        # The parts that such an index names are pickles: without them it names what is not there.
        and not _OF_PICKLES.fullmatch(path)
        and not path.startswith(("original/", "onnx/", "openvino/", "."))
    ]
    if "model_index.json" in paths:
        chosen = [path for path in chosen if "/" in path or not path.endswith(".safetensors")]
    plain = {(path.parent, found[1]) for path in map(PurePosixPath, chosen) if (found := _PLAIN.fullmatch(path.name))}
    return [path for path in chosen if not _is_a_second_time(PurePosixPath(path), plain)]


def _is_a_second_time(path: PurePosixPath, plain: set[tuple[PurePosixPath, str]]) -> bool:
    if _CONSOLIDATED.fullmatch(path.name):
        return (path.parent, "model") in plain
    return _VARIANT.fullmatch(path.name) is not None and (path.parent, path.name.partition(".")[0]) in plain


def pickles_alone(paths: list[str], chosen: list[str]) -> list[str]:
    """Name the pickles of a model that has no other weights among the files that were chosen."""
    if any(path.endswith(".safetensors") for path in chosen):
        return []
    return [path for path in paths if path.endswith(_PICKLES) and path not in chosen]


def what_is_lacking(folder: Path, paths: list[str]) -> str:
    """Say what a model that has come lacks for being loaded; nothing when it can be.

    Args:
        folder: where its files lie.
        paths: their paths inside of it.
    """
    there = set(paths)
    if not there.intersection(_MARKS):
        return f"it has neither {' nor '.join(_MARKS)}"
    indexes = [path for path in paths if _INDEX.fullmatch(path) and not _is_passed_over(path, there)]
    lost = sorted({shard for index in indexes for shard in _shards(folder, index)} - there)
    if lost:
        return f"{len(lost)} of the files that its index names are not there, the first is {lost[0]}"
    if "model_index.json" in there:
        index = _read(folder / "model_index.json")
        named = [name for name in _NETWORKS if index.get(name) not in (None, [None, None])]
        # Of no component's name here, it has at least to have weights somewhere.
        bare = [name for name in named if not _has_weights(paths, f"{name}/")]
        if bare or not _has_weights(paths, ""):
            return f"there are no weights (*.safetensors) of {', '.join(bare) or 'any component'}"
        return ""
    return _lacks_a_text_model(folder, there)


def _is_passed_over(index: str, there: set[str]) -> bool:
    """Tell whether nobody reads an index of pickles: only a text model without safetensors is loaded from them."""
    if not _OF_PICKLES.fullmatch(index):
        return False
    safe = {str(PurePosixPath(index).with_name(name)) for name in _LOADED[:2]}
    return "model_index.json" in there or bool(safe & there)


def _lacks_a_text_model(folder: Path, there: set[str]) -> str:
    told = _read(folder / "config.json").get("transformers_weights")
    if there.intersection(_LOADED) or str(told) in there:
        return ""
    variants = sorted(path for path in there if _WITH_VARIANT.fullmatch(path) and not _CONSOLIDATED.fullmatch(path))
    if variants:
        return (
            f"its weights have the name of a variant ({', '.join(variants[:3])}), and training loads {_LOADED[0]} or "
            f"the parts that {_LOADED[1]} names; store them without one, as save_pretrained does"
        )
    return (
        f"there are no weights beside config.json that training can load: {_LOADED[0]}, or its parts and {_LOADED[1]}"
    )


def _has_weights(paths: list[str], prefix: str) -> bool:
    return any(path.startswith(prefix) and path.endswith(".safetensors") for path in paths)


def _shards(folder: Path, index: str) -> set[str]:
    """Return the files that an index of weights names, as paths in the model's folder."""
    named = _read(folder / index).get("weight_map")
    files = named.values() if isinstance(named, dict) else ()
    return {(PurePosixPath(index).parent / file).as_posix() for file in files if isinstance(file, str)}


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
