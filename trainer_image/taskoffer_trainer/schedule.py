"""The learning rate of a run: warm-up, decline, stages, and a factor that follows the held-out loss, in one object.

All of it is a function of the step and of what was observed, so a run that goes on from a checkpoint has the rates
that it would have had without the stop.
"""

from __future__ import annotations

import math

from taskoffer.api.contract import AdaptiveLR, TrainSettings

__all__ = ["LearningRate"]


class LearningRate:
    """The factor on the peak learning rate at each step, for torch's ``LambdaLR``.

    ``LambdaLR`` saves the ``__dict__`` of a callable object with a checkpoint, and puts it back. What was observed
    stands there; the settings do not, for a later attempt may have been given smaller ones.

    Attributes:
        factor: product of what :meth:`observe` did so far, within the bounds of the settings.
        best: smallest held-out loss so far; at the beginning that of the base model, where it is known.
        waited: evaluations without an improvement since the last change.
        resting: evaluations that still count for nothing after a decrease.
    """

    __slots__ = ("__dict__", "_settings", "_total")

    def __init__(self, settings: TrainSettings, total_steps: int, before: float = math.inf) -> None:
        self._settings, self._total = settings, total_steps
        self.factor = 1.0
        self.best = before
        self.waited = 0
        self.resting = 0

    def __call__(self, step: int) -> float:
        """Return the factor on the peak learning rate for the step with this number, the first being 0."""
        factor = self.factor if self._settings.adaptive_lr is not None else 1.0
        return self._declined(step) * self.stage(step)[1] * factor

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; transformers rounds a share of all steps up."""
        asked = self._settings.warmup_steps
        return int(asked) if asked >= 1 else math.ceil(self._total * asked)

    def _declined(self, step: int) -> float:
        """Return the factor of warm-up and decline, above 0 at every step of the run.

        It is what transformers' ``get_*_schedule_with_warmup`` define for each name, but for the warm-up: theirs is
        ``step / warmup``, 0 at the first step, so that a run of one step would learn nothing at all. Here it is
        ``(step + 1) / (warmup + 1)``; from the end of the warm-up on both are the same.
        """
        kind, warmup = self._settings.lr_scheduler_type, self.warmup_steps
        if kind == "constant":
            return 1.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant_with_warmup":
            return 1.0
        left = max(1, self._total - warmup)
        if kind == "linear":
            return max(0.0, (self._total - step) / left)
        lowest = self._settings.min_lr_rate
        # Half a cosine from 1 to the lowest rate (Loshchilov and Hutter 2017, without restarts).
        falling = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / left))
        return max(0.0, falling * (1 - lowest) + lowest)

    def stage(self, step: int) -> tuple[int, float]:
        """Return number (from 1) and factor of the stage that a step lies in; without stages it is the first of one."""
        stages = self._settings.stages
        passed = 0.0
        for number, one in enumerate(stages, start=1):
            passed += one.share
            # A step on the border belongs to the next stage, whatever rounding the sum of the shares has.
            if step / max(1, self._total) < passed - 1e-9:
                return number, one.factor
        return (len(stages), stages[-1].factor) if stages else (1, 1.0)

    def observe(self, loss: float) -> float | None:
        """Take an evaluation into account.

        Args:
            loss: the held-out loss, which is to become smaller.

        Returns:
            The new factor where it has changed, else ``None``.
        """
        rule = self._settings.adaptive_lr
        if rule is None:
            return None
        before = self.factor
        needed = rule.threshold * abs(self.best) if math.isfinite(self.best) else 0.0
        improved = loss < self.best - needed
        if not math.isfinite(loss):
            self._decrease(rule)
            return self.factor if self.factor != before else None
        self.best = min(self.best, loss)
        if self.resting > 0:
            self.resting -= 1
        elif improved:
            self.waited = 0
            self.factor = min(rule.max, self.factor * rule.increase)
        else:
            self.waited += 1
            if self.waited >= rule.patience:
                self._decrease(rule)
        return self.factor if self.factor != before else None

    def _decrease(self, rule: AdaptiveLR) -> None:
        self.factor = max(rule.min, self.factor * rule.decrease)
        self.waited, self.resting = 0, rule.cooldown
