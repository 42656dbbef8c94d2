"""How often the held-out rows are measured: as often as asked, unless that takes too much of the time."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from taskoffer.api.contract import Clamp
from taskoffer_trainer.callbacks import Progress
from taskoffer_trainer.steps import Steps
from taskoffer_trainer.timings import UNNOTICED_SECONDS, Timings

__all__ = ["EvaluationPace", "stretched"]

SHARE = 0.1
"""Most of the time that evaluations may take; the rows are capped by the same share, from what is known beforehand."""


def stretched(evaluate_seconds: float, step_seconds: float, eval_steps: int) -> int:
    """Return how many times as many steps must lie between two evaluations for them to take :data:`SHARE` at most."""
    if evaluate_seconds <= UNNOTICED_SECONDS or step_seconds <= 0:
        return 1
    # The time between two evaluations must be nine times that of one for a share of a tenth.
    return max(1, math.ceil(evaluate_seconds * (1 / SHARE - 1) / (eval_steps * step_seconds)))


class EvaluationPace(TrainerCallback):  # type: ignore[misc]
    """Puts evaluations off, and measures the last step in any case.

    Decided once, at the first evaluation, by rank 0, from measured times; kept in the checkpoints, so that a run that
    goes on evaluates at the same steps.
    """

    def __init__(self, steps: Steps, timings: Timings, progress: Progress) -> None:
        self.steps, self.timings, self.progress = steps, timings, progress
        self._said = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide; must come after the callback that plans evaluations and before the one that stops the training."""
        steps, every = self.steps, self.steps.config.train.eval_steps
        if state.global_step >= steps.plan.total_steps:
            # What is trained last is as good a candidate as any.
            control.should_evaluate = True
            return
        if not control.should_evaluate:
            return
        if steps.stretch is None:
            mine = stretched(self.timings.evaluate, self.timings.step, every)
            steps.stretch = int(steps.world.share(mine))
        self.timings.stretch = steps.stretch
        self._say(every)
        if state.global_step // every % steps.stretch:
            control.should_evaluate = False

    def _say(self, every: int) -> None:
        stretch = self.steps.stretch or 1
        if self._said or stretch == 1:
            return
        self._said = True
        clamp = Clamp(
            field="train.evalSteps",
            requested=str(every),
            effective=str(every * stretch),
            reason="EvaluationClamped",
            message=f"An evaluation takes {self.timings.evaluate:.1f} s and a step {self.timings.step:.2f} s.",
        )
        self.progress.clamps = (*self.progress.clamps, clamp)
        print(f"clamp: {clamp.field} {every} -> {clamp.effective} ({clamp.reason}) {clamp.message}", flush=True)
