"""How often to evaluate and save, so that there is a result at every moment and the verified one is there in time.

Imported by the ranks only, since the base class of callbacks comes with transformers.
"""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from taskoffer.api.contract import RunConfig
from taskoffer_trainer.clock import Clock
from taskoffer_trainer.learned import has_moved
from taskoffer_trainer.timings import EVALUATION_SHARE, Timings, evaluate_every
from taskoffer_trainer.world import World

__all__ = ["EARLY_SECONDS", "EARLY_STEPS", "InTime"]

EARLY_STEPS = 5
EARLY_SECONDS = 120.0
"""The first checkpoint comes after so many steps or seconds of training, whichever is first, once there is something
in it."""


class InTime(TrainerCallback):  # type: ignore[misc]
    """Saves early, so that there is something to hand over, and leaves out evaluations that the time is too short for.

    Without a deadline every planned evaluation is made. Must come after the callback that plans evaluation and
    checkpoints, and before the one that ends the training, whose evaluation is never left out.
    """

    def __init__(self, config: RunConfig, clock: Clock, timings: Timings, world: World) -> None:
        self.config, self.clock, self.timings, self.world = config, clock, timings, world
        self.saved = False
        self._began = time.monotonic()
        self._evaluated = 0

    @property
    def _spacing(self) -> int:
        """Steps between two evaluations before any is left out for want of time."""
        return self.config.train.eval_steps * self.timings.stretch

    def _has_moved(self, model: Any) -> bool:
        """Tell whether there is anything to hand over: one of the ranks holds a part that has learned."""
        return bool(self.world.largest(float(has_moved(model)))[0])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A run that goes on from a checkpoint has something to hand over already, if that has learned anything."""
        self._began = time.monotonic()
        # A run that goes on had its last evaluation when one was planned last.
        self._evaluated = state.global_step - state.global_step % self._spacing
        self.saved = state.global_step > 0 and self._has_moved(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Whatever the reason for it was, there is a checkpoint now."""
        self.saved = self.saved or self._has_moved(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Plan an early checkpoint of what has learned, all ranks together, and thin out the evaluations."""
        if not self.saved and not control.should_save:
            late = time.monotonic() - self._began >= EARLY_SECONDS
            if self.world.largest(float(late or state.global_step >= EARLY_STEPS))[0] and self._has_moved(model):
                control.should_save = True
        if control.should_evaluate and not control.should_training_stop and self.clock.deadline is not None:
            self._thin_out(state, control)

    def _thin_out(self, state: Any, control: Any) -> None:
        """Leave this evaluation out where those to come would take more than their share of the time.

        Where the pace of a run has them take that share already, none is left out: what they may take is a share of the
        time since the last one as well, and while one is made no steps are taken.
        """
        timings, spacing = self.timings, self._spacing
        step, cost = timings.step, timings.evaluate
        left = max(0.0, (self.clock.planned_left() or 0.0) - timings.reserve)
        since, ahead = state.global_step - self._evaluated, state.max_steps - state.global_step
        seconds = spacing * step
        all_of_them = 1 + min(ahead // spacing, int(max(0.0, left - cost) // max(seconds + cost, 1e-9)))
        mine = 1
        if cost * all_of_them > EVALUATION_SHARE * (left + since * step):
            reached = min(ahead, left / step if step > 0 else math.inf)
            mine = evaluate_every(cost, 1 + int(reached // spacing), left)
        # The clocks and durations of the ranks differ a little; the largest holds for all.
        timings.every = int(self.world.largest(mine)[0])
        if since < timings.every * spacing:
            control.should_evaluate = False
        else:
            self._evaluated = state.global_step
