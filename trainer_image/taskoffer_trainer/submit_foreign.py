"""Looks at what a trainer that is not ours, or one of ours that was stopped, has left, and makes of it a result.

Nothing in that folder can be relied upon: whoever wrote it may have wanted this pod, which has the tokens, to read,
run or upload something else. So a link or a device anywhere is the end of it; of the files only those are taken that
are known and can hold no code; and settings are written anew from the ones that are known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskoffer.api.contract import SubmitConfig
from taskoffer_trainer.cache import BLOCK
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Speaker
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.submit_verify import MANIFEST, Part, check_fit, check_weights, failed, with_base_model

if TYPE_CHECKING:
    from taskoffer_trainer.submit_trial import Trial

__all__ = ["add_missing", "check_foreign"]

_MAX_ENTRIES = 20_000
"""Files and folders of a result; trainers leave checkpoints and logs, but not so many."""
_MAX_NAMES = 100
"""Names of what was left out that the manifest holds."""
_MAX_TEXT = 32 << 20
"""Bytes of a file that is read as a whole; the largest tokenizers have 20 MB."""
_MAX_NUMBER = 1 << 20
"""Largest rank or alpha; no layer has so many dimensions."""
_SETTINGS = "adapter_config.json"
_CARD = "README.md"
_ADAPTER = "adapter_model.safetensors"
_OF_PICTURES = ("pytorch_lora_weights.safetensors", _ADAPTER, "last.safetensors")
"""Names of an adapter's weights by diffusers, PEFT and kohya's scripts; any other is taken when it is the only one."""
_JSON = frozenset({"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"})
_TEXTS = frozenset({*_JSON, "vocab.json", "merges.txt", "chat_template.jinja"})
"""Files beside the weights that are handed over: what transformers writes of a tokenizer, all of it text."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NUMBERS = frozenset({"r", "lora_alpha", "lora_dropout", "layers_to_transform"})
_SWITCHES = frozenset({"use_rslora", "use_dora", "fan_in_fan_out"})
_MODULES = frozenset({"target_modules", "exclude_modules", "target_parameters", "layers_pattern"})
_PATTERNS = frozenset({"rank_pattern", "alpha_pattern"})
_TAKEN = sorted(_NUMBERS | _SWITCHES | _MODULES | _PATTERNS)
"""Settings of PEFT's LoraConfig that say how the weights are used."""
_REFUSED = frozenset(
    {"modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "use_qalora", "use_bdlora"}
    | {"alora_invocation_tokens", "megatron_config", "arrow_config", "kasa_config", "velora_config"}
    | {"monteclora_config"}
)
"""Settings that change what the weights mean or where they lie; a result with one of them is not a plain LoRA."""
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model as it was."""
_CHECKED = "## How this was checked"


@dataclass(frozen=True)
class _Chosen:
    """What of a folder is looked at further."""

    weights: Path
    settings: dict[str, Any] | None
    texts: tuple[Path, ...]
    left_out: tuple[str, ...]


def check_foreign(config: SubmitConfig, interrupt: Interrupt, mirrored: dict[str, Any] | None = None) -> list[Part]:
    """Verify a result from nothing but its files and the base model; return what to hand over, the manifest last.

    The weights must be a LoRA adapter in safetensors, whole, finite and not zero, that loads onto the base model; with
    it the model must then give an answer, or the pipeline a picture, on this pod's CPU. Pickles are never read.

    Args:
        config: the step's configuration.
        interrupt: ends the work.
        mirrored: the manifest of the best adapter so far, where a training of ours that has ended early left it.

    Raises:
        TrainerError: ``VERIFY_FAILED`` with what is wrong.
    """
    try:
        return _check(config, interrupt, mirrored)
    except PermissionError as error:
        raise failed("ResultRefused", f"{error.filename} cannot be read by user {os.getuid()}") from error


def _check(config: SubmitConfig, interrupt: Interrupt, mirrored: dict[str, Any] | None) -> list[Part]:
    folder, base = Path(config.adapter_dir), Path(config.base_model_path or "")
    pictures = (base / "model_index.json").is_file()
    chosen = _choose(folder, _survey(folder, interrupt), pictures)
    if chosen.left_out:
        print(f"submit: left out, for it is no part of an adapter: {', '.join(chosen.left_out)[:1000]}", flush=True)
    parts = [_hashed(path, interrupt) for path in (chosen.weights, *chosen.texts)]
    shapes = check_weights(chosen.weights, interrupt)
    _check_names(chosen.weights, shapes)
    # Torch takes seconds to import; most of what is refused was refused by now.
    from taskoffer_trainer.submit_trial import try_picture, try_text

    if chosen.settings is None:
        trial = try_picture(config, chosen.weights, None, len(shapes), interrupt)
    else:
        with _plain(chosen, folder) as plain:
            check_fit(plain, base, shapes)
            if pictures:
                trial = try_picture(config, chosen.weights, plain, len(shapes), interrupt)
            else:
                trial = try_text(config, plain, len(shapes), interrupt)
    return _completed(config, chosen, parts, trial, mirrored)


def _survey(folder: Path, interrupt: Interrupt) -> list[Path]:
    """Return every file below a folder in which there is nothing but files and folders."""
    if folder.is_symlink() or not folder.is_dir():
        raise failed("ResultEmpty", f"adapterDir: {folder} is missing: the trainer has left nothing")
    found, count, waiting = [], 0, [folder]
    while waiting:
        for entry in sorted(os.scandir(waiting.pop()), key=lambda one: one.name):
            interrupt.check()
            count += 1
            if count > _MAX_ENTRIES:
                raise failed("ResultRefused", f"{folder} holds more than {_MAX_ENTRIES} files and folders")
            path, mode = Path(entry.path), entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                waiting.append(path)
            elif stat.S_ISREG(mode):
                found.append(path)
            else:
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                raise failed("ResultRefused", f"{path} is {what}; copy what is meant into the result instead")
    if not found:
        raise failed("ResultEmpty", f"adapterDir: {folder} is empty: the trainer has left nothing")
    return sorted(found)


def _choose(folder: Path, files: list[Path], pictures: bool) -> _Chosen:
    top = {path.name: path for path in files if path.parent == folder}
    weights = _weights(folder, files, top, pictures)
    settings = None
    if weights.name == _ADAPTER:
        if _SETTINGS not in top:
            raise failed("AdapterBroken", f"{folder} has no {_SETTINGS} beside {_ADAPTER}: nothing says its scale")
        settings = _settings(top[_SETTINGS]) | ({} if pictures else {"task_type": "CAUSAL_LM"})
    texts = tuple(path for name, path in top.items() if name in _TEXTS and _is_text(path))
    taken = {weights, *texts, folder / _SETTINGS, folder / _CARD, folder / MANIFEST}
    left_out = tuple(path.relative_to(folder).as_posix() for path in files if path not in taken)
    return _Chosen(weights, settings, texts, left_out)


def _weights(folder: Path, files: list[Path], top: dict[str, Path], pictures: bool) -> Path:
    for name in _OF_PICTURES if pictures else (_ADAPTER,):
        if name in top:
            return top[name]
    there = [name for name in top if name.endswith(".safetensors")]
    if pictures and len(there) == 1:
        return top[there[0]]
    wanted = " or ".join(_OF_PICTURES) if pictures else _ADAPTER
    if there:
        why = f"of {', '.join(sorted(there)[:8])} none is it: a LoRA adapter is taken, and no whole model"
    elif pickles := sorted(path.relative_to(folder).as_posix() for path in files if path.suffix in _PICKLES):
        why = f"{', '.join(pickles[:8])} are pickles, which can run code when they are read: save as safetensors"
    elif deeper := sorted(path.relative_to(folder).as_posix() for path in files if path.suffix == ".safetensors"):
        why = f"{', '.join(deeper[:8])} lie in folders below it: put the one that counts into the folder itself"
    else:
        why = f"it holds {', '.join(sorted(path.relative_to(folder).as_posix() for path in files)[:8])}"
    raise failed("ResultEmpty", f"{folder} has no {wanted}; {why}")


def _is_text(path: Path) -> bool:
    """Tell whether a file of a tokenizer is what its name says."""
    if path.stat().st_size > _MAX_TEXT:
        return False
    try:
        text = path.read_text(encoding="utf-8")
        if path.name in _JSON or path.suffix == ".json":
            json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        return False
    return True


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings of an adapter that say how its weights are used, and refuse those that say more."""
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_TEXT else None
    except (ValueError, RecursionError) as error:
        raise failed("AdapterBroken", f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise failed("AdapterBroken", f"{path} is no object of settings")
    if found.get("peft_type") != "LORA":
        raise failed("NotLora", f"{path}: peft_type is {found.get('peft_type')!r}, and only LORA is taken")
    odd = sorted(name for name in _REFUSED if found.get(name))
    if found.get("bias") not in (None, "none"):
        odd.append("bias")
    if found.get("init_lora_weights") not in _PLAIN_STARTS:
        odd.append("init_lora_weights")
    odd += [name for name in _TAKEN if found.get(name) is not None and not _is_well_formed(name, found[name])]
    if odd:
        which = ", ".join(odd)
        raise failed("AdapterBroken", f"{path}: {which}: a plain LoRA adapter has no such setting; save one without")
    return {name: found[name] for name in _TAKEN if found.get(name) is not None}


def _is_well_formed(name: str, value: Any) -> bool:
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name in _PATTERNS:
        return isinstance(value, dict) and all(_is_pattern(key) and _is_number(one) for key, one in value.items())
    items = value if isinstance(value, list) else [value]
    return all(_is_number(one) if name in _NUMBERS else _is_pattern(one) for one in items)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMBER


def _is_pattern(value: Any) -> bool:
    """Tell whether PEFT can use a text as a regular expression, as it does with names of modules."""
    try:
        re.compile(value)
    except (TypeError, re.error, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def _hashed(path: Path, interrupt: Interrupt) -> Part:
    size, digest = path.stat().st_size, hashlib.sha256()
    speaker = Speaker(f"submit: checking {path.name}", size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            speaker.add(len(block))
            interrupt.check()
    return Part(path.name, size, digest.hexdigest(), path=path)


def _check_names(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    odd = sorted(name for name in shapes if "lora" not in name.lower() and not name.endswith(".alpha"))
    if odd:
        raise failed("NotLora", f"{path}: tensor {odd[0]} is of no LoRA adapter ({len(odd)} of {len(shapes)} are not)")


@contextmanager
def _plain(chosen: _Chosen, folder: Path) -> Iterator[Path]:
    """Give the adapter a folder with settings that we wrote; what is said of it names the folder that it came from."""
    place = Path(tempfile.mkdtemp(prefix="taskoffer-"))
    try:
        (place / _ADAPTER).symlink_to(chosen.weights)
        (place / _SETTINGS).write_text(
            json.dumps({"peft_type": "LORA", "inference_mode": True, **(chosen.settings or {})})
        )
        yield place
    except TrainerError as error:
        raise TrainerError(error.code, error.reason, error.message.replace(str(place), str(folder))) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _completed(
    config: SubmitConfig, chosen: _Chosen, parts: list[Part], trial: Trial, mirrored: dict[str, Any] | None
) -> list[Part]:
    """Add settings, card and manifest as our own training writes them."""
    name = config.base_model
    if chosen.settings is not None:
        settings = {"peft_type": "LORA", "inference_mode": True, "base_model_name_or_path": name, **chosen.settings}
        parts.append(Part.of(_SETTINGS, _json(settings)))
    parts += [Part.of(picture, content) for picture, content in trial.pictures.items()]
    parts.append(Part.of(_CARD, _card(config, trial, mirrored).encode()))
    parts.sort(key=lambda part: part.name)
    about = {
        "provisional": False,
        "jobName": config.job_name,
        "taskID": config.task_id,
        "attempt": config.attempt,
        "baseModel": {"name": name},
        "reason": "OwnTrainer",
        **_of_training(mirrored or {}),
        "tensors": trial.tensors,
        "parameters": trial.parameters,
        "sampleAnswers": trial.answers,
        "leftOut": list(chosen.left_out[:_MAX_NAMES]),
        "versions": trial.versions,
        "files": {part.name: {"bytes": part.size, "sha256": part.sha256} for part in parts},
    }
    return [*parts, Part.of(MANIFEST, _json(about))]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _of_training(mirrored: dict[str, Any]) -> dict[str, Any]:
    """Return what the manifest keeps of the one that a training of ours has written."""
    kept = {name: mirrored[name] for name in ("attempt", "step", "evalLoss") if mirrored.get(name) is not None}
    return {**kept, "reason": "BestSoFar"} if mirrored else {}


def _card(config: SubmitConfig, trial: Trial, mirrored: dict[str, Any] | None) -> str:
    """Return the trainer's own card, or a plain one, with what was seen here at its end."""
    path, own = Path(config.adapter_dir) / _CARD, ""
    if path.is_file() and _is_text(path):
        own = path.read_text(encoding="utf-8").split(_CHECKED)[0].rstrip()
    lines = [own or f"# LoRA adapter for {config.base_model}", "", _CHECKED, ""]
    made = "A trainer that the task brought has made this."
    if mirrored is not None:
        made = f"The training ended early, and this is its best checkpoint, of step {mirrored.get('step')}."
    lines += [
        f"{made} {trial.tensors} tensors with {trial.parameters:,} parameters "
        "are finite, load onto the base model, and were used there once:"
    ]
    for one in trial.answers:
        shown = f"![{one['after']}]({one['after']})" if one["after"] in trial.pictures else _quoted(one["after"])
        lines += ["", f"**{one['prompt']}**", "", shown]
    return with_base_model("\n".join(lines) + "\n", config.base_model)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or ["(nothing)"])


def add_missing(config: SubmitConfig, parts: list[Part]) -> None:
    """Write what was added to a result that stays where it is into its folder, the manifest last.

    A folder that is mounted for reading only keeps what the trainer left, and the log says so.
    """
    folder = Path(config.adapter_dir)
    added = [part for part in parts if part.content is not None]
    if not os.access(folder, os.W_OK):
        names = ", ".join(part.name for part in added)
        print(f"submit: {folder} cannot be written, so that {names} is not added there", flush=True)
        return
    for part in added:
        fresh = folder / f".{part.name}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.write_bytes(part.read())
        fresh.replace(folder / part.name)
