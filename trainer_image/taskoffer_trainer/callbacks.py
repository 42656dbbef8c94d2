"""What happens between the steps: progress, guard against NaN, stop and deadline, trustworthy checkpoints.

Imported by the ranks only, since the base class comes with transformers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from taskoffer.api.contract import Clamp, ExitCode, Metric, ProgressReport, RunConfig, RunState
from taskoffer_trainer.checkpoints import mark_complete, rotate
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.progress import now, write_report
from taskoffer_trainer.stop import Stop, StopCause

__all__ = ["CheckpointKeeper", "NaNGuard", "Progress", "StopWatch"]


class Timings:
    """Measured durations in seconds, from which the remaining time is estimated."""

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=20)
        self.evaluate = 0.0
        self.save = 0.0
        self.load = 0.0
        self.answer = 0.0

    @property
    def step(self) -> float:
        """Mean duration of the last steps, 0 before the first."""
        return sum(self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def finish(self) -> float:
        """Time from the last step to the verified adapter: load again, evaluate, answer, write."""
        return self.load + self.evaluate + self.answer + self.save

    @property
    def reserve(self) -> float:
        """Time to keep before a deadline: step, evaluation, checkpoint and finish, with a margin."""
        return 1.5 * (self.step + self.evaluate + self.save + self.finish) + 5.0


class Progress(TrainerCallback):  # type: ignore[misc]
    """Keeps the progress report up to date (rank 0) and measures durations (all ranks)."""

    def __init__(self, config: RunConfig, path: Path | None, timings: Timings) -> None:
        self.config, self.path, self.timings = config, path, timings
        self.state = RunState.STARTING
        self.clamps: tuple[Clamp, ...] = ()
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.total: int | None = None
        self.resumed_from: int | None = None
        self._step_began = self._tokens_at = self._said = self._written = 0.0
        self._tokens = 0.0
        self._train_began: float | None = None
        self._stepped = 0.0
        self._first_tokens: tuple[float, float] | None = None
        self._last_tokens: tuple[float, float] | None = None

    def took(self) -> dict[str, float | None]:
        """Return this attempt's time since its first step and its rate, by their names in a termination.

        The rate is a mean over the time in steps; the first one, which warms up, is left out.
        """
        seconds = None if self._train_began is None else time.monotonic() - self._train_began
        rate = None
        if self._first_tokens is not None and self._last_tokens is not None:
            tokens, stepped = (b - a for a, b in zip(self._first_tokens, self._last_tokens, strict=True))
            rate = tokens / stepped if stepped > 0 else None
        return {"training_seconds": seconds, "tokens_per_second": rate}

    def enter(self, state: RunState) -> None:
        """Report a new state at once."""
        self.state = state
        self.write()

    def note(self, **values: float) -> None:
        """Add figures to the report; figures that are not finite are left out."""
        self.metrics.update({name: value for name, value in values.items() if math.isfinite(value)})

    def remaining(self) -> int | None:
        """Estimate the seconds to the end from what was measured, or ``None`` before the first step."""
        if self.state is RunState.DONE:
            return 0
        if self.total is None or not self.timings.steps:
            return None
        left = max(0, self.total - self.step)
        evaluations = left // self.config.train.eval_steps
        saves = left // self.config.train.save_steps
        times = self.timings
        seconds = left * times.step + evaluations * times.evaluate + saves * times.save + times.finish
        return math.ceil(seconds)

    def report(self) -> ProgressReport:
        """Build the report. 100 % is only said when the adapter is verified and in place."""
        share = 0
        if self.state is RunState.DONE:
            share = 100
        elif self.total:
            share = min(99, 100 * self.step // self.total)
        return ProgressReport(
            job_name=self.config.job_name,
            attempt=self.config.attempt,
            state=self.state,
            progress_percentage=share,
            estimated_remaining_seconds=self.remaining(),
            metrics=tuple(Metric(name=name, value=f"{value:.6g}") for name, value in sorted(self.metrics.items())),
            last_updated_time=now(),
            step=self.step,
            total_steps=self.total,
            resumed_from_step=self.resumed_from,
            clamps=self.clamps,
        )

    def write(self) -> None:
        """Write the report where the launcher serves it from."""
        self._written = time.monotonic()
        if self.path is not None:
            write_report(self.path, self.report())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Learn how many steps there are."""
        self.total, self.step = state.max_steps, state.global_step
        self._tokens_at = self._train_began = time.monotonic()
        self.enter(RunState.TRAINING)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock of a step."""
        took = time.monotonic() - self._step_began
        self.timings.steps.append(took)
        self._stepped += took
        self.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take over the figures that the trainer logs, at most four times a second onto the disk."""
        logs = logs or {}
        self.note(**{name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs})
        self.note(epoch=float(state.epoch or 0.0), step_seconds=self.timings.step)
        if "loss" in logs and "num_tokens" in logs:
            here = time.monotonic()
            if here > self._tokens_at:
                self.note(tokens_per_second=(logs["num_tokens"] - self._tokens) / (here - self._tokens_at))
            self._tokens, self._tokens_at = logs["num_tokens"], here
            self._last_tokens = float(logs["num_tokens"]), self._stepped
            self._first_tokens = self._first_tokens or self._last_tokens
        if time.monotonic() - self._written > 0.25:
            self.write()
        if self.path is not None and time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            loss = self.metrics.get("loss", math.nan)
            print(
                f"train: step {self.step}/{self.total}, loss {loss:.4f}, about {self.remaining()} s left",
                flush=True,
            )


class NaNGuard(TrainerCallback):  # type: ignore[misc]
    """Leaves a step out when its gradients are not finite, which would spoil the weights for good.

    Under DDP the gradients are summed over the ranks before this is called, so all ranks see the same and
    agree.
    """

    LIMIT = 10
    """Steps in a row that may be left out before the run gives up."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.skipped = 0
        self.in_a_row = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Drop gradients that are not finite; an optimizer leaves parameters without a gradient as they are.

        Raises:
            TrainerError: ``RESTART`` after :attr:`LIMIT` such steps in a row.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # One number for all tensors: a sum is not finite when any of its terms is not.
        if not gradients or bool(torch.isfinite(torch.stack([g.sum(dtype=torch.float32) for g in gradients])).all()):
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        self.progress.note(skipped_steps=self.skipped)
        if self.skipped == 1:
            print(f"train: the gradients of step {state.global_step + 1} are not finite, the step is left out")
        if self.in_a_row >= self.LIMIT:
            raise TrainerError(
                ExitCode.RESTART,
                "GradientsNotFinite",
                f"the gradients of {self.in_a_row} steps in a row up to step {state.global_step + 1} are not "
                "finite; a smaller train.learningRate may help",
            )


class StopWatch(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the present step on a signal or before the deadline, all ranks together."""

    def __init__(self, stop: Stop, timings: Timings) -> None:
        self.stop, self.timings = stop, timings

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks; must come after the callback that plans evaluation and checkpoints."""
        cause = self.stop.agree(self.timings.reserve)
        if cause is StopCause.NONE:
            return
        control.should_save = True
        control.should_training_stop = True
        if cause is StopCause.DEADLINE:
            # What is exported is the best checkpoint, so this one has to be measured as well.
            control.should_evaluate = True


class CheckpointKeeper(TrainerCallback):  # type: ignore[misc]
    """Lets a checkpoint count once all ranks have written it and it was checked, then removes old ones."""

    def __init__(self, config: RunConfig, expected_tensors: int, rank: int, timings: Timings) -> None:
        self.config, self.expected, self.rank, self.timings = config, expected_tensors, rank, timings
        self.evaluated: tuple[int, float] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check, mark and rotate on rank 0, while the others wait.

        Raises:
            TrainerError: ``RESTART`` when the checkpoint does not pass its check.
        """
        began = time.monotonic()
        if dist.is_initialized():
            dist.barrier()
        if self.rank == 0:
            loss = None
            if self.evaluated is not None and self.evaluated[0] == state.global_step:
                loss = self.evaluated[1]
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder, state.global_step, loss, self.expected)
            rotate(self.config)
        if dist.is_initialized():
            dist.barrier()
        took = time.monotonic() - began
        self.timings.save = max(self.timings.save, took)
        if took > 2:
            print(f"train: checking the checkpoint of step {state.global_step} took {took:.1f} s", flush=True)
