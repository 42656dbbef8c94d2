"""How long the pieces of a run take, and what follows for the time that is left."""

from __future__ import annotations

import math
from collections import deque

from taskoffer.api.contract import GRPOSettings, RunConfig, TaskType

__all__ = ["EVALUATION_SHARE", "UNNOTICED_SECONDS", "Timings", "evaluate_every"]

EVALUATION_SHARE = 0.1
"""Most of the time that is left before a deadline that evaluations may take (task market, §5.1)."""
UNNOTICED_SECONDS = 2.0
"""An evaluation that is shorter is never put off."""
MARGIN_SECONDS = 5.0
"""What is added to the measured durations before a deadline, for what nobody measures."""


def _verify(config: RunConfig) -> int:
    """Return what one process has to measure alone, in evaluations that all processes share.

    Preferences are compared with the base model, which in the training was measured before the first step.
    """
    return config.gpus * (2 if config.task_type is TaskType.DPO else 1)


class Timings:
    """Measured durations in seconds, from which the remaining time is estimated.

    Attributes:
        guess: what a step is thought to take before the first one was measured.
        evaluate: an evaluation of the held-out rows, which all processes share.
        write: writing a checkpoint.
        save: checking it and copying the best one to the output folder.
        load: loading the base model.
        answer: answering the sample prompts.
        every: of those that ``stretch`` leaves only every so many are made, for want of time before the deadline.
        stretch: only every so many planned evaluations are made, for the share of the time that they may take of any
            run.
        candidates: what is measured at the end before one of them is chosen: weights and perhaps their average.
        verify: how many times as long as an evaluation the verification measures, which one process does alone.
    """

    def __init__(self, config: RunConfig | None = None) -> None:
        self.steps: deque[float] = deque(maxlen=20)
        self.guess = 0.0
        self.evaluate = 0.0
        self.write = 0.0
        self.save = 0.0
        self.load = 0.0
        self.answer = 0.0
        self.every = 1
        self.stretch = 1
        self.candidates = 1
        self.verify = _verify(config) if config is not None else 1

    @property
    def step(self) -> float:
        """Mean duration of the last steps; before the first what is thought of it, or 0."""
        return sum(self.steps) / len(self.steps) if self.steps else self.guess

    @property
    def finish(self) -> float:
        """Time from the last step to the verified adapter: load again, evaluate each candidate, answer, write.

        One candidate was measured at the last step, and the chosen one is measured again by one process alone.
        """
        return self.load + self.evaluate * (self.candidates - 1 + self.verify) + self.answer + self.save

    @property
    def reserve(self) -> float:
        """Time that the end takes from here: step, evaluation, checkpoint and finish, with a margin."""
        return 1.5 * (self.step + self.evaluate + self.write + self.save + self.finish) + MARGIN_SECONDS

    def guess_step(self, config: RunConfig, rows: int, held_out: int) -> None:
        """Think of a step from the evaluation of the base model, before any step was measured.

        A forward pass takes 2N operations per token. With a frozen base the pass back takes as many, since only what
        goes to the inputs is computed, and gradient checkpointing repeats the forward pass: 4N and 6N (Hu et al.,
        LoRA, and what torch's FlopCounter counts). Where answers are compared with those of the base model, its
        forward pass comes to that. Completions are drawn in a step as in an evaluation, which goes through each of them
        twice after that.

        Args:
            config: the run.
            rows: rows of a step, all processes together.
            held_out: rows that the evaluation went through, each as often as it did.
        """
        passes = 3.0 if config.train.gradient_checkpointing else 2.0
        drawn = config.task_type is TaskType.GRPO
        weighed = drawn and (config.train.grpo or GRPOSettings()).beta > 0
        if weighed or config.task_type is TaskType.DPO:
            passes += 1.0
        self.guess = (passes / 2 if drawn else passes) * self.evaluate * rows / max(1, held_out)

    def seconds(self, config: RunConfig, steps: int) -> float:
        """Return what so many steps take with their evaluations and checkpoints, and the finish after them."""
        evaluations = steps // (config.train.eval_steps * self.every * self.stretch)
        saves = steps // config.train.save_steps
        return steps * self.step + evaluations * self.evaluate + saves * (self.write + self.save) + self.finish


def evaluate_every(cost: float, planned: int, left: float) -> int:
    """Return of how many planned evaluations one is made, so that all of them stay within their share of the time.

    Args:
        cost: seconds of an evaluation.
        planned: evaluations that are still to come.
        left: seconds until the training has to end.
    """
    allowed = EVALUATION_SHARE * max(0.0, left)
    if cost * planned <= allowed:
        return 1
    return max(1, math.ceil(cost * planned / allowed)) if allowed > 0 else max(1, planned)
