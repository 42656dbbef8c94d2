"""Which checkpoints can be trusted.

A checkpoint counts only when it holds a file ``COMPLETE``, which is written last, after the adapter in it was
checked, and which names the size and SHA-256 of every other file. So a checkpoint that was cut short by a
kill, or that went bad on disk, is never resumed from: it is removed and the next older one is taken.

The folder also holds ``run.json`` (what the checkpoints belong to, and the figures of the base model) and, at
the end, ``FINISHED.json`` (the termination message of the finished run). The checkpoints of a finished run are
removed, unless they are to be kept. A checkpoint whose adapter failed verification says so in ``REFUSED.json``: the
training may go on from it, but no other attempt takes it for the best.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taskoffer.api.contract import ExitCode, RunConfig, Termination
from taskoffer_trainer.config import fingerprint, identity
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.learned import has_learned

__all__ = [
    "ADAPTER_FILE",
    "ADAPTER_FOLDER",
    "AVERAGED_FILE",
    "COMPLETE",
    "Checkpoint",
    "best_checkpoint",
    "check_adapter",
    "check_identity",
    "complete_checkpoints",
    "finished_run",
    "is_refused",
    "kept_so_far",
    "logged",
    "mark_complete",
    "mark_finished",
    "read_run",
    "refuse",
    "remove_checkpoints",
    "rotate",
    "sha256_of",
    "write_json",
    "write_run",
    "write_text",
]

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint count."""
ADAPTER_FILE = "adapter_model.safetensors"
"""Name of PEFT's weight file."""
AVERAGED_FILE = "averaged_model.safetensors"
"""Weight file of a checkpoint with the average of the adapter's weights, where one is kept."""
ADAPTER_FOLDER = "adapter"
"""Folder below the output folder that receives the verified adapter."""
_RUN = "run.json"
_FINISHED = "FINISHED.json"
_REFUSED = "REFUSED.json"
"""File of a checkpoint with what was wrong with its adapter, by the name of the weight file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, its step, and the held-out loss where the step was evaluated.

    ``weights`` is the file that is meant by it: the weights that are trained, or their average. Without ``learned``
    the trained ones change nothing yet; ``refused`` ones have failed verification.
    """

    folder: Path
    step: int
    eval_loss: float | None
    weights: str = ADAPTER_FILE
    learned: bool = True
    refused: bool = False


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole, also after a power cut, or as it was before."""
    # Hidden, for a kill leaves it behind.
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write JSON as :func:`write_text` writes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_run(config: RunConfig) -> dict[str, Any]:
    """Return what ``run.json`` says: ``fingerprint``, ``identity``, the figures of the base model, the fallbacks."""
    return _read_json(Path(config.checkpoint_dir) / _RUN) or {}


def write_run(config: RunConfig, figures: dict[str, Any]) -> None:
    """Record what the checkpoints belong to, and add to what is known of it: figures of the base model, fallbacks."""
    known = read_run(config)
    if known.get("fingerprint") != fingerprint(config):
        known = {"fingerprint": fingerprint(config), "identity": identity(config)}
    write_json(Path(config.checkpoint_dir) / _RUN, {**known, **figures})


def check_identity(config: RunConfig) -> None:
    """Refuse to go on from checkpoints of another run, whose weights would not fit or mean something else.

    Raises:
        TrainerError: ``BAD_CONFIG`` with the settings that differ.
    """
    run = read_run(config)
    if not run or run.get("fingerprint") == fingerprint(config):
        return
    then, now = run.get("identity", {}), identity(config)
    places = sorted(set(_differences(then, json.loads(json.dumps(now)))))
    raise TrainerError(
        ExitCode.BAD_CONFIG,
        "CheckpointsOfAnotherRun",
        f"checkpointDir: {config.checkpoint_dir} holds checkpoints of another run, which differs in "
        f"{', '.join(places[:8]) or 'its settings'}; use another folder or empty it",
    )


def _differences(then: Any, now: Any, place: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            name
            for key in {*then, *now}
            for name in _differences(then.get(key), now.get(key), f"{place}.{key}".lstrip("."))
        ]
    return [] if then == now else [f"{place} ({then} then, {now} now)"]


def check_adapter(folder: Path, expected: int) -> int:
    """Check an adapter on disk (number of tensors, none empty, all finite) and count its parameters.

    Raises:
        ValueError: saying what is wrong with which tensor.
    """
    import torch
    from safetensors import safe_open

    parameters = 0
    with safe_open(folder / ADAPTER_FILE, framework="pt", device="cpu") as file:
        names = list(file.keys())
        if len(names) != expected:
            raise ValueError(f"{folder / ADAPTER_FILE} holds {len(names)} tensors and should hold {expected}")
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                raise ValueError(f"tensor {name} in {folder / ADAPTER_FILE} is empty")
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(f"tensor {name} in {folder / ADAPTER_FILE} has {bad} values that are not finite")
            parameters += tensor.numel()
    return parameters


def mark_complete(folder: Path, step: int, eval_loss: float | None, expected_tensors: int) -> Checkpoint:
    """Check a checkpoint that was just written, put it on disk for good and let it count from now on.

    Raises:
        TrainerError: ``RESTART`` when it does not pass; the folder is removed, so that the run goes on from
        the one
            before it.
    """
    try:
        check_adapter(folder, expected_tensors)
        state = _read_json(folder / "trainer_state.json") or {}
        if state.get("global_step") != step:
            raise ValueError(f"{folder / 'trainer_state.json'} says step {state.get('global_step')} instead of {step}")
    except (ValueError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise TrainerError(ExitCode.RESTART, "CheckpointBroken", f"the checkpoint of step {step}: {error}") from error
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = [path.stat().st_size, sha256_of(path)]
    learned = has_learned(folder / ADAPTER_FILE)
    write_json(folder / COMPLETE, {"step": step, "eval_loss": eval_loss, "learned": learned, "files": files})
    return Checkpoint(folder, step, eval_loss, learned=learned)


def _folders(config: RunConfig) -> list[Path]:
    """All checkpoint folders, the newest first."""
    found = [
        path
        for path in Path(config.checkpoint_dir).glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _fault(folder: Path, record: dict[str, Any] | None) -> str | None:
    """Say why a checkpoint cannot be trusted, or ``None`` when it can."""
    if record is None:
        return "it was not finished"
    for name, (size, digest) in record["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != digest:
            return f"the content of {name} has changed"
    return None


def kept_so_far(config: RunConfig) -> tuple[str | None, float | None]:
    """Return the name of the newest finished checkpoint and the smallest held-out loss of all of them.

    Looks at what they say of themselves and not at their weights, for there may be little time left.
    """
    said = [(folder.name, record) for folder in _folders(config) if (record := _read_json(folder / COMPLETE))]
    losses = [record["eval_loss"] for _, record in said if isinstance(record.get("eval_loss"), (int, float))]
    return (said[0][0] if said else None), min(filter(math.isfinite, losses), default=None)


def complete_checkpoints(config: RunConfig, remove_broken: bool = False) -> list[Checkpoint]:
    """Return the checkpoints that can be trusted, the newest first.

    Args:
        config: the run.
        remove_broken: check every file against its SHA-256, and remove what does not pass. Without it a
        checkpoint
            counts by its ``COMPLETE`` file alone.
    """
    found = []
    for folder in _folders(config):
        record = _read_json(folder / COMPLETE)
        if remove_broken and (fault := _fault(folder, record)) is not None:
            print(f"trainer: checkpoint {folder.name} is left out and removed: {fault}", flush=True)
            shutil.rmtree(folder)
        elif record is not None:
            learned, refused = bool(record.get("learned", True)), is_refused(folder)
            found.append(Checkpoint(folder, int(record["step"]), record["eval_loss"], learned=learned, refused=refused))
    return found


def refuse(checkpoint: Checkpoint, why: str) -> None:
    """Record that an adapter has failed verification, so that no other attempt takes it for the best.

    Where that cannot be written it is told and left, for the next best is worth more than the record.
    """
    path = checkpoint.folder / _REFUSED
    try:
        write_json(path, {**(_read_json(path) or {}), checkpoint.weights: why})
    except OSError as error:
        print(f"trainer: {path} could not be written: {error}", flush=True)


def is_refused(folder: Path, weights: str = ADAPTER_FILE) -> bool:
    """Tell whether an adapter of a checkpoint has failed verification, in this attempt or in one before it."""
    return weights in (_read_json(folder / _REFUSED) or {})


def logged(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the trainer's log of all attempts up to a checkpoint, as transformers keeps it: an entry per logging."""
    state = json.loads((checkpoint.folder / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state.get("log_history", ()))


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Return the checkpoint with the smallest held-out loss, or the newest when none was evaluated.

    One that has learned nothing is only returned when all are so, whatever its loss is; one that has failed
    verification only when there is none else that has learned something.

    Raises:
        ValueError: when there is no checkpoint at all.
    """
    if not checkpoints:
        raise ValueError("no complete checkpoint")
    learned = [one for one in checkpoints if one.learned] or checkpoints
    standing = [one for one in learned if not one.refused] or learned
    evaluated = [one for one in standing if one.eval_loss is not None and math.isfinite(one.eval_loss)]
    if not evaluated:
        return max(standing, key=lambda one: one.step)
    return min(evaluated, key=lambda one: (one.eval_loss, -one.step))


def rotate(config: RunConfig) -> None:
    """Remove old checkpoints beyond ``save_total_limit``; only complete ones count.

    The best one and the newest one stay in any case and belong to the number, so that it is the most that the
    volume has to hold. What cannot be removed is told, counts no more, and goes with the next attempt.
    """
    complete = complete_checkpoints(config)
    if not complete:
        return
    best = best_checkpoint(complete).folder
    others = [one.folder for one in complete if one.folder != best]
    keep = {best, complete[0].folder, *others[: config.train.save_total_limit - 1]}
    for one in complete:
        if one.folder not in keep:
            try:
                _remove(one.folder)
            except OSError as error:
                print(f"train: {one.folder} is one too many and could not be removed: {error}", flush=True)


def _remove(folder: Path) -> None:
    # Without its marker a folder that is only half removed does not count.
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_checkpoints(config: RunConfig) -> None:
    """Remove all checkpoints of a run that has ended well, complete or not, unless ``keep_checkpoints`` is set.

    What cannot be removed is told and left: the result is in place, and it is not a failure of the training.
    """
    if config.train.keep_checkpoints:
        return
    for folder in _folders(config):
        try:
            _remove(folder)
        except OSError as error:
            print(f"trainer: {folder} is not needed any more and could not be removed: {error}", flush=True)


def mark_finished(config: RunConfig, termination: Termination) -> None:
    """Record that this run has ended well, so that the same command reports it instead of training again."""
    value = {"fingerprint": fingerprint(config), "termination": termination.to_wire()}
    write_json(Path(config.checkpoint_dir) / _FINISHED, value)


def finished_run(config: RunConfig) -> Termination | None:
    """Return how this very run ended well before, when its adapter is still in place, else ``None``."""
    record = _read_json(Path(config.checkpoint_dir) / _FINISHED)
    if record is None or record.get("fingerprint") != fingerprint(config):
        return None
    try:
        termination = Termination.model_validate(record["termination"])
    except (KeyError, ValidationError):
        return None
    adapter = Path(config.output_dir) / ADAPTER_FOLDER
    manifest = _read_json(adapter / "manifest.json")
    if manifest is None or manifest.get("provisional") or not (adapter / ADAPTER_FILE).is_file():
        return None
    if sha256_of(adapter / ADAPTER_FILE) != termination.adapter_sha256:
        return None
    return termination.model_copy(update={"adapter_dir": str(adapter)})
