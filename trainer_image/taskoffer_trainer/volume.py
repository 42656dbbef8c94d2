"""Whether the volume of the checkpoints has room for as many of them as are to be kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from taskoffer.api.contract import CHECKPOINT_BYTES, FEWEST_CHECKPOINTS, Clamp, ExitCode, RunConfig
from taskoffer_trainer.failures import TrainerError

__all__ = ["checkpoints_that_fit"]


def checkpoints_that_fit(config: RunConfig, parameters: int, free: int | None = None) -> tuple[int, tuple[Clamp, ...]]:
    """Return how many checkpoints to keep, and say so when they are fewer than asked for.

    While one is written, all that are kept are still there, so one more must have room.

    Args:
        config: the run.
        parameters: trained parameters.
        free: free bytes of the volume, those of earlier checkpoints included; found out when absent.

    Raises:
        TrainerError: ``BAD_CONFIG`` when there is not even room for the best, the newest and one that is written.
    """
    folder = Path(config.checkpoint_dir)
    each = CHECKPOINT_BYTES * parameters
    if free is None:
        free = shutil.disk_usage(folder).free + _held(folder)
    asked = max(FEWEST_CHECKPOINTS, config.train.save_total_limit)
    room = free // each - 1
    if room < FEWEST_CHECKPOINTS:
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "CheckpointVolumeTooSmall",
            f"checkpointDir: {folder} has {_gib(free)} free, and {FEWEST_CHECKPOINTS + 1} checkpoints of {_gib(each)} "
            "each must have room; give it a larger volume, or choose a smaller lora.r",
        )
    if room >= asked:
        return config.train.save_total_limit, ()
    message = (
        f"{folder} has {_gib(free)} free, a checkpoint takes {_gib(each)}, and one more is there while it is written."
    )
    clamp = Clamp(
        field="train.saveTotalLimit",
        requested=str(config.train.save_total_limit),
        effective=str(room),
        reason="CheckpointsClamped",
        message=message[:512],
    )
    return room, (clamp,)


def _held(folder: Path) -> int:
    """Return the bytes of the checkpoints that are there already and give way to new ones."""
    return sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
