"""What a rank says of itself while it trains, for ``/metrics``: step times, memory of its GPU, age of a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.checkpoints import COMPLETE, complete_checkpoints
from taskoffer_trainer.metrics import RankFigures
from taskoffer_trainer.progress import Spoken
from taskoffer_trainer.timings import Timings

__all__ = ["Telemetry"]

_INTERVAL = 0.5
"""Seconds between two writes of a rank's file."""


class Telemetry(TrainerCallback):  # type: ignore[misc]
    """Writes a rank's figures at most twice a second; must come after the callback that measures steps."""

    def __init__(self, config: RunConfig, run_dir: Path, rank: int, timings: Timings) -> None:
        self.config, self.run_dir, self.timings = config, run_dir, timings
        self.figures = RankFigures(rank)
        self._written = 0.0
        self._spoken = Spoken()

    def _write(self, pressing: bool = False) -> None:
        if not pressing and time.monotonic() - self._written < _INTERVAL:
            return
        self._written = time.monotonic()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.figures.allocated_bytes = int(torch.cuda.memory_allocated())
            self.figures.reserved_bytes = int(torch.cuda.memory_reserved())
        self._spoken(lambda: self.figures.write(self.run_dir))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on has a checkpoint already, as old as it is."""
        for checkpoint in complete_checkpoints(self.config)[:1]:
            self.figures.checkpoint_at = (checkpoint.folder / COMPLETE).stat().st_mtime
        self._write(pressing=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step that was just measured."""
        if self.timings.steps:
            self.figures.observe(self.timings.steps[-1])
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that there is a checkpoint; must come after the callback that checks it."""
        self.figures.checkpoint_at = time.time()
        self._write(pressing=True)
