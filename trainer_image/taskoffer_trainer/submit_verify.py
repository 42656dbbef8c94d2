"""Looks at a result before it leaves: is it whole, unchanged since it was verified, and an adapter of this model?"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskoffer.api.contract import ExitCode, SubmitConfig
from taskoffer_trainer.cache import BLOCK
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Speaker
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.learned import NOTHING_LEARNED, has_learned

__all__ = [
    "MANIFEST",
    "Part",
    "check_fit",
    "check_learned",
    "check_result",
    "check_weights",
    "failed",
    "is_verified",
    "with_base_model",
    "with_plainer_cards",
]

MANIFEST = "manifest.json"
"""File that names size and SHA-256 of every other one; it is written and handed over last."""
_CONFIG = "adapter_config.json"
_CARD = "README.md"
_SMALL = 1 << 20
_FRONT = re.compile(r"\A---\r?\n(.*?)(\r?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
"""The front matter of a card, which hubs read."""
_PAIRS = ((".lora_A.", ".lora_B."), (".lora_down.", ".lora_up."), (".lora.down.", ".lora.up."))
"""What tells the two matrices of a layer apart in the names of PEFT and diffusers, of kohya's scripts, and of old."""


@dataclass(frozen=True)
class Part:
    """A file to hand over: on disk, or in memory where it had to be changed."""

    name: str
    size: int
    sha256: str
    path: Path | None = None
    content: bytes | None = None

    @classmethod
    def of(cls, name: str, content: bytes) -> Part:
        """Build from what is in memory."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content=content)

    def read(self) -> bytes:
        """Return the whole content; for small files."""
        return self.content if self.content is not None else (self.path or Path(self.name)).read_bytes()


def failed(reason: str, message: str) -> TrainerError:
    """Build the error for a result that cannot be handed over."""
    return TrainerError(ExitCode.VERIFY_FAILED, reason, message)


def check_result(config: SubmitConfig, interrupt: Interrupt) -> list[Part]:
    """Check the adapter folder and return what to hand over, the manifest last.

    The manifest was written by the training after it had loaded the adapter onto a fresh base model and had used it.
    Here every file must still be what it names; the weights must be there, finite and not without any effect; and
    they must fit the base model where its folder is given. Card and configuration are completed with the base model's
    public name.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what is wrong.
    """
    folder = Path(config.adapter_dir)
    manifest = _manifest(folder)
    parts = [_part(folder, name, about, interrupt) for name, about in sorted(manifest["files"].items())]
    weights = [part for part in parts if part.name.endswith(".safetensors")]
    if not weights:
        raise failed("ResultEmpty", f"{folder}: {MANIFEST} names no .safetensors file")
    shapes: dict[str, tuple[int, ...]] = {}
    for part in weights:
        shapes |= check_weights(folder / part.name, interrupt)
        check_learned(folder / part.name)
    _check_evidence(folder, manifest)
    if config.base_model_path is not None:
        check_fit(folder, Path(config.base_model_path), shapes)
    return _completed(config, manifest, parts)


def check_mirrored(config: SubmitConfig, interrupt: Interrupt) -> dict[str, Any]:
    """Check that the best adapter so far is whole and of this job; return its manifest.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what is wrong.
    """
    folder = Path(config.adapter_dir)
    manifest = _manifest(folder)
    if manifest.get("jobName") != config.job_name:
        raise failed("ManifestBroken", f"{folder / MANIFEST} is of {manifest.get('jobName')!r}, not {config.job_name}")
    for name, about in sorted(manifest["files"].items()):
        _part(folder, name, about, interrupt)
    return manifest


def is_verified(folder: Path, config: SubmitConfig) -> bool:
    """Tell whether a folder's manifest says that a training of this very job and task has verified what is in it."""
    try:
        manifest = _manifest(folder)
    except TrainerError:
        return False
    said = (manifest.get("provisional"), manifest.get("jobName"), manifest.get("taskID"))
    return said == (False, config.job_name, config.task_id)


def _manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise failed("ResultEmpty", f"adapterDir: {folder} is empty or missing: the training has left nothing")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise failed("ManifestMissing", f"{folder} has no {MANIFEST}: nothing says what was verified") from None
    except ValueError as error:
        raise failed("ManifestBroken", f"{folder / MANIFEST} is not JSON: {error}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise failed("ManifestBroken", f"{folder / MANIFEST} names no files")
    return dict(manifest)


def _part(folder: Path, name: str, about: Any, interrupt: Interrupt) -> Part:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or name == MANIFEST:
        raise failed("ManifestBroken", f"{folder / MANIFEST} names {name!r}, which is not a file of the result")
    if not isinstance(about, dict) or not {"bytes", "sha256"} <= about.keys():
        raise failed("ManifestBroken", f"{folder / MANIFEST}: {name} has no bytes and sha256")
    if not path.is_file():
        raise failed("FileMissing", f"{path} is in {MANIFEST} and not on disk")
    size, digest = path.stat().st_size, hashlib.sha256()
    speaker = Speaker(f"submit: checking {name}", size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            speaker.add(len(block))
            interrupt.check()
    if (size, digest.hexdigest()) != (about["bytes"], about["sha256"]):
        raise failed(
            "FileChanged",
            f"{path} is not what the training verified: {size} bytes with SHA-256 {digest.hexdigest()}, and {MANIFEST} "
            f"says {about['bytes']} with {about['sha256']}",
        )
    return Part(name, size, digest.hexdigest(), path=path)


def check_weights(path: Path, interrupt: Interrupt) -> dict[str, tuple[int, ...]]:
    """Check that a file of weights holds LoRA pairs, none of them empty, all finite; return their shapes.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with the tensor.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary.
                about = file.get_slice(name)
                shapes[name] = tuple(about.get_shape())
                if 0 in shapes[name]:
                    raise failed("AdapterBroken", f"{path}: tensor {name} is empty")
                if not _is_finite(path, file, name, about.get_dtype()):
                    raise failed("AdapterBroken", f"{path}: tensor {name} has values that are not finite")
                interrupt.check()
    except SafetensorError as error:
        raise failed("AdapterBroken", f"{path} is not a safetensors file: {error}") from error
    if not shapes:
        raise failed("AdapterBroken", f"{path} holds no tensors")
    for name in shapes:
        for pair in _PAIRS:
            for mark, counterpart in (pair, pair[::-1]):
                if mark in name and (other := name.replace(mark, counterpart)) not in shapes:
                    raise failed("AdapterBroken", f"{path}: tensor {name} is there without {other}")
    return shapes


def check_learned(path: Path) -> None:
    """Refuse weights that change nothing, because they were never trained or because nothing came of it.

    Raises:
        TrainerError: ``VERIFY_FAILED``.
    """
    if not has_learned(path):
        raise failed(
            NOTHING_LEARNED,
            f"{path}: of every pair the second matrix is zero, so that it changes nothing; train longer, with a higher "
            "learning rate, or on what there is something to learn from",
        )


def _is_finite(path: Path, file: Any, name: str, dtype: str) -> bool:
    if dtype in ("F64", "F32", "F16"):
        import numpy as np

        return bool(np.isfinite(file.get_tensor(name)).all())
    # numpy has no bfloat16 and nothing below it; torch, which has, takes seconds to import.
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as again:
        return bool(torch.isfinite(again.get_tensor(name).float()).all())


def _check_evidence(folder: Path, manifest: dict[str, Any]) -> None:
    """See that the training used the adapter once: an answer, or a picture that is part of the result."""
    answers = manifest.get("sampleAnswers") or []
    if any(isinstance(one, dict) and str(one.get("after", "")).strip() for one in answers):
        return
    if any(name.startswith("after-") and _is_png(folder / name) for name in manifest["files"]):
        return
    raise failed(
        "NoEvidence",
        f"{folder / MANIFEST} records no answer (sampleAnswers) and no picture (after-N.png) of the adapter in use",
    )


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def check_fit(folder: Path, base: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check every tensor's place and shape against the base model, built from its configuration without weights.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with the first tensor that does not fit.
    """
    expected = _of_pipeline(base, shapes) if (base / "model_index.json").is_file() else _of_language_model(folder, base)
    if expected.keys() != shapes.keys():
        lacking, odd = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        raise failed(
            "AdapterDoesNotFit",
            f"{folder}: {len(lacking)} tensors of {base} are missing and {len(odd)} have no place there, "
            f"for example {(odd or lacking)[0]}",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise failed("AdapterDoesNotFit", f"{folder}: tensor {name} is {shapes[name]}, and {base} needs {shape}")


def _of_language_model(folder: Path, base: Path) -> dict[str, tuple[int, ...]]:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        lora = LoraConfig.from_pretrained(str(folder))
        # The public name is checked elsewhere; PEFT would warn that the model here has another.
        lora.base_model_name_or_path = str(base)
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT asks transformers for something by its older name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
            adapted = get_peft_model(model, lora)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise failed("AdapterDoesNotFit", f"{folder} cannot be put on {base}: {error}") from error
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _of_pipeline(base: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return what the layers that a diffusers adapter names would need; a name without a layer is left out."""
    import diffusers  # type: ignore[import-not-found,unused-ignore]
    import torch

    index = json.loads((base / "model_index.json").read_bytes())
    part = "transformer" if "transformer" in index else "unet"
    kind = getattr(diffusers, index[part][1])
    with torch.device("meta"):
        layers = dict(kind.from_config(kind.load_config(base / part)).named_modules())
    expected = {}
    for name, shape in shapes.items():
        # Diffusers' own file begins with the part's name, PEFT's with that of its wrapper.
        found = re.fullmatch(rf"(?:{part}|base_model\.model)\.(.+)\.lora_([AB])\.weight", name)
        layer = layers.get(found[1]) if found else None
        weight = getattr(layer, "weight", None)
        if found is None or weight is None:
            continue
        # Of a layer of out x in, A is rank x in and B is out x rank.
        outer = tuple(weight.shape)
        expected[name] = (shape[0], *outer[1:]) if found[2] == "A" else (outer[0], *shape[1:])
    return expected


def _completed(config: SubmitConfig, manifest: dict[str, Any], parts: list[Part]) -> list[Part]:
    """Let card and configuration name the base model; only what had to be changed is changed."""
    by_name = {part.name: part for part in parts}
    if _CONFIG in by_name and by_name[_CONFIG].size <= _SMALL:
        settings = json.loads(by_name[_CONFIG].read())
        if settings.get("base_model_name_or_path") != config.base_model:
            settings["base_model_name_or_path"] = config.base_model
            text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
            by_name[_CONFIG] = Part.of(_CONFIG, text.encode())
    card = by_name[_CARD].read().decode("utf-8", "replace") if _CARD in by_name else _plain_card(config, manifest)
    complete = with_base_model(card, config.base_model)
    if _CARD not in by_name or complete != card:
        by_name[_CARD] = Part.of(_CARD, complete.encode())
    done = [by_name[name] for name in sorted(by_name)]
    if all(part.content is None for part in done):
        path = Path(config.adapter_dir) / MANIFEST
        return [*done, Part(MANIFEST, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), path=path)]
    files = {part.name: {"bytes": part.size, "sha256": part.sha256} for part in done}
    named = {**manifest.get("baseModel", {}), "name": config.base_model}
    text = json.dumps({**manifest, "files": files, "baseModel": named}, indent=2, sort_keys=True) + "\n"
    return [*done, Part.of(MANIFEST, text.encode())]


def with_plainer_cards(name: str, parts: list[Part]) -> Iterator[list[Part]]:
    """Yield the parts with less and less in their card's front matter; its text stays and names the base model.

    A hub looks at what stands there: the base model must have a name as on the hub, and what others have written may
    name data sets or licences that it does not know.

    Args:
        name: the base model's public name.
        parts: what is handed over, with card and manifest.
    """
    by_name = {part.name: part for part in parts}
    if _CARD not in by_name or MANIFEST not in by_name:
        return
    text = _FRONT.sub("", by_name[_CARD].read().decode("utf-8", "replace"), count=1)
    for card in (with_base_model(text, name), f"Base model: {name}\n\n{text}"):
        changed = Part.of(_CARD, card.encode())
        about = json.loads(by_name[MANIFEST].read())
        about["files"] = {**about["files"], _CARD: {"bytes": changed.size, "sha256": changed.sha256}}
        manifest = Part.of(MANIFEST, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
        yield list({**by_name, _CARD: changed, MANIFEST: manifest}.values())


def with_base_model(card: str, name: str) -> str:
    """Return a card whose front matter names the base model; all else of it stays."""
    line = f"base_model: {json.dumps(name)}"
    found = _FRONT.match(card)
    if found is None:
        return f"---\n{line}\nlibrary_name: peft\n---\n\n{card}"
    front = found[1]
    # A value over several lines is a list of names below its key.
    pattern = r"^base_model:[^\n]*(\n[ \t]*-[^\n]*)*"
    if re.search(pattern, front, re.MULTILINE):
        changed = re.sub(pattern, lambda _match: line, front, count=1, flags=re.MULTILINE)
        changed = front if re.search(rf"^{re.escape(line)}[ \t]*$", front, re.MULTILINE) else changed
    else:
        changed = f"{line}\n{front}" if front.strip() else line
    return f"---\n{changed}\n---\n{card[found.end() :]}" if changed != front else card


def _plain_card(config: SubmitConfig, manifest: dict[str, Any]) -> str:
    figures = ("step", "trainLoss", "evalLossBefore", "evalLossAfter")
    lines = [f"# Adapter for {config.base_model}", ""]
    lines += [f"* {key}: {manifest[key]}" for key in figures if manifest.get(key) is not None]
    return "\n".join(lines).rstrip() + "\n"
