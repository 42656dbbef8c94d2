"""Keeps the best adapter so far in the output folder while the training goes on, so that a kill leaves a result.

It lies in ``provisional/step-…`` and not in ``adapter``, and its manifest says ``provisional``: nobody takes it for
the verified result, which replaces it in the end. It was read back, has all tensors, and all of them are finite; what
it does was measured in training only.

A folder is built under a hidden name and renamed to a name that nothing had before; older ones are removed after
that. So at every moment from the first one on there is a whole folder, on every file system that can rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from taskoffer.api.contract import PROVISIONAL_FOLDER, Provisional, RunConfig
from taskoffer_trainer.checkpoints import (
    ADAPTER_FILE,
    COMPLETE,
    Checkpoint,
    best_checkpoint,
    complete_checkpoints,
    write_json,
)
from taskoffer_trainer.export import described, fill

__all__ = [
    "best_so_far",
    "mirror",
    "mirror_best",
    "provisional_adapter",
    "provisional_folders",
    "remove_provisional",
    "withdraw",
]


def provisional_folders(place: Path) -> list[Path]:
    """Return the folders with an adapter below a place, the latest step last."""
    found = []
    for path in place.glob("step-*-*"):
        number = path.name.split("-")[1]
        if path.is_dir() and number.isdecimal():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def _folders(config: RunConfig) -> list[Path]:
    return provisional_folders(Path(config.output_dir) / PROVISIONAL_FOLDER)


def provisional_adapter(config: RunConfig) -> Path | None:
    """Return the folder of the best adapter so far, or ``None`` where there is none."""
    return next(iter(reversed(_folders(config))), None)


def best_so_far(config: RunConfig) -> Provisional | None:
    """Return what is said of the best adapter so far, or ``None`` where there is none or its folder is unreadable."""
    try:
        folder = provisional_adapter(config)
    except OSError:
        return None
    return None if folder is None else Provisional(step=int(folder.name.split("-")[1]), path=str(folder)[:2048])


def mirror_best(config: RunConfig, accompany: Callable[[Path], None] = lambda _: None) -> Path | None:
    """Bring the output folder up to the best complete checkpoint; without one that has learned nothing is done.

    Where all of them have failed verification, the one that is kept is one of those and goes.

    Args:
        config: the run.
        accompany: writes into an adapter's folder what its user needs beside it.

    Returns:
        The folder with the best adapter so far; ``None`` where there is none, or it could not be put there.
    """
    complete = complete_checkpoints(config)
    best = best_checkpoint(complete) if complete else None
    if best is None or not best.learned:
        return None
    if best.refused:
        remove_provisional(config)
        return None
    return mirror(config, best, accompany)


def mirror(config: RunConfig, best: Checkpoint, accompany: Callable[[Path], None] = lambda _: None) -> Path | None:
    """Let the output folder hold the adapter of one checkpoint, and none but that.

    A disk that is full or a share that is away for a moment costs no training: what could not be done is told, the
    adapter before it stays, and the next checkpoint tries again.

    Args:
        config: the run.
        best: where it is.
        accompany: writes into an adapter's folder what its user needs beside it.

    Returns:
        The folder with that adapter, or ``None`` where it could not be put there.
    """
    try:
        return _mirrored(config, best, accompany)
    except OSError as error:
        place = Path(config.output_dir) / PROVISIONAL_FOLDER
        print(f"train: {place} could not be brought up to step {best.step}: {error}", flush=True)
        return None


def _mirrored(config: RunConfig, best: Checkpoint, accompany: Callable[[Path], None]) -> Path:
    digests = _digests(best)
    target = _target(config, best, digests)
    if not target.is_dir():
        with _built(config, best, target) as folder:
            accompany(folder)
            write_json(folder / "manifest.json", _manifest(config, best, described(folder, digests)))
            folder.rename(target)
        _sync(target.parent)
    for path in _folders(config):
        if path != target:
            _remove(path)
    # What a kill has left behind holds on to weights whose checkpoints are long gone.
    for leftover in target.parent.glob(".step-*"):
        _clear(leftover)
    return target


def withdraw(config: RunConfig, refused: Checkpoint) -> None:
    """Take an adapter that has failed verification out of the output folder, where it is the one that lies there.

    This comes before anything on disk says so: whoever finds it noted as refused finds it nowhere to be handed over,
    also after a kill between the two, and when no other attempt follows that would take the next best.

    Args:
        config: the run.
        refused: what has failed; an average of the weights is never kept there.
    """
    if refused.weights != ADAPTER_FILE:
        return
    folder = _target(config, refused, _digests(refused))
    if folder.is_dir():
        _remove(folder)


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    record = json.loads((checkpoint.folder / COMPLETE).read_text(encoding="utf-8"))
    return {name: str(entry[1]) for name, entry in record["files"].items()}


def _target(config: RunConfig, checkpoint: Checkpoint, digests: dict[str, str]) -> Path:
    # The name says what is in it, so that what another run has left behind is not taken for this one's.
    name = f"step-{checkpoint.step}-{digests[ADAPTER_FILE][:12]}"
    return Path(config.output_dir) / PROVISIONAL_FOLDER / name


@contextlib.contextmanager
def _built(config: RunConfig, checkpoint: Checkpoint, target: Path) -> Iterator[Path]:
    folder = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        # The files of a checkpoint never change, so that another name for them is as good as a copy of gigabytes.
        fill(config, checkpoint, folder, link=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _manifest(config: RunConfig, checkpoint: Checkpoint, files: dict[str, Any]) -> dict[str, Any]:
    return {
        "provisional": True,
        "jobName": config.job_name,
        "taskID": config.task_id,
        "attempt": config.attempt,
        "baseModel": {"name": config.model.name, "revision": config.model.revision},
        "step": checkpoint.step,
        "evalLoss": checkpoint.eval_loss,
        "files": files,
    }


def remove_provisional(config: RunConfig) -> None:
    """Remove the best adapter so far, once there is a verified one or it has turned out to be none.

    What cannot be removed is told and left: a verified result beside it is none the worse for it.
    """
    place = Path(config.output_dir) / PROVISIONAL_FOLDER
    try:
        if place.is_dir():
            _remove(place)
        _remove_leftover(place)
    except OSError as error:
        print(f"train: {place} could not be removed: {error}", flush=True)


def _remove(folder: Path) -> None:
    """Take a folder out of sight in one step, so that nobody finds half of it, and remove it then."""
    _remove_leftover(folder)
    hidden = folder.with_name(f".{folder.name}.old")
    folder.rename(hidden)
    _clear(hidden)


def _clear(hidden: Path) -> None:
    """Remove what nobody finds any more; a share may keep files that somebody reads, and then they go another time."""
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        print(f"train: {hidden} could not be removed: {error}", flush=True)


def _remove_leftover(folder: Path) -> None:
    shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)


def _sync(folder: Path) -> None:
    """Put a rename on disk for good."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
